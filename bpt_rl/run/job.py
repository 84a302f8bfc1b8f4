"""A job of a grid: trainings that go together, with their evaluations, and what becomes of it in some process.

Light to import, so that whoever only hands jobs out need not load what runs them.
"""

import contextlib
import dataclasses
import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bpt_rl import config_toml
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.run.grid import Cell
from bpt_rl.run.grid_folder import GridFolder

Report = Callable[[float, str], None]
"""Called with the part of a job that is done, from 0 to 1, and what is being done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cell that a job was to finish."""

    address: str
    state: Literal["finished", "failed", "busy"]
    """busy: another process is at it, or at another evaluation of its training."""
    error: str = ""
    details: str = ""
    """Where in the code it arose, or what the process printed last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Cells that one process finishes in one go; plain values, so that it can be sent anywhere."""

    out: str
    """Folder of the grid."""
    trainings: tuple[Mapping[str, Any], ...]
    """Each with its address, its configuration and a list of evaluations, with theirs."""
    command: str = ""
    """Command line that repeats the grid, for the record."""

    @classmethod
    def of(cls, out: str, groups: Sequence[Sequence[Cell]], command: str = "") -> "Job":
        """Returns the job of some trainings, each given by its cells."""
        trainings = []
        for cells in groups:
            asked = [{"address": cell.address, "config": dataclasses.asdict(cell.evaluate)} for cell in cells]
            values = {"address": cells[0].training, "config": dataclasses.asdict(cells[0].train)}
            trainings.append({**values, "evaluations": asked})
        return cls(out=out, trainings=tuple(trainings), command=command)

    @property
    def addresses(self) -> list[str]:
        """Of the cells."""
        return [asked["address"] for training in self.trainings for asked in training["evaluations"]]

    @property
    def name(self) -> str:
        """The first training's folder."""
        name: str = self.trainings[0]["config"]["run"]
        return name

    @property
    def num_devices(self) -> int:
        """Devices that its trainings and evaluations take, one after another."""
        asked = (evaluation for training in self.trainings for evaluation in training["evaluations"])
        meshes = (work["config"]["mesh"] for work in [*self.trainings, *asked])
        return max(config_toml.from_mapping(MeshConfig, mesh).num_devices for mesh in meshes)

    def with_simulators(self, number: int) -> "Job":
        """Returns the job with so many simulator processes where it leaves their number open."""

        def placed(training: Mapping[str, Any]) -> dict[str, Any]:
            evaluations = [
                {
                    **asked,
                    "config": {**asked["config"], "num_workers": asked["config"]["num_workers"] or number},
                }
                for asked in training["evaluations"]
            ]
            return {**training, "evaluations": evaluations}

        return dataclasses.replace(self, trainings=tuple(map(placed, self.trainings)))

    def each(self) -> list["Job"]:
        """Returns a job for each of its trainings."""
        return [dataclasses.replace(self, trainings=(training,)) for training in self.trainings]

    def outcomes(
        self, state: Literal["finished", "failed", "busy"], error: str = "", details: str = ""
    ) -> list[Outcome]:
        """Returns the same outcome for every cell that has no result, and `finished` for the others."""
        done = GridFolder(Path(self.out)).finished()
        return [
            Outcome(address=address, state="finished")
            if address in done
            else Outcome(address=address, state=state, error=error, details=details)
            for address in self.addresses
        ]


Runner = Callable[[Job, Report], None]
"""Finishes the cells of a job that have no result; raises if one cannot be."""


def run_job(job: Job, report: Report, runner: Runner) -> list[Outcome]:
    """Returns what became of a job's cells, none of which another process may be at; only interruptions are raised."""
    folder = GridFolder(Path(job.out))
    with folder.locked(sorted(training["address"] for training in job.trainings)) as is_ours:
        if not is_ours:
            return job.outcomes("busy")
        if set(job.addresses) <= folder.finished():
            return job.outcomes("finished")
        try:
            runner(job, report)
        except Exception as error:
            return job.outcomes("failed", f"{type(error).__name__}: {error}", traceback.format_exc())
    return job.outcomes("failed", "RuntimeError: the cell ended without a result")


def find_runner(name: str) -> Runner:
    """Returns the function that "module:function" names, importing the module.

    Raises:
      ValueError: If there is none.
    """
    module, _, function = name.partition(":")
    with contextlib.suppress(ImportError, AttributeError):
        runner: Runner = getattr(importlib.import_module(module), function)
        return runner
    raise ValueError(f"A runner must be named module:function; got {name!r}. Is its module on PYTHONPATH?")


RUNNER = "bpt_rl.run.cell:train_and_evaluate"
"""Name of the runner of `bpt-rl ablate`."""
