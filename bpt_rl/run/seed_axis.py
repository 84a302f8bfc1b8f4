"""Several seeds in one program: their arrays stacked on a leading axis, which is the first of every leaf.

One seed has no such axis: what is compiled for it is what it would be if there were no others.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def stacked(trees: Sequence[Any]) -> Any:
    """Returns pytrees of one structure as one, leaves stacked; a single pytree as it is. Runs within `jit` too."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def split(tree: Any, num_seeds: int) -> list[Any]:
    """Returns the pytrees that `stacked` was given."""
    if num_seeds == 1:
        return [tree]
    return [jax.tree.map(lambda leaf, seed=seed: leaf[seed], tree) for seed in range(num_seeds)]


def over_seeds(function: Callable[..., Any], num_seeds: int) -> Callable[..., Any]:
    """Returns the function of stacked arguments that is this function of each seed's; what it closes over is shared."""
    return function if num_seeds == 1 else jax.vmap(function)


def shapes_over_seeds(shapes: Any, num_seeds: int) -> Any:
    """Returns the shapes of so many pytrees stacked, given those of one; each leaf stays in its place."""
    if num_seeds == 1:
        return shapes
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((num_seeds, *leaf.shape), leaf.dtype, sharding=leaf.sharding),
        shapes,
    )


def numbers(metrics: Mapping[str, jax.Array], num_seeds: int) -> list[dict[str, float]]:
    """Returns each seed's metrics, once they are known."""
    return [
        {name: float(value) for name, value in own.items()}
        for own in split(jax.device_get(metrics), num_seeds)
    ]
