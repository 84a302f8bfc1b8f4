"""cuDNN's fused attention to one block of keys, and that block's gradient given the statistics of all blocks.

JAX's public call has no gradient with respect to its log-sum-exp, and rounds it to the operands' type; both passes are
called here as JAX's own derivative calls them. Its names are private: `obstacle` says whether they are as known.
"""

import functools
import inspect
import math
from typing import Any

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jaxtyping import Array, Float

from bpt_rl.nn.blockwise import Attended, Operands

_FORWARD, _BACKWARD = "_dot_product_attention_fwd_rule", "_dot_product_attention_bwd_rule"

_SETTINGS: dict[str, Any] = {
    "seed": 42,
    "dropout_rate": 0.0,
    "variadic_args": (False, False),
    "layout": cudnn.AttentionLayout.BTNH.value,
    "sliding_window_length": None,
    "cudnn_version": 0,
    "is_training": True,
    "return_residual": False,
    "score_mod": None,
    "score_mod_args": (),
}
"""Of no bias, no dropout, and operands [B, S, H, K]; each version of JAX asks for some of them."""

_EMPTY = ("bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v")
"""Operands that are not used, by name."""


@functools.cache
def obstacle() -> str:
    """Returns which need of this file JAX does not meet; empty if it does."""
    known = {"query", "key", "value", "scale", "mask_type", "res", "grad_output", *_EMPTY, *_SETTINGS}
    for name in (_FORWARD, _BACKWARD):
        rule = getattr(cudnn, name, None)
        unknown = set(inspect.signature(rule).parameters) - known if rule else {name}
        if unknown:
            return f"JAX's own rules of cuDNN attention as this version knows them; got {', '.join(sorted(unknown))}"
    return ""


def attend_to_block(
    operands: Operands, *, is_causal: bool
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H"]]:
    """Returns what `bpt_rl.nn.blockwise.attend_to_block` does: the output rounded to the operands' type, in float32.

    Args:
      operands: bfloat16 or float16, without segments.
      is_causal: Query s sees the block's keys up to s only; queries and keys are then of one number.
    """
    _, residuals = _called(_FORWARD, operands, is_causal)
    *_, log_sum_exp, out = residuals
    return out.astype(jnp.float32), log_sum_exp.transpose(0, 2, 1)


def block_gradient(
    operands: Operands, attended: Attended, *, is_causal: bool
) -> tuple[Float[Array, "B S H K"], Float[Array, "B keys H_kv K"], Float[Array, "B keys H_kv K"]]:
    """Returns what `bpt_rl.nn.blockwise.block_gradient` does, each summand rounded to the operands' type, in float32.

    The kernel computes weights from the log-sum-exp that it is given, and the mean gradient from the output: with
    those of all keys, they are the block's share of all attention.
    """
    dtype = operands.query.dtype
    statistics = (attended.log_sum_exp.transpose(0, 2, 1), attended.out.astype(dtype))
    residuals = (*_residuals(operands), *statistics)
    gradients = _called(
        _BACKWARD, operands, is_causal, res=residuals, grad_output=attended.cotangent.astype(dtype)
    )
    d_query, d_key, d_value = (gradient.astype(jnp.float32) for gradient in gradients[:3])
    return d_query, d_key, d_value


def _residuals(operands: Operands) -> tuple[Any, ...]:
    """Returns what JAX's backward rule reads before log-sum-exp and output, in its order."""
    empty = jnp.zeros(0, operands.query.dtype)
    more = ((),) if "score_mod" in inspect.signature(getattr(cudnn, _BACKWARD)).parameters else ()
    return (operands.query, operands.key, operands.value, *(empty for _ in _EMPTY), *more)


def _called(name: str, operands: Operands, is_causal: bool, **more: Any) -> Any:
    """Returns what JAX's rule of that name does with what it asks for."""
    empty = jnp.zeros(0, operands.query.dtype)
    given = {
        **_SETTINGS,
        **dict.fromkeys(_EMPTY, empty),
        **more,
        "query": operands.query,
        "key": operands.key,
        "value": operands.value,
        "scale": 1 / math.sqrt(operands.query.shape[-1]),
        "mask_type": cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK,
    }
    rule = getattr(cudnn, name)
    return rule(**{parameter: given[parameter] for parameter in inspect.signature(rule).parameters})
