"""The caches of chains, on one device or on several of one process: what lies where, and the programs that use them.

| arrays | data | context |
|---|---|---|
| keys and values, [B, H_kv, C, K] | chains split | tokens split, step by step in turn |
| steps that a context begins with | chains split | steps split, as in training |
| a step's inputs, and its actions | chains split | copied |
| parameters | copied | copied |
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from bpt_rl.config import ModelConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.cached_attention import Stripes
from bpt_rl.nn.context_parallel import ContextAxis
from bpt_rl.nn.dealing import dealt_with_previous
from bpt_rl.nn.device_mesh import BATCH_SPEC, CONTEXT, DATA, make_mesh, padded_behind, sharing_of
from bpt_rl.nn.hashed_graph import HashedGraph
from bpt_rl.nn.step_packing import key_of, unpack
from bpt_rl.nn.transformer import KeyValueCache
from bpt_rl.types import LAYOUTS, PackedBatch

ROWS_SPEC, CACHE_SPEC = PartitionSpec(DATA), PartitionSpec(DATA, None, CONTEXT)
"""Of arrays [B, ...], and of a layer's keys or values."""
CACHE_SPECS = KeyValueCache(CACHE_SPEC, CACHE_SPEC, ROWS_SPEC)  # type: ignore[arg-type]
"""Of a cache."""
_WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheDevices:
    """The devices that share the caches of a model.

    Raises:
      ValueError: If they were to split parameters, or are not one process's.
    """

    model: ModelConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if self.mesh.coordinator:
            raise ValueError(
                "Chains are played by one process, with as many of its devices as it is told; got mesh.coordinator "
                f"{self.mesh.coordinator!r}. Leave it out."
            )
        if self.mesh.fsdp > 1:
            raise ValueError(
                "Devices that act have all parameters, which are small beside caches, so mesh.fsdp must be 1; got "
                f"{self.mesh.fsdp}. Use mesh.data to share the chains, or mesh.context to share each chain's cache."
            )

    @functools.cached_property
    def devices(self) -> Mesh | None:
        """The mesh; None for one device, whose programs know of none."""
        return make_mesh(self.mesh) if self.mesh.num_devices > 1 else None

    @property
    def stripes(self) -> Stripes | None:
        """How the tokens of a cache lie; None where each device has whole rows."""
        if self.mesh.context == 1:
            return None
        step_tokens = LAYOUTS[self.model.layout]
        return Stripes(name=CONTEXT, num_devices=self.mesh.context, step_tokens=step_tokens)

    def shares(self, num_tokens: int) -> tuple[ContextAxis, Stripes] | None:
        """Returns how contexts of so many tokens lie while they are filled in, and how they lie in the cache.

        Raises:
          ValueError: If the heads do not divide among the devices and must.
        """
        sharing = sharing_of(self.mesh, self.model, num_tokens=num_tokens)
        return (sharing.context, self.stripes) if sharing.context and self.stripes else None

    def sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        """Returns where arrays split so lie; None for one device."""
        return NamedSharding(self.devices, spec) if self.devices else None

    def check_rows(self, num_rows: int) -> None:
        """Refuses chains that do not divide among the devices.

        Raises:
          ValueError: If they do not.
        """
        if num_rows % self.mesh.data:
            raise ValueError(
                f"The chains that act at once must be a multiple of mesh.data; got {num_rows} chains and mesh.data "
                f"{self.mesh.data}. Change num_chains or the mesh."
            )

    def cache_bytes(self, num_rows: int, num_steps: int) -> int:
        """Returns the bytes of keys and values that each device has of so many contexts of so many steps."""
        model = self.model
        heads = model.num_kv_heads or model.num_heads
        numbers = 2 * model.num_layers * heads * (model.embed_dim // model.num_heads) * LAYOUTS[model.layout]
        return (
            numbers * jnp.dtype(model.compute_dtype).itemsize * num_rows * num_steps // self.mesh.num_devices
        )

    def dealt_rows(
        self, rows: Int[np.ndarray, "contexts"], num_rows: int
    ) -> tuple[Int[np.ndarray, "dealt"], Int[np.ndarray, "dealt"]]:
        """Returns rows of a cache as each device of `mesh.data` has equally many of them in turn.

        Of rows 0, 1 and 5 of a cache of six on two devices: 0, 1, 5 and a 0 that fills up; and where these are on
        their device: 0, 1, 2 and 4, which is behind its last row.

        Args:
          rows: Ascending; not empty.
          num_rows: Of the cache.
        """
        per_device = num_rows // self.mesh.data
        device, place = np.divmod(rows, per_device)
        most = int(np.bincount(device).max())
        source = np.full((self.mesh.data, most), rows[0])
        # Each its own, for places must differ.
        local = np.broadcast_to(per_device + np.arange(most), source.shape).copy()
        for i in range(self.mesh.data):
            count = int((device == i).sum())
            source[i, :count], local[i, :count] = rows[device == i], place[device == i]
        return source.reshape(-1), local.reshape(-1).astype(np.int32)

    def over(self, local: Any, in_specs: Any, out_specs: Any) -> Any:
        """Returns a function of devices' shares as one of whole arrays; as it is for one device."""
        if self.devices is None:
            return local
        return jax.shard_map(
            local,
            mesh=self.devices,
            in_specs=in_specs,
            out_specs=out_specs,
            # What each device of `context` computes alike, JAX cannot know to be so.
            check_vma=False,
        )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    graph: HashedGraph,
    place: CacheDevices,
    params: Any,
    cache: KeyValueCache,
    packed: Int[Any, "B N"],
    key: jax.Array | None,
) -> tuple[KeyValueCache, jax.Array]:
    """Returns the cache with one step more, and the actions of that step.

    Args:
      graph: Of a `TrajectoryModel`.
      place: Where the cache lies.
      params: Of the model.
      cache: Of contexts so far; donated.
      packed: Inputs of the step, and the tokens of each context. The caller counts these: to clear a context is to
        forget how many they were.
      key: Draws actions, those of each call with a key of its own; their mean without one.
    """

    def local(params: Any, cache: KeyValueCache, packed: jax.Array) -> Any:
        model = graph.merge(params)
        step, length = unpack(packed, model.action_dim)
        return model.decode(step, cache._replace(length=length), place.stripes)

    in_specs, out_specs = (_WHOLE, CACHE_SPECS, ROWS_SPEC), (ROWS_SPEC, CACHE_SPECS)
    action, cache = place.over(local, in_specs, out_specs)(params, cache, packed)
    return cache, action.chosen(None if key is None else key_of(key, packed))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prefill(
    graph: HashedGraph,
    place: CacheDevices,
    params: Any,
    cache: KeyValueCache,
    batch: PackedBatch,
    rows: jax.Array,
    num_steps: jax.Array,
) -> KeyValueCache:
    """Returns the cache with contexts that begin anew.

    Args:
      graph: Of a `TrajectoryModel`.
      place: Where the cache lies.
      params: Of the model.
      cache: To be filled; donated.
      batch: Contexts, normalised, dealt out as `CacheDevices.dealt_rows` says, padding behind each.
      rows: Where each goes on its device.
      num_steps: Of each context.
    """
    per_step = LAYOUTS[place.model.layout]
    shares = place.shares(batch.step.shape[1] * per_step)

    def local(params: Any, cache: Any, batch: PackedBatch, *rest: Any) -> Any:
        previous = None
        if shares:
            batch, previous = dealt_with_previous(batch, shares[0], place.model.layout)
        return graph.merge(params).prefill(batch, cache, *rest, previous=previous, shares=shares)

    in_specs = (_WHOLE, CACHE_SPECS, BATCH_SPEC, ROWS_SPEC, ROWS_SPEC)
    steps = _padded(batch, shares[0]) if shares else batch
    filled: KeyValueCache = place.over(local, in_specs, CACHE_SPECS)(params, cache, steps, rows, num_steps)
    return filled


