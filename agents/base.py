"""What every agent and every policy offers; the rest of the package knows no more of them."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float

from bpt_rl.types import PackedBatch

Params = Any
"""Pytree of float32 arrays."""


@runtime_checkable
class Policy(Protocol):
    """Acts in B environments at once; all state lives in the carry, which is never changed in place."""

    def start(self, num_environments: int) -> Any:
        """Returns the carry before the first observation of B environments."""

    def act(
        self, carry: Any, observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[Any, Float[np.ndarray, "B A"]]:
        """Returns the next carry and actions in [-1, 1].

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
        sample_seed: int | None = None,
    ) -> Policy:
        """Returns a policy whose context holds `num_episodes` episodes.

        Args:
          params: From `init` or a checkpoint.
          num_episodes: Episodes of a chain. More than these are refused, never silently cut.
          clear_context: Forget everything at each episode's end: the memoryless control.
          sample_seed: Draw actions from the Gaussian head with this seed; their mean if None.

        Raises:
          ValueError: If actions are to be drawn and the agent has no Gaussian head.
        """
