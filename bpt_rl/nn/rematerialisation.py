"""What a layer keeps for its backward pass, and where; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax

from bpt_rl.config import Activations
from bpt_rl.nn.blockwise import RESIDUAL_NAME

LAYER_INPUT = "layer_input"
"""`checkpoint_name` of the stream that enters a layer."""

_FUSED_ATTENTION = "dot_product_attention_fwd"
"""How the names of the primitives begin whose results cuDNN's backward pass reads."""


def rematerialised(layer: Callable[..., Any], activations: Activations) -> Callable[..., Any]:
    """Returns the body of a scan over layers that keeps no more than `activations` says.

    Args:
      layer: Names its input `LAYER_INPUT` (`jax.ad_checkpoint.checkpoint_name`).
      activations:
        keep: everything; nothing is computed twice.
        save_attention: the layer's input, and the attention's output and log-sum-exp: all but the attention is
          computed again, which is most of the work in a long context.
        recompute: the layer's input.
        offload: the layer's input, in the host's pinned memory; on a CPU that is where it lies anyway.
    """
    policies = jax.checkpoint_policies
    match activations:
        case "keep":
            return layer
        case "save_attention":
            policy = policies.save_from_both_policies(
                _is_fused_attention, policies.save_only_these_names(RESIDUAL_NAME)
            )
        case "recompute":
            policy = policies.nothing_saveable
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[LAYER_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
    # A scan's body is never shared between the passes, so barriers against it would only cost time.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    return str(primitive.name).startswith(_FUSED_ATTENTION)
