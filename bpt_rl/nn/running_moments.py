"""Mean and variance of all values seen so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

FIRST_COUNT = 1e-4
"""What the moments before any value, mean 0 and variance 1, weigh against one value."""


class RunningMoments(NamedTuple):
    """Mean and variance of every batch so far, all values weighing the same; a pytree.

    Source: the parallel update of Chan et al. 1979 as URLB has it: the batch's variance is the unbiased one and weighs
    as many values as the batch has.
    """

    mean: Float[jax.Array, "*shape"]
    variance: Float[jax.Array, "*shape"]
    num_values: Float[jax.Array, ""]

    @classmethod
    def create(cls, shape: tuple[int, ...] = ()) -> "RunningMoments":
        """Returns the moments before any value: mean 0, variance 1."""
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.asarray(FIRST_COUNT, jnp.float32))

    def update(self, x: Float[jax.Array, "B *shape"]) -> "RunningMoments":
        """Returns the moments with B more values; a lone value has variance 0."""
        B = len(x)
        delta = x.mean(axis=0) - self.mean
        variance = x.var(axis=0) * (B / max(B - 1, 1))
        num_values = self.num_values + B
        # Not 1 minus the other: that would round to 0 at first.
        old_share, new_share = self.num_values / num_values, B / num_values
        return RunningMoments(
            self.mean + new_share * delta,
            old_share * self.variance + new_share * variance + old_share * new_share * jnp.square(delta),
            num_values,
        )
