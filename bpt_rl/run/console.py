"""Progress on the terminal: a bar with an estimate of what remains for each stage of a command."""

import contextlib
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

Advance = Callable[..., None]
"""Called with items done, items in all and, by keyword, a note to show."""


class Stages:
    """Stages of one command, shown one below the other; on no terminal, one line a finished stage."""

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
        last_note = ""

        def advance(done: float, total: float, *, note: str = "") -> None:
            nonlocal last_note
            last_note = note
            self._progress.update(task, completed=done, total=total, note=note)

        if not self._console.is_terminal:
            self._console.print(f"{label} ...", highlight=False)
        yield advance
        if not self._console.is_terminal:
            elapsed = self._progress.tasks[task].elapsed or 0.0
            suffix = f" ({last_note})" if last_note else ""
            self._console.print(f"{label}: done in {elapsed:.0f} s{suffix}", highlight=False)
