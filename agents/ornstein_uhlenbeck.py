"""Noise correlated in time: pushes long enough in one direction to move a body."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from bpt_rl.datasets.chains import Chain


class Carry(NamedTuple):
    """What the next draw depends on, beside the seed."""

    counter: int
    """Calls of `act` so far."""
    noise: Float[np.ndarray, "B A"]
    """State before the next step of the process, unclipped."""
    is_fresh: Bool[np.ndarray, "B"]
    """Where an episode begins, so that the state is drawn anew."""


class OrnsteinUhlenbeckPolicy:
    """Draws actions from an Ornstein-Uhlenbeck process in each action dimension; equal seeds, equal actions.

    In stationary form: x' = (1 - decay) x + sqrt(1 - (1 - decay)^2) scale e with e normal, so that every x
    has standard deviation `scale` whatever the decay, from the first action of an episode on. Actions are x
    clipped to [-1, 1]. A `bpt_rl.agents.base.Policy` that needs no JAX.

    Source: Uhlenbeck and Ornstein 1930; as exploration noise, Lillicrap et al. 2016, section 7.
    """

    def __init__(self, action_dim: int, seed: int, decay: float, scale: float) -> None:
        if not 0 < decay <= 1 or scale <= 0:
            raise ValueError(
                f"decay must lie in (0, 1] and scale be positive; got {decay} and {scale}. "
                "0.15 and 1 are usual."
            )
        self._action_dim = action_dim
        self._seed = seed
        self._kept = 1 - decay
        self._scale = scale

    def start(self, num_environments: int, context: Sequence[Chain] | None = None) -> Carry:
        """Returns the carry before the first observation of B environments; no context is read."""
        del context
        noise = np.zeros((num_environments, self._action_dim))
        return Carry(counter=0, noise=noise, is_fresh=np.ones(num_environments, np.bool_))

    def act(
        self, carry: Carry, observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[Carry, Float32[np.ndarray, "B A"]]:
        """Returns the next carry and B actions; observation and return_to_go are not read."""
        drawn = self._scale * np.random.default_rng([self._seed, carry.counter]).normal(
            size=carry.noise.shape
        )
        continued = self._kept * carry.noise + np.sqrt(1 - self._kept**2) * drawn
        noise = np.where(carry.is_fresh[:, None], drawn, continued)
        action = np.clip(noise, -1, 1).astype(np.float32)
        return Carry(counter=carry.counter + 1, noise=noise, is_fresh=np.zeros_like(carry.is_fresh)), action

    def observe(self, carry: Carry, reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]) -> Carry:
        """Returns the carry with the noise restarted where an episode ended."""
        return carry._replace(is_fresh=carry.is_fresh | done)
