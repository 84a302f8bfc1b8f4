"""Where the positions of a sequence lie when several devices share it.

Under a causal mask the last of N contiguous parts has almost all of the work. So the sequence is cut into 2N chunks,
and device i holds chunks i and 2N-1-i: one that sees little and one that sees much, the same work on every device.
With N = 2 the order of the chunks is

    0 3 | 1 2

Each device's positions ascend, and all of its first chunk come before all of its second.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

Placement = Literal["zigzag", "contiguous"]


def chunk_order(num_devices: int, placement: Placement) -> Int[np.ndarray, "chunks"]:
    """Returns which chunk of the sequence stands where when the devices' parts are laid side by side."""
    if placement == "contiguous":
        return np.arange(num_devices)
    first = np.arange(num_devices)
    return np.stack([first, 2 * num_devices - 1 - first], axis=1).reshape(-1)


def placed(
    x: Shaped[Array, "B S *rest"], num_devices: int, placement: Placement
) -> Shaped[Array, "B S *rest"]:
    """Returns a whole sequence in the order in which equal parts of it are each one device's share.

    Raises:
      ValueError: If it does not divide.
    """
    return _reordered(x, chunk_order(num_devices, placement))


def unplaced(
    x: Shaped[Array, "B S *rest"], num_devices: int, placement: Placement
) -> Shaped[Array, "B S *rest"]:
    """Undoes `placed`."""
    return _reordered(x, np.argsort(chunk_order(num_devices, placement)))


def local_positions(
    num_local: int, axis_name: str, num_devices: int, placement: Placement
) -> Int[Array, "local"]:
    """Returns the positions in the whole sequence of what this device holds, inside `jax.shard_map`.

    Args:
      num_local: Positions of a device.
      axis_name: Of the mesh axis that the sequence is split over.
      num_devices: Along that axis.
      placement: Of the sequence.
    """
    chunks = chunk_order(num_devices, placement).reshape(num_devices, -1)
    chunk_size = num_local // chunks.shape[1]
    mine = jnp.asarray(chunks)[jax.lax.axis_index(axis_name)]
    return (mine[:, None] * chunk_size + jnp.arange(chunk_size)).reshape(-1)


def _reordered(x: Array, order: Int[np.ndarray, "chunks"]) -> Array:
    B, S, *rest = x.shape
    if S % len(order):
        raise ValueError(
            f"The sequence must be a multiple of the chunks that devices share; got {S} and {len(order)}. Pad it."
        )
    return x.reshape(B, len(order), S // len(order), *rest)[:, order].reshape(x.shape)
