"""Kernels of layers in the type they compute in, with gradients in float32: what a step needs of the parameters.

A layer casts its float32 kernels anyway, so a copy that is cast before gives the same values in half the memory. Its
gradients would be sums over chunks in the short type, though, where those of the float32 kernels are sums in float32.
So each kernel goes through the layers with a slot, float32 zeros that nothing reads: the gradient is the slot's.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LAYERS, KERNEL = "blocks", "kernel"
"""Keys of the stacked layers among parameters, and of their matrices: what layers cast."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "slot"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class NarrowKernel:
    """Stands for a float32 kernel until a layer asks for it (`widened`)."""

    value: Any
    """Of the compute type."""
    slot: Any
    """float32, of the same shape; receives the gradient."""


def narrowed(params: Any, dtype: DTypeLike) -> Any:
    """Returns the parameters with the kernels of the layers cast to `dtype`: the working copy."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        keys = [getattr(key, "key", None) for key in path]
        return leaf.astype(dtype) if LAYERS in keys and keys[-1] == KERNEL else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def slots_of(working: Any) -> Any:
    """Returns where gradients of a working copy are taken: its float32 leaves, and slots of its narrow ones."""
    return jax.tree.map(
        lambda leaf: leaf if leaf.dtype == jnp.float32 else jnp.zeros(leaf.shape, jnp.float32), working
    )


def with_slots(working: Any, slots: Any) -> Any:
    """Returns parameters for a model: a loss of them has, with respect to `slots`, the gradient of float32 ones."""
    return jax.tree.map(
        lambda leaf, slot: slot if leaf.dtype == jnp.float32 else NarrowKernel(leaf, slot), working, slots
    )


def widened(tree: Any) -> Any:
    """Returns the tree with each narrow kernel as an array of float32, as the layer that asks for it takes it."""
    return jax.tree.map(
        lambda leaf: _widen(leaf.value, leaf.slot) if _is_narrow(leaf) else leaf, tree, is_leaf=_is_narrow
    )


def _is_narrow(leaf: Any) -> bool:
    return isinstance(leaf, NarrowKernel)


@jax.custom_vjp
def _widen(value: jax.Array, slot: jax.Array) -> jax.Array:
    return value.astype(slot.dtype)


def _forward(value: jax.Array, slot: jax.Array) -> tuple[jax.Array, Any]:
    return _widen(value, slot), jnp.zeros((), value.dtype)


def _backward(of_type: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros(gradient.shape, of_type.dtype), gradient


_widen.defvjp(_forward, _backward)
