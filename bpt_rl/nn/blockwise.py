"""Attention in chunks: exact, with memory linear in the sequence length in both passes.

Both passes visit pairs of a query chunk and a key chunk and never hold more than one pair's logits. The
forward pass keeps a running softmax (Rabe and Staats 2021; Liu and Abbeel 2023, section 3); the backward
pass recomputes the logits from the log-sum-exp (Dao 2023, algorithm 2). Chunk pairs wholly above the
causal diagonal are not visited.

Axis letters beyond the legend: C rows of a query chunk, E keys of a key chunk, G key and value heads,
R = H / G query heads that share one of them, I query chunks, J key chunks. Those R heads are stacked in C,
so keys and values are never repeated.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

RESIDUAL_NAME = "blockwise_attention"
"""Name of the output and the log-sum-exp for policies of `jax.checkpoint`: save both, and the backward pass
of a rematerialised layer does not attend again."""


class _Plan(NamedTuple):
    """Static facts of one call."""

    query_length: int
    key_length: int
    query_chunk_size: int
    key_chunk_size: int
    is_causal: bool

    @property
    def num_query_chunks(self) -> int:
        return -(-self.query_length // self.query_chunk_size)

    @property
    def num_key_chunks(self) -> int:
        return -(-self.key_length // self.key_chunk_size)

    def visited_key_chunks(self, query_chunk: Array) -> Array:
        """Returns how many key chunks, from the first, a query chunk attends to.

        Traced even where it is always the same: a loop of a fixed number of turns is a scan, for which a rematerialised
        layer would keep every mask.
        """
        if not self.is_causal:
            return jnp.minimum(query_chunk, 0) + self.num_key_chunks
        end = jnp.minimum((query_chunk + 1) * self.query_chunk_size, self.key_length)
        return (end + self.key_chunk_size - 1) // self.key_chunk_size


class _Chunks(NamedTuple):
    """Operands cut into chunks, zero-padded to whole ones."""

    query: Float[Array, "I B G C K"]
    key: Float[Array, "J B G E K"]
    value: Float[Array, "J B G E K"]
    query_segment_ids: Int[Array, "I B C"] | None
    key_segment_ids: Int[Array, "J B E"] | None


def blockwise_attention(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S H_kv K"],
    value: Float[Array, "B S H_kv K"],
    *,
    is_causal: bool = True,
    segment_ids: Int[Array, "B S"] | None = None,
    query_chunk_size: int = 512,
    key_chunk_size: int = 512,
) -> Float[Array, "B S H K"]:
    """Returns softmax attention without ever holding an [S, S] matrix.

    Statistics and sums are float32 (float64 for float64 operands). The backward pass keeps the operands, the
    output and one log-sum-exp a query; derivatives beyond the first are not defined.

    Args:
      query: H must be a multiple of H_kv; head h reads key head h // (H / H_kv).
      key: Same length as `query`.
      value: Same shape as `key`.
      is_causal: Position s attends to positions up to s only.
      segment_ids: Tokens attend within equal ids only; 0, padding, attends to padding.
      query_chunk_size: Most tokens of a query chunk. Chunks are evened out, so it need not divide S.
      key_chunk_size: Most tokens of a key chunk, likewise.

    Source: Liu and Abbeel 2023 (Blockwise Parallel Transformer), section 3; Dao 2023 (FlashAttention-2).
    """
    sizes = ChunkSizes(query_chunk_size, key_chunk_size)
    plan = _plan_of(query, key, sizes, is_causal=is_causal)
    ids = None if segment_ids is None else (segment_ids, segment_ids)
    return _join_queries(plan, _attend(plan, _cut(plan, Operands(query, key, value, ids))))


class ChunkSizes(NamedTuple):
    """Most tokens of a query chunk and of a key chunk."""

    query: int
    key: int


class Operands(NamedTuple):
    """Queries, and some of the keys that they attend to."""

    query: Float[Array, "B S H K"]
    key: Float[Array, "B keys H_kv K"]
    value: Float[Array, "B keys H_kv K"]
    segment_ids: tuple[Int[Array, "B S"], Int[Array, "B keys"]] | None
    """Of the queries and of the keys; they attend within equal ids only."""


def attend_to_block(
    operands: Operands, sizes: ChunkSizes, *, is_causal: bool
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H"]]:
    """Returns attention to some of the keys alone, and the log-sum-exp of its logits, both float32 or wider.

    Attention to all keys is the mean of that to the blocks, weighted by the exponentials of their log-sum-exps. A
    query that sees no key of the block has a log-sum-exp so low that its weight is exactly 0. Not differentiable:
    `block_gradient` is the backward pass.

    Args:
      operands: Queries and the block's keys.
      sizes: Of chunks.
      is_causal: Query s sees the block's keys up to s only; queries and keys are then of one number.
    """
    plan = _plan_of(operands.query, operands.key, sizes, is_causal=is_causal)
    out, log_sum_exp = _statistics(plan, _cut(plan, operands))
    return _join_queries(plan, out), _join_queries(plan, log_sum_exp)[..., 0]


class Attended(NamedTuple):
    """What attention to all keys gave, and the gradient that comes in for it: what a block's gradient reads."""

    out: Float[Array, "B S H K"]
    log_sum_exp: Float[Array, "B S H"]
    cotangent: Float[Array, "B S H K"]


