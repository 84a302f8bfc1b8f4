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

    Which rows are nearest is read off a matrix product, whose rounding, 1e-7 of the squared spread of `y`, may swap two
    that are about as near. Their distances are those of differences, to the last digit: a row of `y` is at 0 of itself.
    """
    centre = y.mean(axis=0)
    a, b = x - centre, y - centre
    # An accelerator's default would round the operands to 10 bits.
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    _, nearest = jax.lax.top_k(2 * products - jnp.square(b).sum(axis=-1), num_neighbours)
    return jnp.sort(jnp.sqrt(jnp.square(x[:, None] - y[nearest]).sum(axis=-1)), axis=-1)
