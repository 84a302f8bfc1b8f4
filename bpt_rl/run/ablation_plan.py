"""What the cells of a grid should take, by the plan of their training step."""

import dataclasses
import functools
from collections.abc import Sequence

from bpt_rl import config_toml
from bpt_rl.ablate_config import AblateConfig, GridConfig
from bpt_rl.config import PlanConfig, TrainConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.run.ablation_groups import cell_title
from bpt_rl.run.devices import Device, this_device
from bpt_rl.run.grid import Cell, trainings
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.job import Job
from bpt_rl.run.plan import plan_step, rows_of_task, size
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


def expect(train: TrainConfig, device: Device) -> Expectation:
    """Returns what a training should take of a device; whatever the seed, it is worked out once."""
    return _expect(dataclasses.replace(train, seed=0, run=""), device)


@functools.cache
def _expect(train: TrainConfig, device: Device) -> Expectation:
    if train.agent in TD_AGENTS or train.agent == "bc":
        return Expectation(None, None, f"not planned: {train.agent} is no transformer")
    fields = {field.name: getattr(train, field.name) for field in dataclasses.fields(train)}
    try:
        rows = rows_of_task(PlanConfig(**fields))
        plan = plan_step(train, rows, device.one_of(train.mesh.num_devices))
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
    steps, device = [], this_device()
    for job in jobs:
        config = config_toml.from_mapping(TrainConfig, job.trainings[0]["config"])
        steps.append((expect(config, device).memory or UNPLANNED) * len(job.trainings))
    return PROCESS + max(steps)


def device_of(config: AblateConfig) -> Device:
    """Returns what a cell has of this machine's device: its share, where several of a grid run on one at once."""
    device = this_device()
    return device if device.is_host else device.share(_num_sharing(config))


def _num_sharing(config: AblateConfig) -> int:
    if config.launcher == "local":
        return config.workers_per_device
    return int(1 / config.ray_gpus) if 0 < config.ray_gpus < 1 else 1


def describe_cells(config: GridConfig, cells: Sequence[Cell], device: Device) -> str:
    """Returns what `bpt-rl ablate --dry-run` prints.

    Args:
      config: The grid.
      cells: Its cells.
      device: What a cell has of one.
    """
    folder = GridFolder.of(config)
    done = folder.finished()
    rows = [("cell", "state", "step memory", "training")]
    left: list[float | None] = []
    reasons: dict[str, None] = {}
    for group in trainings(cells).values():
        found = expect(group[0].train, device)
        memory = "-" if found.memory is None else size(found.memory)
        time = "-" if found.seconds is None else duration(found.seconds)
        reasons |= {found.reason: None} if found.reason else {}
        rows += [(cell_title(config, cell), _state(cell, folder, done), memory, time) for cell in group]
        part = _part_left(group[0].train, folder)
        if part and any(cell.address not in done for cell in group):
            left.append(None if found.seconds is None else part * found.seconds)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows]
    num_missing = sum(cell.address not in done for cell in cells)
    if config.seeds_at_once > 1:
        reasons[f"memory is that of one seed; up to {config.seeds_at_once} are trained at once"] = None
    return "\n".join(
        [
            *(line.rstrip() for line in table),
            "",
            f"{len(cells)} cells of {len(trainings(cells))} trainings; {num_missing} are missing in {folder.path}.",
            *_time_left(left),
            f"Planned for a cell with {size(device.memory)} of {device.name}.",
            *(f"- {reason}" for reason in reasons),
        ]
    )


def _time_left(trainings_left: Sequence[float | None]) -> list[str]:
    """Returns a sentence about the seconds of trainings, None where they are not known; none if nothing is known."""
    known = [seconds for seconds in trainings_left if seconds is not None]
    if not known:
        return []
    some = "" if len(known) == len(trainings_left) else f" of {len(known)} of {len(trainings_left)} trainings"
    return [
        f"At the rates of the kernels the gradient steps that are left{some} take {duration(sum(known))} of a device; "
        "compiling, loading and evaluating come on top."
    ]


def _part_left(train: TrainConfig, folder: GridFolder) -> float:
    """Returns the part of a training's gradient steps that is behind no checkpoint."""
    num_steps = train.td.num_updates if train.agent in TD_AGENTS else train.optimizer.num_steps
    checkpoints = folder.run_folder(train.run).checkpoints_path
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    return 1 - min(1.0, max(steps, default=0) / num_steps)


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
