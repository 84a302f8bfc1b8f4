"""Token-wise functions applied chunk by chunk, so that their wide intermediate tensors stay small."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Shaped


def blockwise_map(
    function: Callable[..., Any],
    inputs: Sequence[Shaped[jax.Array, "B S *_"]],
    chunk_size: int,
    *,
    key: jax.Array | None = None,
) -> PyTree[Shaped[jax.Array, "B S *_"]]:
    """Returns `function(*inputs, key)`, computed over chunks of the sequence and recomputed in the backward pass.

    A feedforward's [B, S, 4 D] hidden tensor then never exists: neither pass holds more of it than one
    chunk. A sequence of at most one chunk goes straight through `function`, and nothing is recomputed.

    Args:
      function: Maps arrays [B, C, ...] and a key to one array [B, C, ...], or a tree of them, for any C, each token
        by itself and without side effects: no statistics across tokens. It may close over parameters; they receive
        gradients.
      inputs: Of the same B and S.
      chunk_size: Most tokens of a chunk. Chunks are evened out, so it need not divide S.
      key: Draws random numbers; each chunk gets one of its own, or None without it.

    Raises:
      ValueError: If `chunk_size` is not positive.

    Source: Liu and Abbeel 2023 (Blockwise Parallel Transformer), section 3.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive; got {chunk_size}. 2048 tokens are usual.")
    B, S = inputs[0].shape[:2]
    if chunk_size >= S:
        return function(*inputs, key)
    num_chunks = -(-S // chunk_size)
    even_size = -(-S // num_chunks)

    def cut(x: jax.Array) -> jax.Array:
        # The last token repeated, not zeros: a function singular at zero would make parameter gradients NaN.
        widths = ((0, 0), (0, num_chunks * even_size - S)) + ((0, 0),) * (x.ndim - 2)
        padded = jnp.pad(x, widths, mode="edge")
        return jnp.moveaxis(padded.reshape(B, num_chunks, even_size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(B, num_chunks * even_size, *x.shape[3:])[:, :S]

    # Inside a loop nothing can be shared between the passes, so the barriers against it would only cost time.
    body = jax.checkpoint(function, prevent_cse=False)
    keys = None if key is None else jax.random.split(key, num_chunks)
    outputs = jax.lax.map(lambda chunk: body(*chunk[0], chunk[1]), ([cut(x) for x in inputs], keys))
    return jax.tree.map(join, outputs)
