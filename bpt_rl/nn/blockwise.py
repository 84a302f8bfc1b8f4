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
from jaxtyping import Array, Float, Int

RESIDUAL_NAME = "blockwise_attention"
"""Name of the output and the log-sum-exp for policies of `jax.checkpoint`: save both, and the backward pass
of a rematerialised layer does not attend again."""


class _Plan(NamedTuple):
    """Static facts of one call."""

    length: int
    query_chunk_size: int
    key_chunk_size: int
    is_causal: bool

    @property
    def num_query_chunks(self) -> int:
        return -(-self.length // self.query_chunk_size)

    @property
    def num_key_chunks(self) -> int:
        return -(-self.length // self.key_chunk_size)

    def visited_key_chunks(self, query_chunk: Array) -> Array | int:
        """Returns how many key chunks, from the first, a query chunk attends to."""
        if not self.is_causal:
            return self.num_key_chunks
        end = jnp.minimum((query_chunk + 1) * self.query_chunk_size, self.length)
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
    B, S, H, K = query.shape
    G = key.shape[2]
    plan = _Plan(S, _even_chunk(S, query_chunk_size), _even_chunk(S, key_chunk_size), is_causal)
    chunks = _cut(plan, query, key, value)
    if segment_ids is not None:
        # Padding gets ids below every token's, and different ones for queries and keys: it meets nothing.
        lowest = jnp.min(segment_ids)
        query_ids = jnp.tile(_cut_axis(segment_ids, plan.query_chunk_size, lowest - 1), (1, 1, H // G))
        key_ids = _cut_axis(segment_ids, plan.key_chunk_size, lowest - 2)
        chunks = chunks._replace(query_segment_ids=query_ids, key_segment_ids=key_ids)
    out_IBGCK = _attend(plan, chunks)
    out = out_IBGCK.reshape(-1, B, G, H // G, plan.query_chunk_size, K).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(B, -1, H, K)[:, :S]


def _cut(plan: _Plan, query: Array, key: Array, value: Array) -> _Chunks:
    """Returns the operands in chunks, chunk axis first and the query heads of a group stacked."""
    B, S, H, K = query.shape
    G = key.shape[2]
    query_IBCGRK = _cut_axis(query.reshape(B, S, G, H // G, K), plan.query_chunk_size, 0)
    return _Chunks(
        query=query_IBCGRK.transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, G, H // G * plan.query_chunk_size, K),
        key=_cut_axis(key, plan.key_chunk_size, 0).transpose(0, 1, 3, 2, 4),
        value=_cut_axis(value, plan.key_chunk_size, 0).transpose(0, 1, 3, 2, 4),
        query_segment_ids=None,
        key_segment_ids=None,
    )


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
        return (total / row_sum).astype(chunks.query.dtype), row_max + jnp.log(row_sum)

    out, log_sum_exp = jax.lax.map(query_chunk, jnp.arange(plan.num_query_chunks))
    out = checkpoint_name(out, RESIDUAL_NAME)
    log_sum_exp = checkpoint_name(log_sum_exp, RESIDUAL_NAME)
    return out, (chunks, out, log_sum_exp)


def _backward(plan: _Plan, residuals: tuple[_Chunks, Array, Array], cotangent: Array) -> tuple[_Chunks]:
    """Returns the gradient with respect to query, key and value chunks."""
    chunks, out, log_sum_exp = residuals
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
        return (carry_out[0], carry_out[1]), d_query.astype(query.dtype)

    zeros = jnp.zeros(chunks.key.shape, stats_dtype)
    (d_key, d_value), d_query = jax.lax.scan(query_chunk, (zeros, zeros), jnp.arange(plan.num_query_chunks))
    d_key, d_value = d_key.astype(chunks.key.dtype), d_value.astype(chunks.value.dtype)
    return (_Chunks(d_query, d_key, d_value, None, None),)


_attend.defvjp(_forward, _backward)


def _logits(plan: _Plan, chunks: _Chunks, i: Array, j: Array) -> Array:
    """Returns the scaled logits of a chunk pair; masked ones are so low that their weight is exactly 0."""
    logits = _matmul("bgck,bgek->bgce", chunks.query[i], chunks.key[j]) / math.sqrt(chunks.query.shape[-1])
    num_rows = logits.shape[-2]
    key_position = j * plan.key_chunk_size + jnp.arange(plan.key_chunk_size)
    allowed = (key_position < plan.length)[None, None, None, :]
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
