"""What the cells of a grid should take, by the plan of their training step."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

from bpt_rl import config_toml
from bpt_rl.ablate_config import GridConfig
from bpt_rl.config import PlanConfig, TrainConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.run.grid import Cell, trainings
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.job import Job
from bpt_rl.run.plan import make_plan, size
from bpt_rl.td_config import TD_AGENTS

PROCESS = int(1.5 * GIB)
"""Bytes of a process that has loaded everything, beside its training step."""
UNPLANNED = 2 * GIB
"""Bytes that are left for a step that there is no plan of."""


@dataclasses.dataclass(frozen=True)
class Expectation:
    """Of one training."""

    memory: int | None
    """Bytes of the device; None if the step cannot be planned."""
    seconds: float | None
    """Of all its gradient steps; None if no rates were measured."""
    reason: str = ""
    """Why memory or seconds are not known."""


def expect(train: TrainConfig, device: Literal["h100", "this"] = "this") -> Expectation:
    """Returns what a training should take of a device; whatever the seed, it is worked out once."""
    return _expect(dataclasses.replace(train, seed=0, run=""), device)


@functools.cache
def _expect(train: TrainConfig, device: Literal["h100", "this"]) -> Expectation:
    if train.agent in TD_AGENTS or train.agent == "bc":
        return Expectation(None, None, f"not planned: {train.agent} is no transformer")
    fields = {field.name: getattr(train, field.name) for field in dataclasses.fields(train)}
    try:
        plan = make_plan(PlanConfig(**fields, device=device))
    except ValueError as error:
        return Expectation(None, None, f"not planned: {error}")
    if plan.choice is None:
        return Expectation(plan.leanest.memory.device, None, f"does not fit {plan.device.name}")
    seconds = plan.choice.seconds
    return Expectation(
        plan.choice.memory.device,
        None if seconds is None else seconds * train.optimizer.num_steps,
        plan.reason_without_seconds,
    )


def largest_memory(jobs: Sequence[Job]) -> int:
    """Returns bytes of the host that a process without an accelerator needs for any of some jobs."""
    steps = []
    for job in jobs:
        config = config_toml.from_mapping(TrainConfig, job.trainings[0]["config"])
        steps.append((expect(config).memory or UNPLANNED) * len(job.trainings))
    return PROCESS + max(steps)


def describe_cells(config: GridConfig, cells: Sequence[Cell]) -> str:
    """Returns what `bpt-rl ablate --dry-run` prints."""
    folder = GridFolder.of(config)
    done = folder.finished()
    rows = [("cell", "state", "step memory", "training")]
    missing: list[Expectation] = []
    reasons: dict[str, None] = {}
    for group in trainings(cells).values():
        found = expect(group[0].train)
        memory = "-" if found.memory is None else size(found.memory)
        time = "-" if found.seconds is None else duration(found.seconds)
        reasons |= {found.reason: None} if found.reason else {}
        rows += [(cell.title, _state(cell, folder, done), memory, time) for cell in group]
        if any(cell.address not in done for cell in group):
            missing.append(found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows]
    left = sum(cell.address not in done for cell in cells)
    seconds = [found.seconds for found in missing if found.seconds is not None]
    total = (
        f" At the rates of the kernels their gradient steps take {duration(sum(seconds))}." if seconds else ""
    )
    return "\n".join(
        [
            *(line.rstrip() for line in table),
            "",
            f"{len(cells)} cells of {len(trainings(cells))} trainings; {left} are missing in {folder.path}.{total}",
            *(f"- {reason}" for reason in reasons),
        ]
    )


def duration(seconds: float) -> str:
    """Returns a time for people, like 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.2g} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _state(cell: Cell, folder: GridFolder, done: set[str]) -> str:
    if cell.address in done:
        return "finished"
    return "failed" if folder.failure(cell.address) else "missing"
