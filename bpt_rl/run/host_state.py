"""A state in the host's memory that visits the device in parts: what belongs to no layer, then layer by layer.

Its arrays stay whole where they lie, so that a checkpoint is the same for either place; a loop over layers reads a
slice of each and writes it back. A layer's slices are on their way out while the next layer's come in.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from bpt_rl.agents.base import Params
from bpt_rl.nn.working_copy import LAYERS, narrowed

Update = Callable[[Any, Params], Any]
"""Returns the state after an update, of a state, which has `params`, and its gradient; or of like parts of both."""


def memory(kind: Literal["device", "pinned_host"]) -> jax.sharding.Sharding:
    """Returns the first device's own memory, or the host's that is pinned for it, as a place for arrays."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def working_copy_of(params: Params, dtype: str) -> Params:
    """Returns the working copy (`bpt_rl.nn.working_copy`), on the device, of parameters in the host."""
    layers, rest = (_part(params, params, is_layers=chosen) for chosen in (True, False))
    copy = narrowed(_on_device(rest), dtype)
    if not jax.tree.leaves(layers):
        return copy
    return _joined(copy, jax.lax.map(lambda layer: narrowed(_on_device(layer), dtype), _in_host(layers)))


def updated_in_parts(update: Update, state: Any, gradient: Params) -> tuple[Any, jax.Array]:
    """Returns the state after an update, in the host but for counts, and the norm of its parameters.

    Args:
      update: Of one layer, or of all that is no layer's.
      state: In the host but for counts: a named tuple with `params` and other trees of their structure.
      gradient: On the device, whole.
    """
    layers, rest = (_part(state, state.params, is_layers=chosen) for chosen in (True, False))
    of_layers, of_rest = (_part(gradient, state.params, is_layers=chosen) for chosen in (True, False))
    rest = update(_on_device(rest), of_rest)
    squared = optax.tree.norm(rest.params, squared=True)

    def one_layer(index: jax.Array, carried: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
        layers, own, squared = carried
        own = update(own, _slice(of_layers, index))
        layers = _with_slice(layers, own, index)
        squared += optax.tree.norm(own.params, squared=True)
        # Read behind the writing, so that all of it is done in place. Behind the last layer it comes again.
        return layers, _on_device(_slice(layers, index + 1)), squared

    if stacked := jax.tree.leaves(of_layers):
        layers = _in_host(layers)
        carried = (layers, _on_device(_slice(layers, 0)), squared)
        layers, _, squared = jax.lax.fori_loop(0, len(stacked[0]), one_layer, carried)
    return _joined(_in_host(rest), layers), jnp.sqrt(squared)


def _on_device(tree: Any) -> Any:
    return jax.device_put(tree, memory("device"))


def _in_host(tree: Any) -> Any:
    # Counts of steps are nothing to move.
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory("pinned_host")) if leaf.ndim else leaf, tree)


def _slice(tree: Any, index: jax.Array | int) -> Any:
    """Returns one layer's part of stacked leaves; counts, which no layer has, as they are."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False) if leaf.ndim else leaf, tree
    )


def _with_slice(tree: Any, part: Any, index: jax.Array) -> Any:
    """Returns stacked leaves in the host with one layer's part written into them; counts as they are."""

    def written(leaf: jax.Array, own: jax.Array) -> jax.Array:
        if not leaf.ndim:
            return leaf
        stacked: jax.Array = jax.lax.dynamic_update_index_in_dim(
            leaf, jax.device_put(own, memory("pinned_host")), index, axis=0
        )
        return stacked

    return jax.tree.map(written, tree, part)


def _part(tree: Any, params: Params, *, is_layers: bool) -> Any:
    """Returns a tree with None for the layers, or for all else, of what has the structure of parameters."""
    structure: Any = jax.tree.structure(params)

    def is_like_params(node: Any) -> bool:
        return bool(structure == jax.tree.structure(node))

    def chosen(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf if (LAYERS in [getattr(key, "key", None) for key in path]) == is_layers else None

    def part(node: Any) -> Any:
        return jax.tree_util.tree_map_with_path(chosen, node) if is_like_params(node) else node

    return jax.tree.map(part, tree, is_leaf=is_like_params)


def _joined(rest: Any, layers: Any) -> Any:
    """Returns the tree of both parts; counts, which both have, are the first's."""
    return jax.tree.map(
        lambda one, other: other if one is None else one, rest, layers, is_leaf=lambda node: node is None
    )
