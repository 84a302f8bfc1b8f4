"""Running a grid: what is missing of it, whatever was interrupted before, and the tables of what came out."""

import collections
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bpt_rl import config_toml
from bpt_rl.ablate_config import GridConfig
from bpt_rl.run import records
from bpt_rl.run.grid import Cell, expand, trainings
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.job import Job, Outcome
from bpt_rl.run.launchers import Ended, Launcher

Progress = Callable[..., None]
"""Called with cells done, cells in all and, by keyword, a note to show."""
TRIES = 2
"""Of a cell in one call, the failed ones counted."""
PAGE_SCHEMA = 4
"""Raised when tables or page change: those that lie there are written anew."""
POLL = 1.0
"""Seconds between two looks at cells that another process is at."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell that could not be finished."""

    cell: Cell
    error: str
    details: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridResult:
    """What a grid came to."""

    cells: Sequence[Cell]
    folder: GridFolder
    num_finished: int
    failures: Sequence[Failure]
    """Of this call."""

    @property
    def run_folders(self) -> list[Path]:
        """Of the trainings, each once, in the order of the cells."""
        names = dict.fromkeys(cell.train.run for cell in self.cells)
        return [self.folder.run_folder(name).path for name in names]


def ablate(
    config: GridConfig,
    make_launcher: Callable[[Sequence[Job]], Launcher],
    *,
    report_progress: Progress | None = None,
    command: str = "",
) -> GridResult:
    """Runs the cells of a grid that are not finished, writes its tables and its page.

    A cell that fails is tried once more, alone. One that another process is at, with the same folder, is waited for.
    Interrupted anywhere and called again, the grid ends with the same table.

    Args:
      config: The grid.
      make_launcher: Called with the jobs of the cells that are missing, if there are any.
      report_progress: Told of cells.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If a store or preset does not exist.
      ValueError: If the grid has no cell that could run.
    """
    cells, folder = expand(config), GridFolder.of(config)
    work = _Work(cells, folder, report_progress)
    jobs = _jobs(config, work.missing(), command)
    if jobs:
        # Before the cells: of a grid that is killed it can be read what it was.
        _write_config(config, folder)
        with make_launcher(jobs) as launcher:
            work.run(jobs, launcher)
    work.tell()
    stamp = _stamp(cells, work.missing())
    if jobs or not (folder.page_path.is_file() and folder.stamp() == stamp):
        _write(config, cells, folder, command)
        folder.write_stamp(stamp)
    num_finished = len(cells) - len(work.missing())
    return GridResult(cells=cells, folder=folder, num_finished=num_finished, failures=work.failures())


def report(config: GridConfig, *, command: str = "") -> GridResult:
    """Writes the tables and the page of a grid's finished cells and runs none.

    Another process may be running the grid: what it has finished by now is what counts. A store need not be there any
    more if finished cells of its task say which it was.

    Args:
      config: The grid.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If no cell is finished, or a preset does not exist, or a store of which no cell is finished.
      ValueError: If the grid has no cell that could run, or finished cells of a task whose store is not there were
        trained on several.
    """
    folder = GridFolder.of(config)
    cells = expand(config, folder.stores)
    num_finished = len({cell.address for cell in cells} & folder.finished())
    if not num_finished:
        raise FileNotFoundError(
            f"Tables and a page are made of finished cells; got none of {len(cells)} in {folder.path}. "
            "Run the grid first, without --report-only, or name its folder with --out."
        )
    _write(config, cells, folder, command)
    # Last: a grid that ended meanwhile has stamped a page that this one lies over by now.
    folder.write_stamp("")
    return GridResult(cells=cells, folder=folder, num_finished=num_finished, failures=())


def _write(config: GridConfig, cells: Sequence[Cell], folder: GridFolder, command: str) -> None:
    # Here, not above: a grid that is finished answers before all that draws is loaded.
    from bpt_rl.run.ablation_page import write_page
    from bpt_rl.run.ablation_table import write_tables

    _write_config(config, folder)
    write_tables(cells, folder)
    write_page(config, cells, folder, command=command)


def _write_config(config: GridConfig, folder: GridFolder) -> None:
    records.write_atomically(folder.config_path, config_toml.to_toml(config))


def _stamp(cells: Sequence[Cell], missing: Sequence[Cell]) -> str:
    """Returns what the tables and the page of a grid depend on, in short."""
    addresses = [[cell.address for cell in some] for some in (cells, missing)]
    return hashlib.sha256(json.dumps([PAGE_SCHEMA, *addresses]).encode()).hexdigest()


