"""Attention over a sequence that devices share, for use inside `jax.shard_map`: two ways, one signature."""

import dataclasses
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bpt_rl.config import Implementation
from bpt_rl.nn import cudnn_block
from bpt_rl.nn.attention import chosen_implementation, cudnn_obstacle, dot_product_attention
from bpt_rl.nn.blockwise import ChunkSizes
from bpt_rl.nn.ring_attention import Ring, ring_attention
from bpt_rl.nn.zigzag import Placement, local_positions

Method = Literal["ring", "ulysses"]

HIDING_TOKENS = 4096
"""Tokens of a device from which on attending to a part of the keys takes longer than the next part's way here: as
many take as long for either on H100s, by the rates in `bpt_rl.run.devices`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextAxis:
    """The mesh axis that sequences are split over, and how attention crosses it."""

    name: str
    num_devices: int
    method: Method

    @property
    def placement(self) -> Placement:
        """How the sequence must lie. Whoever has it whole needs no balance, and would have to undo one."""
        return "zigzag" if self.method == "ring" else "contiguous"

    @property
    def num_chunks(self) -> int:
        """What the length of a sequence must be a multiple of."""
        return 2 * self.num_devices if self.placement == "zigzag" else self.num_devices

    def positions(self, num_local: int) -> Int[Array, "local"]:
        """Returns the positions in the whole sequence of the `num_local` tokens of this device."""
        return local_positions(num_local, self.name, self.num_devices, self.placement)


def context_attention(
    query: Float[Array, "B S_local H K"],
    key: Float[Array, "B S_local H_kv K"],
    value: Float[Array, "B S_local H_kv K"],
    segment_ids: Int[Array, "B S_local"] | None,
    axis: ContextAxis,
    *,
    implementation: Implementation = "auto",
    is_causal: bool = True,
    query_chunk_size: int = 512,
    key_chunk_size: int = 512,
) -> Float[Array, "B S_local H K"]:
    """Returns what this device's queries find in the whole sequence, as `dot_product_attention` would.

    To be called inside `jax.shard_map(..., check_vma=False)`: its loops begin from constants.

    Args:
      query: This device's share, placed as the axis says (`bpt_rl.nn.zigzag.placed`).
      key: Its share of the keys.
      value: Same shape as `key`.
      segment_ids: Its share of them.
      axis: ring: keys and values go around. ulysses: each device gets the whole sequence of its share of the heads.
      implementation: As for `dot_product_attention`; a ring has no reference.
      is_causal: Likewise.
      query_chunk_size: Likewise.
      key_chunk_size: Likewise.

    Raises:
      ValueError: If the heads do not divide among the devices, or the implementation is not to be had.
    """
    if axis.method == "ring":
        sizes = ChunkSizes(query_chunk_size, key_chunk_size)
        kernel = _ring_implementation(implementation, query, segment_ids is not None)
        ring = Ring(axis.name, axis.num_devices, axis.placement, is_causal, sizes, kernel)
        return ring_attention(query, key, value, segment_ids, ring)
    repeats = key_repeats(query.shape[2], key.shape[2], axis.num_devices)
    if repeats > 1:
        key, value = (jnp.repeat(array, repeats, axis=2) for array in (key, value))
    attended = dot_product_attention(
        *_by_heads((query, key, value), axis),
        implementation=implementation,
        is_causal=is_causal,
        segment_ids=None
        if segment_ids is None
        else jax.lax.all_gather(segment_ids, axis.name, axis=1, tiled=True),
        query_chunk_size=query_chunk_size,
        key_chunk_size=key_chunk_size,
    )
    return _by_tokens(attended, axis)


def _ring_implementation(
    asked: Implementation, query: Array, has_segments: bool
) -> Literal["blockwise", "cudnn"]:
    """Returns what attends to the keys that a device holds."""
    unmet = cudnn_obstacle(
        device_kind=jax.devices()[0].device_kind,
        dtype=query.dtype,
        head_dim=query.shape[3],
        has_segments=has_segments,
    )
    chosen = chosen_implementation(asked, unmet or cudnn_block.obstacle())
    if chosen not in ("blockwise", "cudnn"):
        raise ValueError(
            f"Attention around a ring must be auto, blockwise or cudnn; got implementation {asked!r}. Use 'auto', or "
            "ulysses."
        )
    return "cudnn" if chosen == "cudnn" else "blockwise"


def _by_heads(arrays: tuple[Array, ...], axis: ContextAxis) -> list[Array]:
    """Returns of each array [B, S_local, H, K] all tokens of this device's share of its heads, sent as one array.

    One of many at a time is all that XLA hides, and few large ones travel faster. The axis of devices goes first before
    they are sent, for else XLA would do that to each.
    """
    B, S, _, K = arrays[0].shape
    N = axis.num_devices
    shares = [array.reshape(B, S, N, -1, K) for array in arrays]
    arriving = jax.lax.all_to_all(jnp.moveaxis(jnp.concatenate(shares, 3), 2, 0), axis.name, 0, 0)
    whole = jnp.moveaxis(arriving, 0, 1).reshape(B, N * S, -1, K)
    counts = [share.shape[3] for share in shares]
    return jnp.split(whole, list(itertools.accumulate(counts))[:-1], axis=2)


def _by_tokens(attended: Array, axis: ContextAxis) -> Array:
    """Returns all heads of this device's tokens, of all tokens [B, S, H_local, K] of its heads."""
    B, S, H, K = attended.shape
    N = axis.num_devices
    arriving = jax.lax.all_to_all(
        jnp.moveaxis(attended.reshape(B, N, -1, H, K), 1, 0), axis.name, split_axis=0, concat_axis=0
    )
    return jnp.moveaxis(arriving, 0, 2).reshape(B, S // N, N * H, K)


def key_repeats(num_heads: int, num_kv_heads: int, num_devices: int) -> int:
    """Returns how often ulysses repeats each key head, the least that gives every device one for its query heads.

    Raises:
      ValueError: If the query heads do not divide among the devices.
    """
    if num_heads % num_devices:
        raise ValueError(
            "Ulysses gives each device an equal share of the heads; got "
            f"{num_heads} heads and {num_devices} devices. Use mesh.attention = 'ring'."
        )
    return num_devices // math.gcd(num_kv_heads, num_devices)


@dataclasses.dataclass(frozen=True)
class MethodChoice:
    """How attention crosses the devices, and why."""

    method: Method
    reason: str

    def __str__(self) -> str:
        return f"{self.method} ({self.reason})"


def choose_method(*, num_heads: int, num_kv_heads: int, num_devices: int, num_tokens: int) -> MethodChoice:
    """Returns the way for a causal sequence of `num_tokens`, split over `num_devices`, that waits for fewer bytes.

    Ulysses waits for all that it sends. A ring sends while it attends, which hides the way if a share is long enough;
    not hidden are the gradients' way home, and in all turns of the backward pass but one their sums: keys travel at the
    same time, and of two arrays XLA hides one.
    """
    if num_heads % num_devices:
        return MethodChoice("ring", f"{num_heads} heads do not divide among {num_devices} devices")
    local = -(-num_tokens // num_devices)
    if local < HIDING_TOKENS:
        return MethodChoice(
            "ulysses",
            f"{local} tokens a device are attended to sooner than the next would have come around a ring",
        )
    repeats = key_repeats(num_heads, num_kv_heads, num_devices)
    # Heads of one token that a device sends in bfloat16. Ulysses: queries, keys and values, which the backward pass
    # asks for again, and the output; gradients of all. Ring: keys and values, their float32 sums being two each.
    others = num_devices - 1
    by_ulysses = (5 * num_heads + 6 * num_kv_heads * repeats) * others / num_devices
    by_ring = 4 * num_kv_heads * (others - 1) + 2 * num_kv_heads
    method: Method = "ring" if by_ring < by_ulysses else "ulysses"
    return MethodChoice(
        method,
        f"a ring waits for {by_ring / by_ulysses:.2f} times the bytes that ulysses waits for",
    )
