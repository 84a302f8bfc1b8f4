"""Where jobs run: what a grid asks of a launcher, and the one that runs them in the calling process."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

from bpt_rl.run.job import Job, Outcome, Runner, run_job


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job that a launcher is done with."""

    job: Job
    outcomes: Sequence[Outcome]


@runtime_checkable
class Launcher(Protocol):
    """Runs jobs somewhere; a context manager, which takes everything down that it started."""

    @property
    def num_slots(self) -> int:
        """Jobs that it takes at once."""

    def start(self, job: Job) -> None:
        """Takes a job."""

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Returns the jobs that ended, waiting at most so long for one. A job whose process died has failed."""

    def progress(self) -> dict[str, tuple[float, str]]:
        """Returns the part done and what is being done of each job that runs, by its name."""

    def __enter__(self) -> "Launcher": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class InlineLauncher(contextlib.AbstractContextManager["InlineLauncher"]):
    """Runs one job after another in this process: what is loaded and started already is used again."""

    num_slots = 1

    def __init__(self, runner: Runner, told: Callable[[float], None] | None = None) -> None:
        """Runs jobs by `runner`; `told` hears how many are done, the part of the one that runs included."""
        self._runner, self._told = runner, told
        self._num_done = 0
        self._ended: list[Ended] = []

    def start(self, job: Job) -> None:
        """Runs a job to its end."""

        def report(part: float, _: str) -> None:
            if self._told:
                self._told(self._num_done + part)

        self._ended.append(Ended(job, run_job(job, report, self._runner)))
        self._num_done += 1

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Returns what `start` ran."""
        ended, self._ended = self._ended, []
        return ended

    def progress(self) -> dict[str, tuple[float, str]]:
        """Returns nothing: nobody can ask while a job runs."""
        return {}

    def __exit__(self, *error: object) -> None:
        """There is nothing to take down."""