def _jobs(config: GridConfig, cells: Iterable[Cell], command: str) -> list[Job]:
    """Returns jobs of one training each, or of several that differ in their seed alone."""
    together: dict[str, list[list[Cell]]] = {}
    for group in trainings(cells).values():
        train = dataclasses.replace(group[0].train, seed=0, run="")
        key = repr(train) if config.seeds_at_once > 1 else group[0].training
        together.setdefault(key, []).append(group)
    return [
        Job.of(config.out, groups[i : i + config.seeds_at_once], command)
        for groups in together.values()
        for i in range(0, len(groups), config.seeds_at_once)
    ]


def describe_result(result: GridResult) -> str:
    """Returns what `bpt-rl ablate` prints at the end: where the tables lie, and what failed and why."""
    folder = result.folder
    lines = [
        f"{result.num_finished} of {len(result.cells)} cells are finished.",
        f"Page: {folder.page_path}",
        f"Table: {folder.table_path}",
        f"Costs: {folder.costs_path}",
    ]
    if result.failures:
        lines.append(f"{len(result.failures)} failed, each tried twice; the same command tries them again:")
        lines += [f"  {failure.cell.title}: {failure.error}" for failure in result.failures]
        lines.append(f"More in {folder.path / 'failures'}.")
    return "\n".join(lines)


class _Work:
    """What is still to be done of a grid."""

    def __init__(self, cells: Sequence[Cell], folder: GridFolder, report_progress: Progress | None) -> None:
        self._cells = {cell.address: cell for cell in cells}
        self._folder = folder
        self._report_progress = report_progress
        self._tries: collections.Counter[str] = collections.Counter()
        self._done = folder.finished() & self._cells.keys()
        self._failed: dict[str, Outcome] = {}

    def missing(self) -> list[Cell]:
        return [cell for address, cell in self._cells.items() if address not in self._done]

    def failures(self) -> list[Failure]:
        return [
            Failure(cell=cell, error=self._failed[address].error, details=self._failed[address].details)
            for address, cell in self._cells.items()
            if address in self._failed
        ]

    def run(self, jobs: Sequence[Job], launcher: Launcher) -> None:
        waiting, num_running = collections.deque(jobs), 0
        # Of each, when it may be asked for again: another process is at it.
        busy: list[tuple[float, Job]] = []
        while waiting or num_running or busy:
            while waiting and num_running < launcher.num_slots:
                launcher.start(waiting.popleft())
                num_running += 1
            if num_running:
                for ended in launcher.wait(POLL):
                    num_running -= 1
                    again, is_busy = self._settle(ended)
                    if is_busy:
                        busy += [(time.monotonic() + POLL, job) for job in again]
                    else:
                        waiting.extend(again)
            else:
                time.sleep(POLL)
            waiting.extend(job for when, job in busy if when <= time.monotonic())
            busy = [(when, job) for when, job in busy if when > time.monotonic()]
            self.tell(launcher)

    def tell(self, launcher: Launcher | None = None) -> None:
        if self._report_progress is None:
            return
        running = launcher.progress() if launcher else {}
        done = len(self._done) + len(self._failed) + sum(part for part, _ in running.values())
        notes = []
        if self._tries:
            failed, path = len(self._failed), self._folder.path / "failures"
            notes = [f"{failed} failed, {len(self._tries) - failed} tried again, see {path}"]
        notes += [f"{name} {words} {part:.0%}" for name, (part, words) in sorted(running.items())[:3]]
        self._report_progress(done, len(self._cells), note=", ".join(notes))

    def _settle(self, ended: Ended) -> tuple[list[Job], bool]:
        """Returns what of a job is to be run again, and whether that is because another process is at it."""
        states = {outcome.state for outcome in ended.outcomes}
        for outcome in ended.outcomes:
            if outcome.state == "finished":
                self._done.add(outcome.address)
            elif outcome.state == "failed":
                self._fail(outcome)
        left = [a for a in ended.job.addresses if a not in self._done and a not in self._failed]
        if "failed" in states:
            # Alone: what one seed of several did, the others need not suffer for.
            return [job for job in ended.job.each() if set(job.addresses) & set(left)], False
        return ([ended.job] if left else []), bool(left)

    def _fail(self, outcome: Outcome) -> None:
        self._tries[outcome.address] += 1
        values = dataclasses.asdict(outcome) | {"tries": self._tries[outcome.address]}
        self._folder.write_failure(outcome.address, values | {"cell": self._cells[outcome.address].title})
        if self._tries[outcome.address] >= TRIES:
            self._failed[outcome.address] = outcome
