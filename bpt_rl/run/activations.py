"""What `model.activations = "auto"` stands for in one run: the fastest level whose plan fits."""

import dataclasses
from collections.abc import Collection

from bpt_rl.config import Activations, TrainConfig
from bpt_rl.run.devices import Device, this_device
from bpt_rl.run.plan import Level, Plan, Rows, plan_step, size

UNPLANNED: Activations = "recompute"
"""Taken where no plan can be made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What layers keep, and why that."""

    activations: Activations
    """Any but auto."""
    reason: str

    def __str__(self) -> str:
        return f"{self.activations}, {self.reason}"

    def applied(self, config: TrainConfig) -> TrainConfig:
        """Returns the configuration with the choice made."""
        model = dataclasses.replace(config.model, activations=self.activations)
        return dataclasses.replace(config, model=model)


def choose_activations(
    config: TrainConfig,
    rows: Rows,
    *,
    device: Device | None = None,
    recorded: Activations | None = None,
    exhausted: Collection[Activations] = (),
) -> Choice:
    """Returns what the layers of a run keep: what is asked for, or what `auto` stands for.

    Args:
      config: Of the run.
      rows: Of a micro-batch.
      device: Where it is to run, as for `bpt_rl.run.plan.plan_step`; the first of this machine if None.
      recorded: What the run began with. Another level would round otherwise, and a run so ends with the same bits
        whatever device it goes on with.
      exhausted: What memory ran out with in this run: `auto` then stands for what is planned to need less, and no
        longer for what the run began with.

    Raises:
      ValueError: If cudnn attention is asked for and cannot run.
    """
    asked = config.model.activations
    if config.agent == "bc":
        return Choice(activations=UNPLANNED, reason="of no meaning to an agent without a transformer")
    if asked != "auto":
        return Choice(activations=asked, reason="asked for")
    if recorded and recorded not in exhausted:
        return Choice(activations=recorded, reason="as the run began")
    if config.model.implementation == "reference":
        return Choice(activations=UNPLANNED, reason="since reference attention is not planned")
    plan = plan_step(config, rows, device or this_device().one_of(config.mesh.num_devices))
    if not exhausted:
        return _fastest(plan)
    ran_out = f"; memory ran out with {', '.join(exhausted)}"
    beyond = [level.memory.device for level in plan.levels if level.activations in exhausted]
    leaner = tuple(level for level in plan.levels if all(level.memory.device < taken for taken in beyond))
    if not leaner:
        return Choice(activations=plan.leanest.activations, reason=f"since nothing needs less{ran_out}")
    choice = _fastest(dataclasses.replace(plan, levels=leaner))
    return dataclasses.replace(choice, reason=choice.reason + ran_out)


def _fastest(plan: Plan) -> Choice:
    level = plan.choice or plan.leanest
    reason = f"{size(level.memory.device)} of {size(plan.device.memory)}{_of_host(level)} planned"
    if not plan.choice:
        return Choice(activations=level.activations, reason=reason + ": by the plan it may not fit")
    faster = plan.levels[: plan.levels.index(level)]
    if faster:
        need = f"{size(faster[-1].memory.device)}{_of_host(faster[-1])}"
        reason += f"; {faster[-1].activations} would need {need}"
    return Choice(activations=level.activations, reason=reason)


def _of_host(level: Level) -> str:
    return f" and {size(level.memory.host)} of the host" if level.memory.host else ""