def block_gradient(
    operands: Operands, attended: Attended, sizes: ChunkSizes, *, is_causal: bool
) -> tuple[Float[Array, "B S H K"], Float[Array, "B keys H_kv K"], Float[Array, "B keys H_kv K"]]:
    """Returns the block's summand of the query gradient, and its key and value gradients, float32 or wider.

    Args:
      operands: As for `attend_to_block`.
      attended: Of these queries, over all keys: not over the block's alone.
      sizes: As for `attend_to_block`.
      is_causal: As for `attend_to_block`.
    """
    plan = _plan_of(operands.query, operands.key, sizes, is_causal=is_causal)
    arrays = (attended.out, attended.log_sum_exp[..., None], attended.cotangent)
    d_query, d_key, d_value = _gradient(
        plan,
        _cut(plan, operands),
        *(_cut_queries(plan, array, operands.key.shape[2]) for array in arrays),
    )
    return _join_queries(plan, d_query), _join_keys(plan, d_key), _join_keys(plan, d_value)


def _plan_of(query: Array, key: Array, sizes: ChunkSizes, *, is_causal: bool) -> _Plan:
    S, keys = query.shape[1], key.shape[1]
    return _Plan(S, keys, _even_chunk(S, sizes.query), _even_chunk(keys, sizes.key), is_causal)


