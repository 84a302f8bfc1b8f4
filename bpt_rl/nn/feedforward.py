"""Token-wise functions applied chunk by chunk, so that their wide intermediate tensors stay small."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def blockwise_map(
    function: Callable[[Array], Array], inputs: Float[Array, "B S D"], chunk_size: int
) -> Float[Array, "B S D_out"]:
    """Returns `function(inputs)`, computed over chunks of the sequence and recomputed in the backward pass.

    A feedforward's [B, S, 4 D] hidden tensor then never exists: neither pass holds more of it than one
    chunk. A sequence of at most one chunk goes straight through `function`, and nothing is recomputed.

    Args:
      function: Maps [B, C, D] to [B, C, D_out] for any C, each token by itself and without side effects: no
        statistics across tokens, no random numbers drawn inside. It may close over parameters; they receive
        gradients.
      inputs: Activations.
      chunk_size: Most tokens of a chunk. Chunks are evened out, so it need not divide S.

    Raises:
      ValueError: If `chunk_size` is not positive.

    Source: Liu and Abbeel 2023 (Blockwise Parallel Transformer), section 3.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive; got {chunk_size}. 2048 tokens are usual.")
    B, S, D = inputs.shape
    if chunk_size >= S:
        return function(inputs)
    num_chunks = -(-S // chunk_size)
    even_size = -(-S // num_chunks)
    # The last token repeated, not zeros: a function singular at zero would make parameter gradients NaN.
    padded = jnp.pad(inputs, ((0, 0), (0, num_chunks * even_size - S), (0, 0)), mode="edge")
    chunks = jnp.moveaxis(padded.reshape(B, num_chunks, even_size, D), 1, 0)
    # Inside a loop nothing can be shared between the passes, so the barriers against it would only cost time.
    outputs = jax.lax.map(jax.checkpoint(function, prevent_cse=False), chunks)
    return jnp.moveaxis(outputs, 0, 1).reshape(B, num_chunks * even_size, outputs.shape[-1])[:, :S]
