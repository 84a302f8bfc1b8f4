"""The devices that share a training step: what lies where, in one place.

| arrays | data | fsdp | context |
|---|---|---|---|
| matrices of layers, and their moments | copied | split by rows | copied |
| all other parameters | copied | copied | copied |
| rows of a batch | split | split | copied |
| tokens of a row | copied | copied | split |
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bpt_rl.config import ModelConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.attention import model_implementation
from bpt_rl.nn.context_parallel import ContextAxis, MethodChoice, choose_method, key_repeats
from bpt_rl.nn.working_copy import LAYERS

_log = logging.getLogger(__name__)

DATA, FSDP, CONTEXT = AXES = ("data", "fsdp", "context")
BATCH_SPEC = PartitionSpec((DATA, FSDP), CONTEXT)
"""Of arrays [B, T, ...]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing:
    """What a model must know of the other devices, inside `jax.shard_map`."""

    context: ContextAxis | None
    """None if this device has whole rows."""
    has_split_matrices: bool
    """Whether this device has a part of the layers' matrices."""

    def gathered(self, layer: Any) -> Any:
        """Returns one layer's parameters with whole matrices; their gradients are summed and split again."""
        if not self.has_split_matrices:
            return layer
        return jax.tree.map(
            lambda leaf: jax.lax.all_gather(leaf, FSDP, axis=0, tiled=True) if leaf.ndim == 2 else leaf, layer
        )


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns the mesh of this process's first devices.

    Raises:
      ValueError: If there are too few.
    """
    devices = jax.devices()
    if config.num_devices > len(devices):
        raise ValueError(
            f"A mesh must not have more devices than there are; got mesh.data {config.data}, mesh.fsdp {config.fsdp} "
            f"and mesh.context {config.context}, {config.num_devices} in all, and {len(devices)} of kind "
            f"{devices[0].device_kind!r}. Use a smaller mesh, or try it on a processor with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={config.num_devices}."
        )
    shape = (config.data, config.fsdp, config.context)
    return Mesh(np.array(devices[: config.num_devices]).reshape(shape), AXES)


def parameter_specs(tree: Any) -> Any:
    """Returns how parameters, or an optimizer's state of them, are split."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        # Layers are stacked on the first axis, and their vectors are not worth it.
        is_matrix = leaf.ndim == 3 and LAYERS in [getattr(key, "key", None) for key in path]
        return PartitionSpec(None, FSDP) if is_matrix else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns where parameters, or an optimizer's state of them, lie."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(tree))


def sharing_of(mesh: MeshConfig, model: ModelConfig, *, num_tokens: int, has_segments: bool) -> Sharing:
    """Returns what a model must know whose rows of `num_tokens` tokens are shared.

    Raises:
      ValueError: If heads or matrices do not divide among the devices.
    """
    hidden = model.feedforward_dim or 4 * model.embed_dim
    if model.embed_dim % mesh.fsdp or hidden % mesh.fsdp:
        raise ValueError(
            f"mesh.fsdp must divide the width of the model and of its feedforward; got {mesh.fsdp}, {model.embed_dim} "
            f"and {hidden}. Use a divisor, or mesh.data for devices that copy the parameters."
        )
    axis = None
    if mesh.context > 1:
        choice = _choose(mesh, model, num_tokens, has_segments)
        axis = ContextAxis(name=CONTEXT, num_devices=mesh.context, method=choice.method)
    return Sharing(context=axis, has_split_matrices=mesh.fsdp > 1)


def _choose(mesh: MeshConfig, model: ModelConfig, num_tokens: int, has_segments: bool) -> MethodChoice:
    # Groups of heads attend one after another, and each group must divide.
    num_heads = model.num_heads // model.head_groups
    num_kv_heads = (model.num_kv_heads or model.num_heads) // model.head_groups
    if mesh.attention == "ulysses":
        key_repeats(num_heads, num_kv_heads, mesh.context)
    if mesh.attention != "auto":
        return MethodChoice(mesh.attention, "asked for")
    kind = jax.devices()[0].device_kind
    fused = model_implementation(model, device_kind=kind, has_segments=has_segments) == "cudnn"
    choice = choose_method(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_devices=mesh.context,
        num_tokens=num_tokens,
        has_fused_kernel=fused,
    )
    _log_choice(choice)
    return choice


@functools.cache
def _log_choice(choice: MethodChoice) -> None:
    _log.info("Attention over devices: auto chose %s.", choice)
