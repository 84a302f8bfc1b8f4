"""Progress on the terminal: a bar with an estimate of what remains for each stage of a command."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 60.0
"""At least so long lies between two lines of a stage's progress on no terminal, as in the log of a cluster's job."""

Advance = Callable[..., None]
"""Called with items done, items in all and, by keyword, a note to show."""


class Stages:
    """Stages of one command, shown one below the other; on no terminal, a line a minute and one a finished stage."""

    def __init__(self, num_stages: int) -> None:
        """Prepares `num_stages` stages."""
        self._console = Console(stderr=True)
        self._num_stages = num_stages
        self._begun = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("remaining"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> "Stages":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Yields a function that moves the bar of the next stage."""
        self._begun += 1
        label = f"{self._begun}/{self._num_stages} {name}" if self._num_stages > 1 else name
        task = self._progress.add_task(label, total=None, note="")
        last_note, last_line = "", time.monotonic()

        def say(what: str) -> None:
            elapsed = self._progress.tasks[task].elapsed or 0.0
            suffix = f" ({last_note})" if last_note else ""
            line = f"{label}: {what} {elapsed:.0f} s{suffix}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

        def advance(done: float, total: float, *, note: str = "") -> None:
            nonlocal last_note, last_line
            last_note = note
            self._progress.update(task, completed=done, total=total, note=note)
            if not self._console.is_terminal and time.monotonic() >= last_line + LINE_SECONDS:
                last_line = time.monotonic()
                say(f"{done:,.0f} of {total:,.0f} after")

        if not self._console.is_terminal:
            self._console.print(f"{label} ...", highlight=False)
        yield advance
        if not self._console.is_terminal:
            say("done in")
