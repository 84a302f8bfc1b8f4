"""The newest steps of environments in lockstep, kept on the device, to draw n-step transitions from."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bpt_rl.types import Transition


class ReplayState(NamedTuple):
    """A ring of rows, one a step of all N environments; a pytree."""

    observation: Float[jax.Array, "slots N O"]
    action: Float[jax.Array, "slots N A"]
    """Follows the observation of its row; unused where an episode ends."""
    skill: Float[jax.Array, "slots N Z"]
    """That the action followed."""
    num_rows: Int[jax.Array, ""]
    """Rows written so far, the overwritten ones too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """Index arithmetic of the ring; holds sizes only.

    Every episode has T steps and all environments begin theirs together, so that row g, counted from the first ever
    written, belongs to step g mod (T + 1) of episode g div (T + 1) of each environment: an episode fills T + 1 rows,
    and the last holds only its terminal observation. A transition may begin wherever its n-step successor lies in the
    same episode and has been written, and its own row has not been overwritten.

        T = 3, n = 2:  row  0 1 2 3 | 4 5 6 7 |    may begin at 0 and 1, then 4 and 5
                       step 0 1 2 3 | 0 1 2 3 |
    """

    num_slots: int
    num_environments: int
    episode_steps: int
    """T."""
    num_step_return: int
    """n."""
    discount: float
    """A step."""

    def __post_init__(self) -> None:
        # With n rows of one episode and n of the next no transition fits.
        if not 1 <= self.num_step_return <= min(self.episode_steps, (self.num_slots - 1) // 2):
            raise ValueError(
                "num_step_return must be at least 1, at most the steps of an episode, and below half of the steps of "
                f"each environment that are kept; got {self.num_step_return}, {self.episode_steps} and "
                f"{self.num_slots}. Use fewer steps, or raise replay_steps."
            )

    def init(self, observation_dim: int, action_dim: int, skill_dim: int) -> ReplayState:
        """Returns the empty ring."""
        shape = (self.num_slots, self.num_environments)
        return ReplayState(
            observation=jnp.zeros((*shape, observation_dim)),
            action=jnp.zeros((*shape, action_dim)),
            skill=jnp.zeros((*shape, skill_dim)),
            num_rows=jnp.zeros((), jnp.int32),
        )

    def add(
        self,
        state: ReplayState,
        observation: Float[jax.Array, "N O"],
        action: Float[jax.Array, "N A"],
        skill: Float[jax.Array, "N Z"],
    ) -> ReplayState:
        """Returns the ring with one more row, in the place of the oldest."""
        slot = state.num_rows % self.num_slots
        return ReplayState(
            observation=state.observation.at[slot].set(observation),
            action=state.action.at[slot].set(action),
            skill=state.skill.at[slot].set(skill),
            num_rows=state.num_rows + 1,
        )

    def sample(self, state: ReplayState, key: jax.Array, batch_size: int) -> Transition:
        """Returns transitions drawn uniformly, with replacement, from all that there are; there must be one."""
        row_key, environment_key = jax.random.split(key)
        oldest = jnp.maximum(state.num_rows - self.num_slots, 0)
        first = self._num_starts_before(oldest)
        end = self._num_starts_before(state.num_rows - self.num_step_return)
        start = jax.random.randint(row_key, (batch_size,), first, end)
        row = start // self._starts * (self.episode_steps + 1) + start % self._starts
        environment = jax.random.randint(environment_key, (batch_size,), 0, self.num_environments)
        slot, successor = row % self.num_slots, (row + self.num_step_return) % self.num_slots
        return Transition(
            observation=state.observation[slot, environment],
            action=state.action[slot, environment],
            discount=jnp.full(batch_size, self.discount**self.num_step_return),
            next_observation=state.observation[successor, environment],
            skill=state.skill[slot, environment],
        )

    @property
    def _starts(self) -> int:
        """Rows of an episode that a transition may begin at."""
        return self.episode_steps - self.num_step_return + 1

    def _num_starts_before(self, row: Int[jax.Array, ""]) -> Int[jax.Array, ""]:
        rows = self.episode_steps + 1
        return row // rows * self._starts + jnp.minimum(row % rows, self._starts)
