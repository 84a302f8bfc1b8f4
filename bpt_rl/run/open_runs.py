"""Runs that are being trained: their folders, checkpoints and logs, and which of them go on together."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpt_rl.config import TrainConfig
from bpt_rl.run import records
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.continuation import check_continuation, write_description
from bpt_rl.run.loggers import Log, open_loggers
from bpt_rl.run.processes import agreed, is_first

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, steps in all and the last metrics, of several seeds their means."""
Announce = Callable[[str], None]
"""Called with a line to show before training begins."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenRun:
    """One seed's run."""

    config: TrainConfig
    saved: Checkpoints
    log: Log
    """Takes a line of metrics."""

    @property
    def start(self) -> int:
        """Gradient steps done by its newest checkpoint."""
        return self.saved.latest_step or 0

    @property
    def last_good(self) -> str:
        """Where to go on from after a bad step, for people."""
        return f"step {self.saved.latest_step or 'none'} in {self.folder.checkpoints_path}"

    @property
    def folder(self) -> records.RunFolder:
        """Where it is kept."""
        return records.RunFolder(Path(self.config.run))

    def first_bad(self, values: Mapping[str, float]) -> str:
        """Returns name and value of a metric that is not finite, and whose it is; nothing if all are."""
        bad = (f"{name} {value}" for name, value in values.items() if not np.isfinite(value))
        found = next(bad, "")
        return found and f"{found} with seed {self.config.seed}"


def open_runs(
    stack: contextlib.ExitStack,
    configs: Sequence[TrainConfig],
    statistics: Any,
    facts: Mapping[str, Any],
) -> list[OpenRun]:
    """Returns the runs of these configurations, each folder with its description, open until the stack closes.

    Of several processes the first alone writes descriptions and metrics.

    Args:
      stack: Closes them.
      configs: They differ in seed and run alone.
      statistics: `DataStatistics` of the data.
      facts: Written beside the versions.

    Raises:
      ValueError: If a folder holds a run that began otherwise; nothing is written then.
    """
    opened = [
        stack.enter_context(
            Checkpoints(records.RunFolder(Path(config.run)).checkpoints_path, config.keep_checkpoints)
        )
        for config in configs
    ]
    with agreed():
        for config, saved in zip(configs, opened, strict=True):
            folder = records.RunFolder(Path(config.run))
            check_continuation(config, folder, statistics.digest, saved.latest_step)
    facts = {**facts, "seeds_at_once": [config.seed for config in configs]}
    runs = []
    for config, saved in zip(configs, opened, strict=True):
        folder = records.RunFolder(Path(config.run))
        log: Log = _nothing
        if is_first():
            write_description(config, folder, dataclasses.asdict(statistics), saved.latest_step or 0, facts)
            log = stack.enter_context(open_loggers(config, folder))
        runs.append(OpenRun(config=config, saved=saved, log=log))
    return runs


def _nothing(line: Mapping[str, float]) -> None:
    """Takes a line of metrics that another process writes."""


def legs(runs: Sequence[OpenRun], num_steps: int) -> Iterator[tuple[list[OpenRun], int, int]]:
    """Yields runs that go on together, their common first step and the step up to which they do.

    Those that are furthest behind come first, until they are where the next ones are: an interruption between two
    seeds' checkpoints costs the steps between, and all are together again.
    """
    while (start := min(run.start for run in runs)) < num_steps:
        stop = min([run.start for run in runs if run.start > start] + [num_steps])
        yield [run for run in runs if run.start == start], start, stop


def means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the means of several seeds' metrics."""
    return {name: float(np.mean([each[name] for each in values])) for name in values[0]}
