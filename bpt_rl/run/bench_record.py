"""What a benchmark leaves behind: a JSON file that says where it comes from, and a table for the terminal."""

import dataclasses
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bpt_rl.run import records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table; the JSON file holds every field of a row, in basic units."""

    heading: str
    """With the unit shown."""
    field: str
    """Of the row. None there leaves the cell empty."""
    divisor: float = 1
    """From the basic unit to that of the heading."""
    digits: int = 0
    """Behind the point."""

    def cell(self, row: Any) -> str:
        """Returns what the table shows of a row."""
        value = getattr(row, self.field)
        if value is None or isinstance(value, str):
            return value or ""
        return f"{value / self.divisor:,.{self.digits}f}"


def table(rows: Sequence[Any], columns: Sequence[Column]) -> str:
    """Returns rows as aligned text, numbers to the right; a column that no row fills is left out."""
    shown = [column for column in columns if any(column.cell(row) for row in rows)]
    lines = [[column.heading for column in shown], *([column.cell(row) for column in shown] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    is_text = [any(isinstance(getattr(row, column.field), str) for row in rows) for column in shown]

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, is_text, strict=True)
        return "  ".join(f"{cell:{'<' if text else '>'}{width}}" for cell, width, text in parts).rstrip()

    return "\n".join([line(lines[0]), "  ".join("-" * width for width in widths), *map(line, lines[1:])])


def check_writable(path: Path) -> None:
    """Refuses a file that could not be written later; what it holds stays.

    Raises:
      OSError: If it is a folder, or nothing can be written beside it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        is_below_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "its folder is a file" if is_below_file else (error.strerror or str(error)).lower()
        raise OSError(
            f"out must be a file that can be written; got {path} ({reason}). Name another."
        ) from error


def write_record(path: Path, config: Any, rows: Sequence[Any], *, bench: str, command: str) -> None:
    """Writes the rows with what they depend on: command, configuration, device, versions and git commit.

    Args:
      path: Of the JSON file.
      config: Dataclass that was measured.
      rows: Dataclasses, one a measurement.
      bench: What was measured, like "step".
      command: Command line that repeats this.

    Raises:
      OSError: If the file cannot be written.
    """
    device = jax.devices()[0]
    origin = {"bench": bench, "command": command, "device": f"{device.device_kind} ({device.platform})"}
    values = {"config": dataclasses.asdict(config), "rows": [dataclasses.asdict(row) for row in rows]}
    records.write_json(path, origin | records.versions() | values)