def _padded(batch: PackedBatch, axis: ContextAxis) -> PackedBatch:
    """Returns the batch with steps behind, until each chunk has equally many for each device.

    A causal model does not look behind, and what is padded goes to slots that are not seen before they are written.
    """
    num_more = -batch.step.shape[1] % (axis.num_chunks * axis.num_devices)
    padded: PackedBatch = jax.tree.map(lambda leaf: padded_behind(leaf, num_more), batch)
    return padded


def grow(cache: KeyValueCache, num_more: int, place: CacheDevices) -> KeyValueCache:
    """Returns a cache with room for more tokens; the one given is gone, array by array: never two at once.

    Args:
      cache: To be grown.
      num_more: Tokens, over all devices, and a multiple of those of a step on each.
      place: Where the cache lies. Each device pads its own part.
    """

    def moved(array: jax.Array) -> jax.Array:
        longer: jax.Array = jax.block_until_ready(_longer(array, num_more // place.mesh.context, place))
        array.delete()
        return longer

    return cache._replace(keys=tuple(map(moved, cache.keys)), values=tuple(map(moved, cache.values)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _longer(array: jax.Array, num_more: int, place: CacheDevices) -> jax.Array:
    def local(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, 0), (0, 0), (0, num_more), (0, 0)))

    longer: jax.Array = place.over(local, (CACHE_SPEC,), CACHE_SPEC)(array)
    return longer
