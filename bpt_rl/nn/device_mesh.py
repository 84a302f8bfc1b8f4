"""The devices that share a training step: what lies where, in one place.

| arrays | data | fsdp | context |
|---|---|---|---|
| matrices of layers, and their moments | copied | split by rows | split by rows |
| all other parameters | copied | copied | copied |
| rows of a batch | split | split | copied |
| tokens of a row | copied | copied | split |

Each device of fsdp and context together has an equal share of the rows of every matrix, and the whole matrix only while
its layer computes. Where the widths of the model do not divide among both (`matrix_axes`), devices of fsdp alone split
them, and each along context has its neighbours' share too.

The caches of chains are split as `bpt_rl.nn.chain_cache` says: chains over data, their tokens over context.

The mesh may be of several processes. Those of one lie side by side along the context axis where they fit, so that what
is sent most often stays inside a host.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bpt_rl.config import ModelConfig
from bpt_rl.mesh_config import MeshConfig, check_shares
from bpt_rl.nn.context_parallel import ContextAxis, MethodChoice, choose_method, key_repeats
from bpt_rl.nn.working_copy import LAYERS
from bpt_rl.types import PackedBatch

_log = logging.getLogger(__name__)

Axis = Literal["data", "fsdp", "context"]
"""Of a mesh."""
AXES: tuple[Axis, Axis, Axis] = ("data", "fsdp", "context")
DATA, FSDP, CONTEXT = AXES
BATCH_SPEC = PartitionSpec((DATA, FSDP), CONTEXT)
"""Of arrays [B, T, ...], the steps of a row in contiguous parts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing:
    """What a model must know of the other devices, inside `jax.shard_map`."""

    context: ContextAxis | None
    """None if this device has whole rows."""
    matrix_axes: tuple[Axis, ...]
    """Of the mesh, whose devices have a part of the layers' matrices each; none if this device has them whole."""

    def gathered(self, layer: Any) -> Any:
        """Returns one layer's parameters with whole matrices; their gradients are summed and split again."""
        axes = self.matrix_axes
        if not axes:
            return layer
        return jax.tree.map(
            lambda leaf: jax.lax.all_gather(leaf, axes, axis=0, tiled=True) if leaf.ndim == 2 else leaf, layer
        )


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns the mesh of the first devices of each process, equally many of all.

    Raises:
      ValueError: If there are too few, or processes cannot share them, or have not met.
    """
    if config.coordinator:
        raise ValueError(
            "Several processes train one run, with `bpt-rl train`, and do nothing else together; got mesh.coordinator "
            f"{config.coordinator!r}. Leave it out, and mesh.num_processes and mesh.process_id."
        )
    num_processes = jax.process_count()
    check_shares(config.num_devices, num_processes)
    each = config.num_devices // num_processes
    by_process = [[d for d in jax.devices() if d.process_index == i] for i in range(num_processes)]
    fewest = min(by_process, key=len)
    if each > len(fewest):
        where = f" in process {fewest[0].process_index} of {num_processes}" if num_processes > 1 else ""
        raise ValueError(
            f"A mesh must not have more devices than there are; got mesh.data {config.data}, mesh.fsdp {config.fsdp} "
            f"and mesh.context {config.context}, {each} in all{where}, and {len(fewest)} of kind "
            f"{fewest[0].device_kind!r}. Use a smaller mesh, or try it on a processor with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={each}."
        )
    devices = np.array([devices[:each] for devices in by_process])
    return Mesh(devices.reshape(config.data, config.fsdp, config.context), AXES)


def check_rows(num_rows: int, config: MeshConfig) -> None:
    """Refuses a micro-batch whose rows the devices cannot share.

    Raises:
      ValueError: If they cannot.
    """
    if num_rows % (config.data * config.fsdp):
        raise ValueError(
            "The rows of a micro-batch must be a multiple of mesh.data * mesh.fsdp; got "
            f"{num_rows} rows for {config.data} * {config.fsdp} devices. Change data.batch_size or the mesh."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShare:
    """Which of equal shares of a batch's rows a process makes; several may make the same."""

    index: int
    num_shares: int


