"""Cross entropy over a vocabulary, chunk by chunk: no pass holds the logits of a whole sequence.

Both passes visit pairs of a chunk of tokens and a chunk of vocabulary. The forward pass keeps a running
log-sum-exp and the target's logit of each token; the backward pass makes a pair's logits again from the saved
log-sum-exp and adds to both gradients at once.

Axis letters beyond the legend: V vocabulary, I and C chunks of tokens and tokens of one, J and E chunks of
vocabulary and entries of one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_TILE = 128
"""Chunks are a multiple where they may be: a GPU's matrix units want at least multiples of 8."""


class _Chunks(NamedTuple):
    """Operands cut into chunks, zero-padded to whole ones."""

    stream: Float[Array, "I C D"]
    embedding: Float[Array, "J E D"]
    targets: Int[Array, "I C"]


def vocabulary_losses(
    stream: Float[Array, "B S D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    *,
    token_chunk_size: int = 4096,
    vocabulary_chunk_size: int = 8192,
) -> Float[Array, "B S"]:
    """Returns -log softmax(stream embedding^T)[target] of each token, in nats and in float32 or wider.

    Largest temporaries: one [token_chunk_size, vocabulary_chunk_size] matrix of logits (128 MiB as it is) and, in
    the backward pass, the embedding's gradient in float32. The logits are computed twice in training.

    Args:
      stream: Its type is that of the operands of the matrix products; sums and statistics are float32 or wider.
      embedding: One row a vocabulary entry. Its gradient has its type.
      targets: Index of the entry that follows, in [0, V); the loss of any other is not finite. Padding takes any
        index, and a weight of 0 where losses are averaged.
      token_chunk_size: Most tokens of a chunk, rows of the batch taken together. Need not divide them.
      vocabulary_chunk_size: Most vocabulary entries of a chunk. Need not divide V.

    Raises:
      ValueError: If a chunk size is not positive.

    Source: Milakov and Gimelshein 2018 (the running log-sum-exp).
    """
    if token_chunk_size < 1 or vocabulary_chunk_size < 1:
        raise ValueError(
            "token_chunk_size and vocabulary_chunk_size must be positive; "
            f"got {token_chunk_size} and {vocabulary_chunk_size}. 4096 and 8192 are usual."
        )
    flat = stream.reshape(-1, stream.shape[-1])
    losses = _losses(flat, embedding, targets.reshape(-1), token_chunk_size, vocabulary_chunk_size)
    return losses.reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _losses(stream: Array, embedding: Array, targets: Array, token_size: int, vocabulary_size: int) -> Array:
    return _forward(stream, embedding, targets, token_size, vocabulary_size)[0]


def _forward(
    stream: Array, embedding: Array, targets: Array, token_size: int, vocabulary_size: int
) -> tuple[Array, tuple[Array, ...]]:
    """Returns the losses [B S] in one row, and what the backward pass reads."""
    chunks = _cut(stream, embedding, targets, token_size, vocabulary_size)
    dtype = jnp.promote_types(stream.dtype, jnp.float32)
    num_chunks, _, _ = chunks.embedding.shape

    def chunk_losses(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        stream_CD, target_C = inputs

        def visit(carry: tuple[Array, ...], inputs: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
            largest_C, total_C, target_logit_C = carry
            embedding_ED, index = inputs
            logits_CE, is_target_CE = _logits(stream_CD, embedding_ED, target_C, index, len(embedding))
            larger_C = jnp.maximum(largest_C, logits_CE.max(axis=-1))
            fresh_C = jnp.exp(logits_CE - larger_C[:, None]).sum(axis=-1)
            total_C = total_C * jnp.exp(largest_C - larger_C) + fresh_C
            here_C = jnp.where(is_target_CE, logits_CE, 0).sum(axis=-1)
            target_logit_C = jnp.where(is_target_CE.any(axis=-1), here_C, target_logit_C)
            return (larger_C, total_C, target_logit_C), None

        # A target that no chunk holds keeps NaN, so that a wrong index never passes for a low loss.
        fills = (-jnp.inf, 0, jnp.nan)
        start = tuple(jnp.full(target_C.shape, fill, dtype) for fill in fills)
        (largest_C, total_C, target_logit_C), _ = jax.lax.scan(
            visit, start, (chunks.embedding, jnp.arange(num_chunks))
        )
        log_sum_C = largest_C + jnp.log(total_C)
        return log_sum_C - target_logit_C, log_sum_C

    losses, log_sum = jax.lax.map(chunk_losses, (chunks.stream, chunks.targets))
    return losses.reshape(-1)[: len(stream)], (stream, embedding, targets, log_sum)


def _backward(
    token_size: int, vocabulary_size: int, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, None]:
    stream, embedding, targets, log_sum_IC = residuals
    chunks = _cut(stream, embedding, targets, token_size, vocabulary_size)
    dtype = log_sum_IC.dtype
    num_chunks, E, D = chunks.embedding.shape
    cotangent_IC = _whole(cotangent, token_size)

    def chunk_gradients(total_JED: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        stream_CD, target_C, log_sum_C, cotangent_C = inputs

        def visit(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
            total_JED, gradient_CD = carry
            embedding_ED = chunks.embedding[index]
            logits_CE, is_target_CE = _logits(stream_CD, embedding_ED, target_C, index, len(embedding))
            slope_CE = (jnp.exp(logits_CE - log_sum_C[:, None]) - is_target_CE) * cotangent_C[:, None]
            slope_CE = slope_CE.astype(stream.dtype)
            gradient_CD += jnp.matmul(slope_CE, embedding_ED, preferred_element_type=dtype)
            sums_ED = total_JED[index] + jnp.matmul(slope_CE.T, stream_CD, preferred_element_type=dtype)
            return (jax.lax.dynamic_update_index_in_dim(total_JED, sums_ED, index, 0), gradient_CD), None

        start = (total_JED, jnp.zeros(stream_CD.shape, dtype))
        (total_JED, gradient_CD), _ = jax.lax.scan(visit, start, jnp.arange(num_chunks))
        return total_JED, gradient_CD.astype(stream.dtype)

    # Tokens outside, vocabulary inside: the sum that must be carried is then the size of the parameters, not of
    # the sequence.
    embedding_gradient, stream_gradient = jax.lax.scan(
        chunk_gradients,
        jnp.zeros((num_chunks, E, D), dtype),
        (chunks.stream, chunks.targets, log_sum_IC, cotangent_IC),
    )
    stream_gradient = stream_gradient.reshape(-1, D)[: len(stream)]
    return stream_gradient, embedding_gradient.reshape(-1, D)[: len(embedding)].astype(embedding.dtype), None


_losses.defvjp(_forward, _backward)


def _logits(
    stream_CD: Array, embedding_ED: Array, target_C: Array, index: Array, num_entries: int
) -> tuple[Array, Array]:
    """Returns the logits of a pair of chunks, -inf in the vocabulary's padding, and where the targets are."""
    dtype = jnp.promote_types(stream_CD.dtype, jnp.float32)
    logits_CE = jnp.matmul(stream_CD, embedding_ED.T, preferred_element_type=dtype)
    entries = index * len(embedding_ED) + jnp.arange(len(embedding_ED))
    return jnp.where(entries < num_entries, logits_CE, -jnp.inf), target_C[:, None] == entries


def _cut(stream: Array, embedding: Array, targets: Array, token_size: int, vocabulary_size: int) -> _Chunks:
    return _Chunks(
        _whole(stream, token_size),
        _whole(embedding.astype(stream.dtype), vocabulary_size),
        _whole(targets, token_size),
    )


def _whole(x: Array, chunk_size: int) -> Array:
    """Returns `x` cut along its first axis into equal chunks of at most `chunk_size`, filled up with zeros."""
    num_chunks = -(-len(x) // chunk_size)
    even_size = -(-len(x) // num_chunks)
    size = min(chunk_size, -(-even_size // _TILE) * _TILE)
    padded = jnp.pad(x, ((0, num_chunks * size - len(x)),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(num_chunks, size, *x.shape[1:])
