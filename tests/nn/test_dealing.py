"""Steps dealt out by the devices that have them, against an array that is whole."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.context_parallel import ContextAxis
from bpt_rl.nn.dealing import dealt, with_step_before
from bpt_rl.nn.device_mesh import RowShare, make_mesh, placed_batch, row_share
from bpt_rl.nn.zigzag import placed
from bpt_rl.types import PackedBatch

pytestmark = pytest.mark.devices(8)

STEPS = PartitionSpec(None, "context")


def drawn(num_rows, num_steps):
    """Bits of every kind, NaN among them: what travels is moved, not computed with."""
    generator = np.random.default_rng(0)

    def leaf(*inner, dtype=np.float32):
        bits = generator.integers(-(2**31), 2**31, (num_rows, num_steps, *inner), np.int32)
        return bits.view(dtype)

    names = set(PackedBatch._fields)
    wide = {"observation": leaf(3), "action": leaf(2)}
    whole = {name: leaf(dtype=np.int32) for name in ("step", "episode", "segment_ids")}
    return PackedBatch(**wide, **whole, **{name: leaf() for name in names - wide.keys() - whole.keys()})


def bits(tree):
    return [np.asarray(leaf).view(np.int32) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("num_devices", [2, 3, 8])
def test_devices_deal_out_steps_as_they_would_be_placed(num_devices):
    batch = drawn(2, 4 * num_devices)
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("context",))
    axis = ContextAxis(name="context", num_devices=num_devices, method="ring")
    share = jax.shard_map(
        lambda batch: (dealt(batch, axis), with_step_before(batch, axis)),
        mesh=mesh,
        in_specs=STEPS,
        out_specs=STEPS,
    )
    zigzag, extended = jax.jit(share)(batch)
    expected = jax.tree.map(lambda leaf: placed(jax.numpy.asarray(leaf), num_devices, "zigzag"), batch)
    np.testing.assert_equal(bits(zigzag), bits(expected))

    def part(leaf, i):
        before = leaf[:, 4 * i - 1 : 4 * i] if i else np.zeros_like(leaf[:, :1])
        return np.concatenate([before, leaf[:, 4 * i : 4 * i + 4]], axis=1)

    parts = [jax.tree.map(lambda leaf, i=i: part(leaf, i), batch) for i in range(num_devices)]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    np.testing.assert_equal(bits(extended), bits(joined))


def test_each_device_is_given_its_rows_and_steps_and_nothing_else():
    batch, mesh = drawn(4, 13), make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    assert row_share(mesh) == RowShare(index=0, num_shares=1)
    for leaf, whole in zip(placed_batch(batch, mesh), batch, strict=True):
        padded = np.pad(whole, [(0, 0), (0, 3), *((0, 0) for _ in whole.shape[2:])])
        for shard in leaf.addressable_shards:
            row, part = divmod(shard.device.id, 2)
            mine = padded[row : row + 1, 8 * part : 8 * part + 8]
            np.testing.assert_array_equal(np.asarray(shard.data).view(np.int32), mine.view(np.int32))
