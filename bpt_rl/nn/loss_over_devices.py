"""The action loss of a batch whose rows, and whose rows' steps, several devices share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float

from bpt_rl.config import ModelConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.context_parallel import ContextAxis
from bpt_rl.nn.device_mesh import AXES, BATCH_SPEC, make_mesh, parameter_specs, sharing_of
from bpt_rl.nn.trajectory_model import Outcomes, TrajectoryModel, action_loss_sums, previous_outcomes
from bpt_rl.nn.zigzag import placed
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
    a fused token carries of the step before it is looked up before steps are dealt out.

    Args:
      graph: Of the model.
      params: As `bpt_rl.nn.device_mesh.parameter_specs` splits them, or to be so split.
      batch: Normalised.
      key: Draws dropout; none without it.
      model: Configuration of the model.
      mesh: Of the devices.

    Raises:
      ValueError: If rows, heads or matrices do not divide among the devices.
    """
    B, T = batch.step.shape
    if B % (mesh.data * mesh.fsdp):
        raise ValueError(
            "The rows of a micro-batch must be a multiple of mesh.data * mesh.fsdp; got "
            f"{B} rows for {mesh.data} * {mesh.fsdp} devices. Change data.batch_size or the mesh."
        )
    per_step = LAYOUTS[model.layout]
    sharing = sharing_of(mesh, model, num_tokens=T * per_step, has_segments=batch.segment_ids is not None)
    previous = previous_outcomes(batch) if per_step == 1 else None

    def local(
        params: Any, batch: PackedBatch, previous: Outcomes | None, key: jax.Array | None
    ) -> Float[jax.Array, ""]:
        if key is not None:
            for axis in AXES:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        predicted = nnx.merge(graph, params)(batch, key, previous=previous, sharing=sharing)
        sums = action_loss_sums(predicted, batch.action, batch.loss_mask, model.action_distribution)
        total, count = jax.lax.psum(sums, AXES)
        loss: jax.Array = total / jnp.maximum(count, 1)
        return loss

    whole = PartitionSpec()
    shared = jax.shard_map(
        local,
        mesh=make_mesh(mesh),
        in_specs=(parameter_specs(params), BATCH_SPEC, BATCH_SPEC, whole),
        out_specs=whole,
        # Loops inside begin from constants, of which JAX believes that they never differ between devices.
        check_vma=False,
    )
    return shared(params, _dealt(batch, sharing.context), _dealt(previous, sharing.context), key)


def _dealt(tree: Any, axis: ContextAxis | None) -> Any:
    """Returns arrays [B, T, ...] with steps padded to whole chunks and placed as the axis says.

    Padding is behind all steps, where a causal model does not look, has segment id 0 and does not count.
    """
    if axis is None:
        return tree

    def deal(x: Any) -> jax.Array:
        widths = [(0, 0), (0, -x.shape[1] % axis.num_chunks), *((0, 0) for _ in x.shape[2:])]
        return placed(jnp.pad(x, widths), axis.num_devices, axis.placement)

    return jax.tree.map(deal, tree)
