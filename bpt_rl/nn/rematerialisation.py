"""What a layer keeps for its backward pass, and where; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core.primitives import name_p

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
        offload_attention: the same, in the host's pinned memory; on a CPU that is where it lies anyway.
        recompute: the layer's input.
        offload: the layer's input, in the host's pinned memory.
        auto: recompute; whoever knows the device has chosen before (`bpt_rl.run.plan`).
    """
    if activations == "keep":
        return layer
    # A scan's body is never shared between the passes, so barriers against it would only cost time.
    return jax.checkpoint(layer, policy=_policy(activations), prevent_cse=False)


def _policy(activations: Activations) -> Callable[..., Any]:
    """Returns what is done with the result of a primitive: kept (true), computed again, or moved to the host."""
    moving = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    moved = moving(name_p, name=LAYER_INPUT)
    layer_input, attended = {
        "auto": (False, False),
        "recompute": (False, False),
        "save_attention": (False, True),
        "offload_attention": (moved, moved),
        "offload": (moved, False),
    }[activations]

    def policy(primitive: Any, *_: Any, **parameters: Any) -> Any:
        name = parameters.get("name") if primitive is name_p else None
        if name == LAYER_INPUT:
            return layer_input
        if name == RESIDUAL_NAME or str(primitive.name).startswith(_FUSED_ATTENTION):
            return attended
        return False

    return policy
