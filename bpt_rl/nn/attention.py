"""Dot-product attention behind one signature, whatever computes it."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bpt_rl.config import Implementation, ModelConfig
from bpt_rl.nn.blockwise import blockwise_attention

_log = logging.getLogger(__name__)


def dot_product_attention(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S H_kv K"],
    value: Float[Array, "B S H_kv K"],
    *,
    implementation: Implementation = "auto",
    is_causal: bool = True,
    segment_ids: Int[Array, "B S"] | None = None,
    query_chunk_size: int = 512,
    key_chunk_size: int = 512,
) -> Float[Array, "B S H K"]:
    """Returns softmax(query key^T / sqrt(K)) value, of the type of `query`.

    Args:
      query: H must be a multiple of H_kv; head h reads key and value head h // (H / H_kv).
      key: Same length as `query`: this is self-attention over whole sequences, not decoding.
      value: Same shape as `key`.
      implementation:
        reference: holds the [S, S] matrix of every head, in float32; memory quadratic in S. The yardstick.
        blockwise: plain JAX on any device; memory linear in S in both passes.
        cudnn: cuDNN's fused kernel; linear memory; needs what `cudnn_obstacle` asks for.
        auto: cudnn where it can run, else blockwise, which was never slower than reference on a CPU, from 32
          tokens on. The choice is logged once at INFO.
      is_causal: Position s attends to positions up to s only.
      segment_ids: Tokens attend within equal ids only. Padding, id 0, attends to padding: finite values.
      query_chunk_size: Most tokens of a query chunk of blockwise; need not divide S.
      key_chunk_size: Most tokens of a key chunk of blockwise; need not divide S.

    Raises:
      ValueError: If shapes, types, chunk sizes or implementation do not fit.
    """
    _check_operands(query, key, value, segment_ids)
    if query_chunk_size < 1 or key_chunk_size < 1:
        raise ValueError(
            "query_chunk_size and key_chunk_size must be positive; "
            f"got {query_chunk_size} and {key_chunk_size}. 512 is usual."
        )
    obstacle = cudnn_obstacle(
        device_kind=jax.devices()[0].device_kind,
        dtype=query.dtype,
        head_dim=query.shape[3],
        has_segments=segment_ids is not None,
    )
    chosen = chosen_implementation(implementation, obstacle)
    if implementation == "auto":
        _log_choice(chosen, f"cudnn must have {obstacle}" if obstacle else "nothing is in cudnn's way")
    match chosen:
        case "reference":
            return _reference_attention(query, key, value, is_causal=is_causal, segment_ids=segment_ids)
        case "blockwise":
            return blockwise_attention(
                query,
                key,
                value,
                is_causal=is_causal,
                segment_ids=segment_ids,
                query_chunk_size=query_chunk_size,
                key_chunk_size=key_chunk_size,
            )
        case "cudnn":
            return jax.nn.dot_product_attention(
                query, key, value, is_causal=is_causal, implementation="cudnn"
            )
    raise ValueError(
        "implementation must be one of auto, reference, blockwise, cudnn; "
        f"got {implementation!r}. Use 'auto' if in doubt."
    )


def cudnn_obstacle(*, device_kind: str, dtype: DTypeLike, head_dim: int, has_segments: bool) -> str:
    """Returns which need of cuDNN's kernel is not met, and what was received; empty if it can run.

    Args:
      device_kind: Name of the device (`jax.Device.device_kind`).
      dtype: Of query, key and value.
      head_dim: Entries of a head.
      has_segments: Whether rows hold more than one sequence.
    """
    if "NVIDIA" not in device_kind:
        return f"an NVIDIA GPU; got {device_kind!r}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16 operands; got {jnp.dtype(dtype)}"
    if has_segments:
        return "no segment_ids; got some"
    if head_dim % 8 or head_dim > 128:
        return f"a head_dim that is a multiple of 8 and at most 128; got {head_dim}"
    return ""


def chosen_implementation(asked: Implementation, obstacle: str) -> Implementation:
    """Returns the implementation that runs where one is asked for: what `auto` stands for, or the very one.

    Args:
      asked: As in the configuration.
      obstacle: From `cudnn_obstacle`.

    Raises:
      ValueError: If `cudnn` is asked for and cannot run.
    """
    if asked == "auto":
        return "blockwise" if obstacle else "cudnn"
    if asked == "cudnn" and obstacle:
        raise ValueError(f"cudnn attention must have {obstacle}. Use implementation='blockwise'.")
    return asked


def model_implementation(model: ModelConfig, *, device_kind: str, has_segments: bool) -> Implementation:
    """Returns the attention that a model runs with on a device; see `cudnn_obstacle` and `chosen_implementation`."""
    obstacle = cudnn_obstacle(
        device_kind=device_kind,
        dtype=model.compute_dtype,
        head_dim=model.embed_dim // model.num_heads,
        has_segments=has_segments,
    )
    return chosen_implementation(model.implementation, obstacle)


def _check_operands(query: Array, key: Array, value: Array, segment_ids: Array | None) -> None:
    shapes = f"{query.shape}, {key.shape} and {value.shape}"
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be [B, S, H, K], key and value both [B, S, H_kv, K]; "
            f"got {shapes}. Split the embedding into heads, and give key and value one shape."
        )
    B, S, H, K = query.shape
    if key.shape[:2] != (B, S) or key.shape[3] != K:
        raise ValueError(
            f"query and key must agree in B, S and K; got {shapes}. "
            "For decoding against a cache use the model's step function."
        )
    if H % key.shape[2]:
        raise ValueError(
            f"The number of query heads must be a multiple of that of key heads; got {H} and {key.shape[2]}. "
            "Change num_heads or num_kv_heads."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "query, key and value must have one type; "
            f"got {query.dtype}, {key.dtype} and {value.dtype}. Cast them to the compute type."
        )
    if segment_ids is not None and segment_ids.shape != (B, S):
        raise ValueError(
            f"segment_ids must be [B, S] = {(B, S)}; got {segment_ids.shape}. Padding takes id 0."
        )


@functools.cache
def _log_choice(implementation: str, reason: str) -> None:
    _log.info("Attention: auto chose %s (%s).", implementation, reason)


def _reference_attention(
    query: Array, key: Array, value: Array, *, is_causal: bool, segment_ids: Array | None
) -> Array:
    B, S, H, K = query.shape
    G = key.shape[2]
    stats_dtype = jnp.promote_types(query.dtype, jnp.float32)
    query_BSGRK = query.reshape(B, S, G, H // G, K)
    logits_BGRST = jnp.einsum("bsgrk,btgk->bgrst", query_BSGRK, key, preferred_element_type=stats_dtype)
    allowed = jnp.ones((1, S, S), bool)
    if is_causal:
        allowed = jnp.tril(allowed)
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
    logits_BGRST = jnp.where(allowed[:, None, None], logits_BGRST / math.sqrt(K), -jnp.inf)
    weights_BGRST = jax.nn.softmax(logits_BGRST, axis=-1).astype(value.dtype)
    out = jnp.einsum("bgrst,btgk->bsgrk", weights_BGRST, value, preferred_element_type=stats_dtype)
    return out.reshape(B, S, H, K).astype(query.dtype)
