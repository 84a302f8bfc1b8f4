"""Acting with a network that sees the present observation and nothing else."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float

from bpt_rl.datasets.chains import Chain
from bpt_rl.nn.actor_critic import Params


class ActorPolicy:
    """A `bpt_rl.agents.base.Policy` without noise; the carry is empty."""

    def __init__(self, mean: Callable[[Params, jax.Array], jax.Array], actor: Params) -> None:
        """Compiles at the first call.

        Args:
          mean: Returns actions in [-1, 1] of parameters and observations; a function of a module, so that it is
            compiled once for all policies.
          actor: Its parameters.
        """
        self._mean = mean
        self._actor = actor

    def start(
        self, num_environments: int, context: Sequence[Chain] | None = None, *, first_environment: int = 0
    ) -> tuple[()]:
        """Returns the empty carry; no context is read."""
        del num_environments, context, first_environment
        return ()

    def act(
        self, carry: tuple[()], observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[tuple[()], Float[np.ndarray, "B A"]]:
        """Returns the actor's mean actions; return_to_go is not read."""
        del return_to_go
        return carry, np.asarray(_act(self._mean, self._actor, np.asarray(observation, np.float32)))

    def observe(
        self, carry: tuple[()], reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]
    ) -> tuple[()]:
        """Returns the empty carry."""
        del reward, done
        return carry


@functools.partial(jax.jit, static_argnums=0)
def _act(
    mean: Callable[[Params, jax.Array], jax.Array], actor: Params, observation: Float[jax.Array, "B O"]
) -> Float[jax.Array, "B A"]:
    return mean(actor, observation)
