"""Uniform-random actions: the explorer and control without any knowledge."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from bpt_rl.datasets.chains import Chain


class Carry(NamedTuple):
    """What the next draw depends on, beside the seed."""

    counter: int
    """Calls of `act` so far."""
    num_environments: int


class RandomPolicy:
    """Draws every action uniformly from [-1, 1]; equal seeds give equal actions.

    A `bpt_rl.agents.base.Policy` that needs no JAX.
    """

    def __init__(self, action_dim: int, seed: int) -> None:
        self._action_dim = action_dim
        self._seed = seed

    def start(self, num_environments: int, context: Sequence[Chain] | None = None) -> Carry:
        """Returns the carry before the first observation of B environments; no context is read."""
        del context
        return Carry(counter=0, num_environments=num_environments)

    def act(
        self, carry: Carry, observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[Carry, Float32[np.ndarray, "B A"]]:
        """Returns the next carry and B actions; observation and return_to_go are not read."""
        generator = np.random.default_rng([self._seed, carry.counter])
        action = generator.uniform(-1, 1, (carry.num_environments, self._action_dim)).astype(np.float32)
        return carry._replace(counter=carry.counter + 1), action

    def observe(self, carry: Carry, reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]) -> Carry:
        """Returns the carry unchanged: no action depends on the past."""
        return carry
