"""A step that does not fit its device, as a sentence with the plan and ways out."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax

from bpt_rl.config import TrainConfig
from bpt_rl.run.devices import Device
from bpt_rl.run.plan import Level, Plan, Rows, plan_step, size
from bpt_rl.run.ways_out import ways_out

SIGNS = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "Out of memory")
"""What XLA's errors hold when memory ran out."""

FAR_BEYOND = 1.5
"""Times the memory there is: what is planned to take more is not begun, for plans are not that wrong."""

MARGIN = 0.9
"""Share of the memory that ways out may take by the plan, which was wrong once."""

TIGHT = 0.5
"""Share of an accelerator's memory: a step that takes more has no second place there. See `MemoryWatch.is_tight`."""


class OutOfMemoryError(MemoryError):
    """A training step does not fit its device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryWatch:
    """Turns what XLA raises when memory runs out into one error that says what to do."""

    config: TrainConfig
    """Of the run, `model.activations` resolved."""
    rows: Rows
    device: Device

    def refuse_what_is_far_beyond(self) -> None:
        """Refuses a run whose plan is far beyond the device: a processor out of memory kills without a word.

        Raises:
          OutOfMemoryError: If it is.
        """
        if not self._has_plan:
            return
        plan, level = self._planned
        if level.memory.device > FAR_BEYOND * self.device.memory:
            raise OutOfMemoryError(
                f"A training step must fit its device; by the plan one with activations {level.activations} takes "
                f"{size(level.memory.device)}, and {self.device.name} has {size(self.device.memory)}. "
                f"Ways out:{ways_out(plan, level, int(MARGIN * self.device.memory))}"
            )

    @property
    def is_tight(self) -> bool:
        """Whether nothing may take memory of the accelerator while a step runs.

        XLA allocates what a step needs as one block, and what is allocated meanwhile, like the next batch, right behind
        it. When the step is over it leaves a hole of just its size, whose beginning may go to the batch after that; the
        next step then needs another place.
        """
        if not self._has_plan or self.device.is_host:
            return False
        _, level = self._planned
        return level.memory.device > TIGHT * self.device.memory

    @property
    def _has_plan(self) -> bool:
        return self.config.agent != "bc" and self.config.model.implementation != "reference"

    @functools.cached_property
    def _planned(self) -> tuple[Plan, Level]:
        """The plan, and the level that the run is at.

        Raises:
          ValueError: If there is no plan.
        """
        plan = plan_step(self.config, self.rows, self.device)
        return plan, plan.level(self.config.model.activations) or plan.leanest

    @contextlib.contextmanager
    def over(self, stage: str) -> Iterator[None]:
        """Watches over a stage of the run, named like "in step 3".

        Raises:
          OutOfMemoryError: If memory runs out.
        """
        try:
            yield
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            is_known = isinstance(error, OutOfMemoryError)
            if is_known or not (isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)):
                raise
            raise OutOfMemoryError(self._explanation(stage, error)) from error

    def _explanation(self, stage: str, error: BaseException) -> str:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        asked = f"activations {self.config.model.activations}"
        try:
            plan, level = self._planned
        except ValueError as reason:
            return (
                f"A training step must fit its device; {self.device.name} with {size(self.device.memory)} ran "
                f"out of memory {stage} ({lines[0]}), and there is no plan: {reason} Ways out: (a) a smaller "
                "data.batch_size with more optimizer.accumulation. (b) a smaller data.num_trajectories. (c) a smaller "
                "model (model.embed_dim, model.num_layers). Checkpoints stay."
            )
        memory = int(MARGIN * min(level.memory.device, self.device.memory))
        host = f" and {size(level.memory.host)} of the host" if level.memory.host else ""
        return (
            f"A training step must fit its device; {self.device.name} with {size(self.device.memory)} ran out "
            f"of memory {stage} ({lines[0]}), with {asked}, which takes {size(level.memory.device)}{host} by "
            f"the plan. Ways out:{ways_out(plan, level, memory)} Checkpoints stay."
        )
