"""Lengths and distances of vectors, with gradients where a length is 0."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float


def lengths(x: Float[jax.Array, "*batch D"]) -> Float[jax.Array, "*batch"]:
    """Returns the Euclidean length of each vector; the gradient of length 0 is 0."""
    return jnp.asarray(optax.safe_norm(x, 0.0, axis=-1))


def unit_vectors(x: Float[jax.Array, "*batch D"]) -> Float[jax.Array, "*batch D"]:
    """Returns the vectors divided by their lengths; those shorter than 1e-12 by 1e-12."""
    return x / jnp.maximum(lengths(x), 1e-12)[..., None]


def nearest_distances(
    x: Float[jax.Array, "B D"], y: Float[jax.Array, "M D"], num_neighbours: int
) -> Float[jax.Array, "B K"]:
    """Returns each row's distances to the `num_neighbours` nearest rows of `y`, ascending; not to be differentiated.

    Differences are squared, not products subtracted: nearest neighbours are where that would leave rounding only.
    """
    squared = jnp.square(x[:, None] - y[None]).sum(axis=-1)
    return jnp.sqrt(-jax.lax.top_k(-squared, num_neighbours)[0])
