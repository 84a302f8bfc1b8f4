"""What every agent and every policy offers; the rest of the package knows no more of them."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float

from bpt_rl.config import FullContext
from bpt_rl.datasets.chains import Chain
from bpt_rl.datasets.transitions import TransitionBatch
from bpt_rl.types import PackedBatch, Transition

Params = Any
"""Pytree of float32 arrays."""


@runtime_checkable
class Policy(Protocol):
    """Acts in B environments at once; all state lives in the carry, and a carry is used once."""

    def start(self, num_environments: int, context: Sequence[Chain] | None = None) -> Any:
        """Returns the carry before the first observation of B environments.

        Args:
          num_environments: B.
          context: Trajectories of a dataset that each environment's context begins with: one chain for each, all of
            equally many; an unconditioned policy ignores them.

        Raises:
          ValueError: If a context does not fit the environments, or the policy cannot take any.
        """

    def act(
        self, carry: Any, observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[Any, Float[Any, "B A"]]:
        """Returns the next carry and actions in [-1, 1].

        A device may still be at work on the actions: whoever needs their numbers waits for them (`np.asarray`).

        Args:
          carry: From `start` or `observe`.
          observation: Raw observation_t of each environment.
          return_to_go: Return still asked of this episode, unscaled; an unconditioned policy ignores it.
        """

    def observe(self, carry: Any, reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]) -> Any:
        """Returns the carry after the reward of the last action; `done` where that step ended its episode."""


@runtime_checkable
class Agent(Protocol):
    """Parameters, loss and policy of one method; holds configuration only."""

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters."""

    def loss(
        self, params: Params, batch: PackedBatch, key: jax.Array
    ) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
        """Returns the mean loss over the steps that count and scalar metrics; `key` draws dropout."""

    def policy(
        self,
        params: Params,
        *,
        num_episodes: int = 1,
        clear_context: bool = False,
        full_context: FullContext = "refuse",
        sample_seed: int | None = None,
    ) -> Policy:
        """Returns a policy whose context holds `num_episodes` episodes.

        Args:
          params: From `init` or a checkpoint.
          num_episodes: Episodes that the context holds, beside the trajectories it starts with.
          clear_context: Forget, at each episode's end, all but the trajectories the context started with: the
            memoryless control.
          full_context: What happens to more: `refuse` them, or `drop_oldest`: forget the oldest whole trajectories,
            given or played, before an episode that might not fit. Nothing is ever cut silently.
          sample_seed: Draw actions from the Gaussian head with this seed; their mean if None.

        Raises:
          ValueError: If actions are to be drawn and the agent has no Gaussian head.
        """


@runtime_checkable
class OfflineLearner(Protocol):
    """A method that learns from single transitions; holds configuration only."""

    def init(self, key: jax.Array) -> Any:
        """Returns the state before the first update: a pytree of arrays that travels through `jit` and `lax.scan`."""

    def update(
        self, state: Any, batch: TransitionBatch, key: jax.Array
    ) -> tuple[Any, dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one gradient step of every network, and metrics; `key` draws noise and samples."""

    def policy(self, state: Any) -> Policy:
        """Returns the policy that takes the actor's mean."""


@runtime_checkable
class Explorer(Protocol):
    """An intrinsic reward, the networks behind it, and the skills that a policy may follow for it.

    It holds configuration only; what it learns lies in a state, a pytree of arrays that travels through `jit` and
    `lax.scan`. `bpt_rl.agents.ddpg` learns a policy from the reward; nothing of a task's reward is ever seen.
    """

    skill_dim: int
    """Z, entries of a skill that actor and critic read beside the observation; 0 for none."""
    skill_steps: int
    """Steps that a skill is followed for; 0 for a whole episode."""
    has_successor_features: bool
    """Whether the critic predicts Z successor features, whose product with the skill is the value (APS)."""

    def init(self, key: jax.Array) -> Any:
        """Returns the state before the first update."""

    def draw_skills(self, state: Any, key: jax.Array, num_skills: int) -> Float[jax.Array, "N Z"]:
        """Returns skills to follow, one a row; Z may be 0."""

    def update(
        self, state: Any, batch: Transition, key: jax.Array
    ) -> tuple[Any, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one gradient step of its own networks, the batch's intrinsic rewards, and metrics."""