def row_share(mesh: Mesh | None) -> RowShare:
    """Returns the rows that the devices of this process have some of; all without a mesh.

    Raises:
      ValueError: If another process has some of them, but not all.
    """
    if mesh is None:
        return RowShare(index=0, num_shares=1)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(-1, mesh.shape[CONTEXT])
    mine = np.flatnonzero((owners == jax.process_index()).any(axis=1))
    if len(owners) % len(mine) or mine[0] % len(mine):
        each = mesh.size // jax.process_count()
        raise ValueError(
            "Either mesh.context or the devices of a process must be a multiple of the other; got "
            f"{mesh.shape[CONTEXT]} and {each}. Change mesh.*, or how many processes there are."
        )
    return RowShare(index=int(mine[0]) // len(mine), num_shares=len(owners) // len(mine))


def placed_batch(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """Returns a batch of which each device has its own rows and steps alone, in equal contiguous parts.

    Args:
      batch: The rows of this process's share, all their steps; each process calls this with its own.
      mesh: Of all devices.
    """
    share = row_share(mesh)
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def place(leaf: Any) -> jax.Array:
        num_rows, num_steps = leaf.shape[:2]
        first = share.index * num_rows
        shape = (share.num_shares * num_rows, num_steps + _num_padded(num_steps, mesh), *leaf.shape[2:])

        def part(index: Any) -> Any:
            (begin, end, _), (start, stop, _) = (
                of.indices(size) for of, size in zip(index[:2], shape, strict=False)
            )
            # A slice ends with the steps that there are.
            found = leaf[begin - first : end - first, start:stop]
            return padded_behind(found, stop - start - found.shape[1])

        return jax.make_array_from_callback(shape, sharding, part)

    placed: PackedBatch = jax.tree.map(place, batch)
    return placed


def with_whole_chunks(leaf: Any, mesh: Mesh) -> Any:
    """Returns an array [B, T, ...] padded behind its last step to what the devices of a row share equally."""
    return padded_behind(leaf, _num_padded(leaf.shape[1], mesh))


def _num_padded(num_steps: int, mesh: Mesh) -> int:
    # Two chunks a device, which zigzag placement needs.
    num_devices = mesh.shape[CONTEXT]
    return -num_steps % (2 * num_devices if num_devices > 1 else 1)


def padded_behind(leaf: Any, num_steps: int) -> Any:
    """Returns an array [B, T, ...] with so many steps of zeros behind, of NumPy if it is one of NumPy's."""
    if not num_steps:
        return leaf
    like = np if isinstance(leaf, np.ndarray) else jnp
    return like.pad(leaf, [(0, 0), (0, num_steps), *((0, 0) for _ in leaf.shape[2:])])


def matrix_axes(widths: Iterable[int], *, fsdp: int, context: int) -> tuple[Axis, ...]:
    """Returns the axes of the mesh that split the rows of matrices: both, or fsdp alone where both do not divide.

    Args:
      widths: Rows of the matrices.
      fsdp: Devices along that axis, which must divide all widths.
      context: Devices along that axis.
    """
    are_both = all(width % (fsdp * context) == 0 for width in widths)
    sizes: dict[Axis, int] = {FSDP: fsdp, CONTEXT: context if are_both else 1}
    return tuple(axis for axis, size in sizes.items() if size > 1)


def parameter_specs(tree: Any, mesh: Mesh) -> Any:
    """Returns how parameters, or an optimizer's state of them, are split."""

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        # Layers are stacked on the first axis, and their vectors are not worth it.
        return leaf.ndim == 3 and LAYERS in [getattr(key, "key", None) for key in path]

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    widths = [leaf.shape[1] for path, leaf in leaves if is_matrix(path, leaf)]
    axes = matrix_axes(widths, fsdp=mesh.shape[FSDP], context=mesh.shape[CONTEXT])
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: PartitionSpec(None, axes) if is_matrix(path, leaf) else PartitionSpec(), tree
    )


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns where parameters, or an optimizer's state of them, lie."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(tree, mesh))


def sharing_of(mesh: MeshConfig, model: ModelConfig, *, num_tokens: int) -> Sharing:
    """Returns what a model must know whose rows of `num_tokens` tokens are shared.

    Raises:
      ValueError: If heads or matrices do not divide among the devices.
    """
    check_matrices(mesh, model)
    axis = None
    if mesh.context > 1:
        choice = attention_choice(mesh, model, num_tokens=num_tokens)
        if mesh.attention == "auto":
            _log_choice(choice)
        axis = ContextAxis(name=CONTEXT, num_devices=mesh.context, method=choice.method)
    axes = matrix_axes(matrix_widths(model), fsdp=mesh.fsdp, context=mesh.context)
    return Sharing(context=axis, matrix_axes=axes)


def matrix_widths(model: ModelConfig) -> tuple[int, int]:
    """Returns the rows that matrices of layers have: the stream's entries, and the feedforward's."""
    return model.embed_dim, model.feedforward_dim or 4 * model.embed_dim


def check_matrices(mesh: MeshConfig, model: ModelConfig) -> None:
    """Refuses matrices that the devices of `mesh.fsdp` cannot share; those of `mesh.context` share what they can.

    Raises:
      ValueError: If they cannot.
    """
    stream, hidden = matrix_widths(model)
    if stream % mesh.fsdp or hidden % mesh.fsdp:
        raise ValueError(
            f"mesh.fsdp must divide the width of the model and of its feedforward; got {mesh.fsdp}, {stream} "
            f"and {hidden}. Use a divisor, or mesh.data for devices that copy the parameters."
        )


def attention_choice(mesh: MeshConfig, model: ModelConfig, *, num_tokens: int) -> MethodChoice:
    """Returns how attention crosses the devices of `mesh.context`, and why.

    Args:
      mesh: Of the devices.
      model: Whose heads they share.
      num_tokens: Of a row.

    Raises:
      ValueError: If ulysses is asked for and the heads do not divide.
    """
    # Groups of heads attend one after another, and each group must divide.
    num_heads = model.num_heads // model.head_groups
    num_kv_heads = (model.num_kv_heads or model.num_heads) // model.head_groups
    if mesh.attention == "ulysses":
        key_repeats(num_heads, num_kv_heads, mesh.context)
    if mesh.attention != "auto":
        return MethodChoice(mesh.attention, "asked for")
    return choose_method(
        num_heads=num_heads, num_kv_heads=num_kv_heads, num_devices=mesh.context, num_tokens=num_tokens
    )


@functools.cache
def _log_choice(choice: MethodChoice) -> None:
    _log.info("Attention over devices: auto chose %s.", choice)
