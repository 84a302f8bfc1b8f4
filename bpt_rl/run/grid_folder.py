"""The folder of grids: what is written where, and the locks that keep processes out of each other's cells.

Everything is written aside and renamed, so that a kill at any time leaves whole files. A cell is finished when its
result lies there. Locks are advisory (flock): the kernel releases them with the process that holds them, however it
ends. On a folder that several hosts share they hold where the file system passes locks on, as NFS 4 does.
"""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpt_rl.ablate_config import GridConfig
from bpt_rl.run import records


@dataclasses.dataclass(frozen=True)
class GridFolder:
    """Paths and contents of one folder of cells, which grids share, and of what is one grid's own within it."""

    path: Path
    name: str = ""
    """Of the grid: folder of its tables and its page. Empty for `path` itself."""

    @classmethod
    def of(cls, config: GridConfig) -> "GridFolder":
        """Returns the folder that a grid names."""
        return cls(Path(config.out), config.name)

    @property
    def config_path(self) -> Path:
        """The grid, resolved."""
        return self._own("grid.toml")

    @property
    def table_path(self) -> Path:
        """One row a number: the same however often the grid was interrupted."""
        return self._own("table.csv")

    @property
    def costs_path(self) -> Path:
        """One row a cell: what it took."""
        return self._own("costs.csv")

    @property
    def page_path(self) -> Path:
        """The page."""
        return self._own("ablation.html")

    @property
    def logs_path(self) -> Path:
        """What the local launcher's processes print."""
        return self.path / "logs"

    def stamp(self) -> str:
        """Returns what tables and page were last made of; empty if they never were."""
        path = self._own("stamp")
        return path.read_text() if path.is_file() else ""

    def write_stamp(self, stamp: str) -> None:
        """Says what tables and page are made of, once they are."""
        records.write_atomically(self._own("stamp"), stamp)

    def run_folder(self, name: str) -> records.RunFolder:
        """Returns the run folder of a training."""
        return records.RunFolder(self.path / "cells" / name)

    def finished(self) -> set[str]:
        """Returns the addresses of all finished cells, of this grid and others; no file is opened."""
        return {path.stem for path in (self.path / "results").glob("*.json")}

    def stores(self) -> dict[str, set[str]]:
        """Returns, by task, the digests of the stores that finished cells were trained on; opens every result."""
        found: dict[str, set[str]] = {}
        for address in sorted(self.finished()):
            record = self.result(address)["record"]
            found.setdefault(record["task"], set()).add(record["data"]["digest"])
        return found

    def result(self, address: str) -> dict[str, Any]:
        """Returns what the runner kept of a finished cell."""
        values: dict[str, Any] = json.loads(self._result_path(address).read_text())
        return values

    def write_result(self, address: str, values: Mapping[str, Any]) -> None:
        """Finishes a cell."""
        records.write_json(self._result_path(address), values)
        self._failure_path(address).unlink(missing_ok=True)

    def failure(self, address: str) -> dict[str, Any] | None:
        """Returns why a cell failed when it was last tried; None if it did not."""
        path = self._failure_path(address)
        try:
            values: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        return values

    def write_failure(self, address: str, values: Mapping[str, Any]) -> None:
        """Keeps why a cell failed, until it is finished."""
        records.write_json(self._failure_path(address), values)

    @contextlib.contextmanager
    def locked(self, names: Sequence[str]) -> Iterator[bool]:
        """Yields whether this process alone may work on some trainings until the end of the block.

        Lock files stay: one that is removed could be held by two processes, each with a file of its own.
        """
        folder = self.path / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            is_ours = True
            for name in names:
                file = stack.enter_context((folder / name).open("w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    is_ours = False
                    break
            yield is_ours

    def _own(self, file: str) -> Path:
        return self.path / self.name / file

    def _result_path(self, address: str) -> Path:
        return self.path / "results" / f"{address}.json"

    def _failure_path(self, address: str) -> Path:
        return self.path / "failures" / f"{address}.json"
