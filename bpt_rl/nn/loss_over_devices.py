"""The action loss of a batch whose rows, and whose rows' steps, several devices share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float

from bpt_rl.config import ModelConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.dealing import dealt_with_previous
from bpt_rl.nn.device_mesh import (
    AXES,
    BATCH_SPEC,
    check_rows,
    make_mesh,
    parameter_specs,
    sharing_of,
    with_whole_chunks,
)
from bpt_rl.nn.trajectory_model import TrajectoryModel, action_loss_sums
from bpt_rl.types import LAYOUTS, PackedBatch


def loss_over_devices(
    graph: nnx.GraphDef[TrajectoryModel],
    params: Any,
    batch: PackedBatch,
    key: jax.Array | None,
    *,
    model: ModelConfig,
    mesh: MeshConfig,
) -> Float[jax.Array, ""]:
    """Returns what `action_loss` would on one device; dropout draws otherwise, for each device has its own.

    All tokens of a step lie on one device, and each predicts from its own tokens: attention alone looks elsewhere. What
    a fused token carries of the step before it is looked up before steps are dealt out. Steps that are padded lie
    behind all others, where a causal model does not look, have segment id 0 and do not count.

    Args:
      graph: Of the model.
      params: As `bpt_rl.nn.device_mesh.parameter_specs` splits them, or to be so split.
      batch: Normalised, as `bpt_rl.nn.device_mesh.placed_batch` places it, or to be so split.
      key: Draws dropout; none without it.
      model: Configuration of the model.
      mesh: Of the devices.

    Raises:
      ValueError: If rows, heads or matrices do not divide among the devices.
    """
    check_rows(batch.step.shape[0], mesh)
    per_step = LAYOUTS[model.layout]
    num_tokens = batch.step.shape[1] * per_step
    sharing = sharing_of(mesh, model, num_tokens=num_tokens)
    axis = sharing.context

    def local(params: Any, batch: PackedBatch, key: jax.Array | None) -> Float[jax.Array, ""]:
        if key is not None:
            for name in AXES:
                key = jax.random.fold_in(key, jax.lax.axis_index(name))
        batch, previous = dealt_with_previous(batch, axis, model.layout)
        predicted = nnx.merge(graph, params)(batch, key, previous=previous, sharing=sharing)
        sums = action_loss_sums(predicted, batch.action, batch.loss_mask, model.action_distribution)
        total, count = jax.lax.psum(sums, AXES)
        loss: jax.Array = total / jnp.maximum(count, 1)
        return loss

    whole, devices = PartitionSpec(), make_mesh(mesh)
    shared = jax.shard_map(
        local,
        mesh=devices,
        in_specs=(parameter_specs(params, devices), BATCH_SPEC, whole),
        out_specs=whole,
        # Loops inside begin from constants, of which JAX believes that they never differ between devices.
        check_vma=False,
    )
    return shared(params, jax.tree.map(lambda leaf: with_whole_chunks(leaf, devices), batch), key)
