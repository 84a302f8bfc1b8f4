"""What a layer keeps for its backward pass, and where; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core.primitives import name_p

from bpt_rl.config import Activations, ModelConfig
from bpt_rl.nn.blockwise import RESIDUAL_NAME

Layer = Callable[[jax.Array, Any], tuple[jax.Array, None]]

MOST_UNROLLED = 32
"""Layers that are compiled one by one where each keeps everything: a loop would copy all of it to where the backward
pass finds it, half of what such a step reads and writes. A layer takes one to two seconds to compile for a GPU."""

LAYER_INPUT = "layer_input"
"""`checkpoint_name` of the stream that enters a layer."""

_GROUP_INPUT = "layer_group_input"

_FUSED_ATTENTION = "dot_product_attention_fwd"
"""How the names of the primitives begin whose results cuDNN's backward pass reads."""


def scan_layers(layer: Layer, stream: jax.Array, layers: Any, config: ModelConfig) -> jax.Array:
    """Returns the stream behind all layers, of which the backward pass finds no more than `config` says.

    Args:
      layer: Maps the stream and one layer's entries of `layers` to the next stream and None. It names its input
        `LAYER_INPUT` (`jax.ad_checkpoint.checkpoint_name`).
      stream: What enters the first layer.
      layers: Tree of arrays with a leading axis of layers.
      config: `activations` says what a layer keeps:
        keep: everything, the feedforward's hidden tensors too; nothing is computed twice.
        save_attention: the layer's input, and the attention's output and log-sum-exp: all but the attention is
          computed again, which is most of the work in a long context.
        offload_attention: the same, in the host's pinned memory; on a CPU that is where it lies anyway.
        recompute: the layer's input.
        offload: the layer's input, in the host's pinned memory.
        auto: recompute; whoever knows the device has chosen before (`bpt_rl.run.plan`).
        `layer_groups` above 1: layers keep so within one group at a time, and only that group's input before.
    """
    activations, num_groups = config.activations, config.layer_groups
    body = _rematerialised(layer, activations)
    if num_groups == 1:
        unroll = config.num_layers if is_unrolled(config, activations) else 1
        return jax.lax.scan(body, stream, layers, unroll=unroll)[0]

    def group(stream: jax.Array, layers: Any) -> tuple[jax.Array, None]:
        return jax.lax.scan(body, checkpoint_name(stream, _GROUP_INPUT), layers)[0], None

    outer: Activations = "offload" if activations.startswith("offload") else "recompute"
    grouped = jax.tree.map(lambda leaf: leaf.reshape(num_groups, -1, *leaf.shape[1:]), layers)
    return jax.lax.scan(_rematerialised(group, outer, _GROUP_INPUT), stream, grouped)[0]


def is_unrolled(config: ModelConfig, activations: Activations) -> bool:
    """Returns whether layers that keep so much are compiled one by one, without a loop over them."""
    return activations == "keep" and config.layer_groups == 1 and config.num_layers <= MOST_UNROLLED


def keeping_attention(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the body of a scan inside a layer, of which the layer's backward pass keeps the attention's result alone.

    What the layer keeps until then is the layer's affair.
    """
    return jax.checkpoint(function, policy=_policy("save_attention", ""), prevent_cse=False)


def _rematerialised(layer: Layer, activations: Activations, input_name: str = LAYER_INPUT) -> Layer:
    if activations == "keep":
        return layer
    # A scan's body is never shared between the passes, so barriers against it would only cost time.
    return jax.checkpoint(layer, policy=_policy(activations, input_name), prevent_cse=False)


def _policy(activations: Activations, input_name: str) -> Callable[..., Any]:
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
        if name == input_name:
            return layer_input
        if name == RESIDUAL_NAME or str(primitive.name).startswith(_FUSED_ATTENTION):
            return attended
        return False

    return policy