def _cut(plan: _Plan, operands: Operands) -> _Chunks:
    """Returns the operands in chunks, chunk axis first and the query heads of a group stacked."""
    query, key, value, segment_ids = operands
    H, G = query.shape[2], key.shape[2]
    query_ids = key_ids = None
    if segment_ids is not None:
        # Padding gets ids below every token's, and different ones for queries and keys: it meets nothing.
        lowest = jnp.minimum(jnp.min(segment_ids[0]), jnp.min(segment_ids[1]))
        query_ids = jnp.tile(_cut_axis(segment_ids[0], plan.query_chunk_size, lowest - 1), (1, 1, H // G))
        key_ids = _cut_axis(segment_ids[1], plan.key_chunk_size, lowest - 2)
    return _Chunks(
        query=_cut_queries(plan, query, G),
        key=_cut_axis(key, plan.key_chunk_size, 0).transpose(0, 1, 3, 2, 4),
        value=_cut_axis(value, plan.key_chunk_size, 0).transpose(0, 1, 3, 2, 4),
        query_segment_ids=query_ids,
        key_segment_ids=key_ids,
    )


def _cut_queries(plan: _Plan, array: Array, num_kv_heads: int) -> Array:
    """Returns [B, S, H, K] as [I, B, G, C, K]."""
    B, S, H, K = array.shape
    grouped = array.reshape(B, S, num_kv_heads, H // num_kv_heads, K)
    cut_IBCGRK = _cut_axis(grouped, plan.query_chunk_size, 0)
    return cut_IBCGRK.transpose(0, 1, 3, 4, 2, 5).reshape(cut_IBCGRK.shape[0], B, num_kv_heads, -1, K)


def _join_queries(plan: _Plan, array_IBGCK: Array) -> Array:
    """Undoes `_cut_queries`."""
    num_chunks, B, G, _, K = array_IBGCK.shape
    array_IBGRCK = array_IBGCK.reshape(num_chunks, B, G, -1, plan.query_chunk_size, K)
    joined = array_IBGRCK.transpose(1, 0, 4, 2, 3, 5)
    return joined.reshape(B, num_chunks * plan.query_chunk_size, -1, K)[:, : plan.query_length]


def _join_keys(plan: _Plan, array_JBGEK: Array) -> Array:
    """Returns [J, B, G, E, K] as [B, keys, G, K]."""
    _, B, G, _, K = array_JBGEK.shape
    return array_JBGEK.transpose(1, 0, 3, 2, 4).reshape(B, -1, G, K)[:, : plan.key_length]


def _cut_axis(array: Array, chunk_size: int, fill: Array | int) -> Array:
    """Returns axis 1 cut into chunks, the last filled up, with the chunk axis first."""
    B, S, *rest = array.shape
    widths = [(0, 0), (0, -S % chunk_size), *((0, 0) for _ in rest)]
    padded = jnp.pad(array, widths, constant_values=fill)
    return jnp.moveaxis(padded.reshape(B, -1, chunk_size, *rest), 1, 0)


def _even_chunk(length: int, most: int) -> int:
    """Returns the size that cuts `length` into as few chunks as `most` allows, with least padding."""
    return math.ceil(length / math.ceil(length / most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, chunks: _Chunks) -> Array:
    return _forward(plan, chunks)[0]


def _forward(plan: _Plan, chunks: _Chunks) -> tuple[Array, tuple[_Chunks, Array, Array]]:
    """Returns the output by query chunk, and what the backward pass needs."""
    out, log_sum_exp = _statistics(plan, chunks, chunks.query.dtype)
    out = checkpoint_name(out, RESIDUAL_NAME)
    log_sum_exp = checkpoint_name(log_sum_exp, RESIDUAL_NAME)
    return out, (chunks, out, log_sum_exp)


def _statistics(plan: _Plan, chunks: _Chunks, out_dtype: DTypeLike | None = None) -> tuple[Array, Array]:
    """Returns output and log-sum-exp by query chunk; the output in float32 or wider unless told otherwise."""
    stats_dtype = jnp.promote_types(chunks.query.dtype, jnp.float32)
    lowest = np.finfo(stats_dtype).min

    def query_chunk(i: Array) -> tuple[Array, Array]:
        def key_chunk(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, row_sum, row_max = carry
            logits = _logits(plan, chunks, i, j)
            new_max = jnp.maximum(row_max, logits.max(-1, keepdims=True))
            weights = jnp.exp(logits - new_max)
            decay = jnp.exp(row_max - new_max)
            row_sum = row_sum * decay + weights.sum(-1, keepdims=True)
            total = total * decay + _matmul("bgce,bgek->bgck", weights, chunks.value[j])
            return total, row_sum, new_max

        shape = chunks.query.shape[1:]
        zeros = jnp.zeros((*shape[:-1], 1), stats_dtype)
        start = (jnp.zeros(shape, stats_dtype), zeros, zeros + lowest)
        total, row_sum, row_max = jax.lax.fori_loop(0, plan.visited_key_chunks(i), key_chunk, start)
        return (total / row_sum).astype(out_dtype or stats_dtype), row_max + jnp.log(row_sum)

    out, log_sum_exp = jax.lax.map(query_chunk, jnp.arange(plan.num_query_chunks))
    return out, log_sum_exp


def _backward(plan: _Plan, residuals: tuple[_Chunks, Array, Array], cotangent: Array) -> tuple[_Chunks]:
    """Returns the gradient with respect to query, key and value chunks."""
    chunks, out, log_sum_exp = residuals
    d_query, d_key, d_value = _gradient(plan, chunks, out, log_sum_exp, cotangent, chunks.query.dtype)
    d_key, d_value = d_key.astype(chunks.key.dtype), d_value.astype(chunks.value.dtype)
    return (_Chunks(d_query, d_key, d_value, None, None),)


def _gradient(
    plan: _Plan,
    chunks: _Chunks,
    out: Array,
    log_sum_exp: Array,
    cotangent: Array,
    query_dtype: DTypeLike | None = None,
) -> tuple[Array, Array, Array]:
    """Returns the gradients of query, key and value chunks; the first in float32 or wider unless told otherwise."""
    stats_dtype = log_sum_exp.dtype
    scale = 1 / math.sqrt(chunks.query.shape[-1])

    def query_chunk(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        query, d_out = chunks.query[i], cotangent[i]
        delta = jnp.sum(d_out.astype(stats_dtype) * out[i].astype(stats_dtype), -1, keepdims=True)

        def key_chunk(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_query, d_key, d_value = carry
            weights = jnp.exp(_logits(plan, chunks, i, j) - log_sum_exp[i])
            d_weights = _matmul("bgck,bgek->bgce", d_out, chunks.value[j])
            d_logits = weights * (d_weights - delta) * scale
            d_query = d_query + _matmul("bgce,bgek->bgck", d_logits, chunks.key[j])
            d_key = d_key.at[j].add(_matmul("bgce,bgck->bgek", d_logits, query))
            d_value = d_value.at[j].add(_matmul("bgce,bgck->bgek", weights, d_out))
            return d_query, d_key, d_value

        start = (jnp.zeros(query.shape, stats_dtype), *carry)
        d_query, *carry_out = jax.lax.fori_loop(0, plan.visited_key_chunks(i), key_chunk, start)
        return (carry_out[0], carry_out[1]), d_query.astype(query_dtype or stats_dtype)

    zeros = jnp.zeros(chunks.key.shape, stats_dtype)
    (d_key, d_value), d_query = jax.lax.scan(query_chunk, (zeros, zeros), jnp.arange(plan.num_query_chunks))
    return d_query, d_key, d_value


_attend.defvjp(_forward, _backward)


def _logits(plan: _Plan, chunks: _Chunks, i: Array, j: Array) -> Array:
    """Returns the scaled logits of a chunk pair; masked ones are so low that their weight is exactly 0."""
    logits = _matmul("bgck,bgek->bgce", chunks.query[i], chunks.key[j]) / math.sqrt(chunks.query.shape[-1])
    num_rows = logits.shape[-2]
    key_position = j * plan.key_chunk_size + jnp.arange(plan.key_chunk_size)
    allowed = (key_position < plan.key_length)[None, None, None, :]
    if plan.is_causal:
        query_position = i * plan.query_chunk_size + jnp.arange(num_rows) % plan.query_chunk_size
        allowed &= query_position[:, None] >= key_position
    if chunks.query_segment_ids is not None and chunks.key_segment_ids is not None:
        same_segment = chunks.query_segment_ids[i][:, :, None] == chunks.key_segment_ids[j][:, None, :]
        allowed &= same_segment[:, None]
    return jnp.where(allowed, logits, np.finfo(logits.dtype).min)


def _matmul(subscripts: str, left: Array, right: Array) -> Array:
    """Returns a product of operands of the type of `right`, summed in float32 or wider."""
    dtype = right.dtype
    return jnp.einsum(
        subscripts, left.astype(dtype), right, preferred_element_type=jnp.promote_types(dtype, jnp.float32)
    )
