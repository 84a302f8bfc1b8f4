"""Dealing out the steps of rows among the devices of the context axis, inside `jax.shard_map`.

Steps come in equal contiguous parts, which is how a batch lies, and leave in the parts that attention wants. Each step
goes straight to where it belongs: no device ever has a whole row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from bpt_rl.config import Layout
from bpt_rl.nn.context_parallel import ContextAxis
from bpt_rl.nn.trajectory_model import Outcomes, previous_outcomes
from bpt_rl.types import LAYOUTS, PackedBatch


def dealt(tree: Any, axis: ContextAxis) -> Any:
    """Returns this device's share of arrays [B, T, ...] as the axis places them (`bpt_rl.nn.zigzag`).

    Args:
      tree: Its contiguous part of them, all of 32 bits; zigzag, an even number of steps.
      axis: That rows are split over.
    """
    if axis.placement == "contiguous":
        return tree
    words = _as_words(tree)
    N, half = axis.num_devices, words.shape[1] // 2

    def owner(chunk: int) -> int:
        return chunk if chunk < N else 2 * N - 1 - chunk

    # Device i came with chunks 2i and 2i+1; i and 2N-1-i are its own, of which one is even and one odd.
    even, odd = (
        jax.lax.ppermute(part, axis.name, [(i, owner(2 * i + number)) for i in range(N)])
        for number, part in enumerate((words[:, :half], words[:, half:]))
    )
    is_even = jax.lax.axis_index(axis.name) % 2 == 0
    first, second = jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)
    return _from_words(jnp.concatenate([first, second], axis=1), tree)


def dealt_with_previous(
    batch: PackedBatch, axis: ContextAxis | None, layout: Layout
) -> tuple[PackedBatch, Outcomes | None]:
    """Returns this device's share of a batch as the axis places it, and what came before each of its steps.

    What a fused token carries of the step before it is looked up before steps are dealt out; tokens of other layouts
    carry none, and get None.

    Args:
      batch: This device's contiguous part.
      axis: That rows are split over; whole rows if None.
      layout: Of the tokens.
    """
    previous = None
    if LAYOUTS[layout] == 1:
        outcomes = previous_outcomes(with_step_before(batch, axis))
        previous = jax.tree.map(lambda leaf: leaf[:, 1:], outcomes)
    found: tuple[PackedBatch, Outcomes | None] = dealt((batch, previous), axis) if axis else (batch, previous)
    return found


def with_step_before(batch: PackedBatch, axis: ContextAxis | None) -> PackedBatch:
    """Returns the batch with one step more in front: the last of the part before this one, zeros before the first.

    Args:
      batch: This device's contiguous part.
      axis: That rows are split over; whole rows if None.
    """
    last = jax.tree.map(lambda leaf: leaf[:, -1:], batch)
    if axis is None:
        before = jax.tree.map(jnp.zeros_like, last)
    else:
        hops = [(i, i + 1) for i in range(axis.num_devices - 1)]
        before = _from_words(jax.lax.ppermute(_as_words(last), axis.name, hops), last)
    joined: PackedBatch = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), before, batch)
    return joined


def _as_words(tree: Any) -> Int[Array, "B T words"]:
    """Returns all arrays side by side, bit for bit, so that they travel as one."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    flat = [leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves]
    return jnp.concatenate([jax.lax.bitcast_convert_type(leaf, jnp.int32) for leaf in flat], axis=2)


def _from_words(words: Int[Array, "B T words"], like: Any) -> Any:
    """Undoes `_as_words`."""
    leaves, structure = jax.tree.flatten(like)
    found, end = [], 0
    for leaf in leaves:
        begin, end = end, end + leaf[0, 0].size
        values = jax.lax.bitcast_convert_type(words[..., begin:end], leaf.dtype)
        found.append(values.reshape(*words.shape[:2], *leaf.shape[2:]))
    return jax.tree.unflatten(structure, found)
