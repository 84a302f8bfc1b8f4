"""Perceptrons as plain pytrees, for networks that are stacked, frozen, averaged and swapped within one state."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float


class Layer(NamedTuple):
    """A linear map; a pytree."""

    kernel: Float[jax.Array, "*stack I J"]
    bias: Float[jax.Array, "*stack J"]


Perceptron = tuple[Layer, ...]
"""Layers with ReLU between them."""


def init_perceptron(key: jax.Array, sizes: Sequence[int]) -> Perceptron:
    """Returns orthogonal kernels and biases of 0 for a perceptron with these widths, input and output included.

    Source: URLB's initialisation, Saxe et al. 2014 with gain 1.
    """
    orthogonal = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, len(sizes) - 1)
    return tuple(
        Layer(orthogonal(k, (i, j), jnp.float32), jnp.zeros(j))
        for k, (i, j) in zip(keys, itertools.pairwise(sizes), strict=True)
    )


def apply_perceptron(layers: Perceptron, x: Float[jax.Array, "*batch I"]) -> Float[jax.Array, "*batch J"]:
    """Returns the last layer's output, without an activation."""
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer.kernel + layer.bias)
    return x @ layers[-1].kernel + layers[-1].bias
