"""The loss of a batch that eight virtual devices share, against the loss on one."""

import collections
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from bpt_rl.config import ModelConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.device_mesh import make_mesh, parameter_specs
from bpt_rl.nn.loss_over_devices import loss_over_devices
from bpt_rl.nn.trajectory_model import TrajectoryModel, action_loss
from bpt_rl.types import PackedBatch

pytestmark = pytest.mark.devices(8)

B, T = 8, 13


def model_config(layout, **changes):
    settings = {
        "layout": layout,
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "feedforward_dim": 24,
        "dropout": 0.0,
        "activation": "silu",
        "implementation": "blockwise",
        "query_chunk_size": 8,
        "key_chunk_size": 8,
        "activations": "recompute",
    }
    return ModelConfig(**(settings | changes))


@pytest.fixture(scope="module")
def drawn():
    """Eight rows of thirteen steps: two chains each, and padding."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 6, (B, 2))
    steps = np.arange(T)
    ids = 1 + (steps >= lengths[:, :1]).astype(np.int32)
    ids[steps >= lengths.sum(axis=1, keepdims=True) + 2] = 0
    return PackedBatch(
        observation=generator.normal(size=(B, T, 3)).astype(np.float32),
        action=generator.uniform(-1, 1, (B, T, 2)).astype(np.float32),
        reward=generator.random((B, T)).astype(np.float32),
        return_to_go=generator.random((B, T)).astype(np.float32),
        completion=generator.integers(0, 2, (B, T)).astype(np.float32),
        step=generator.integers(0, 5, (B, T)).astype(np.int32),
        episode=np.zeros((B, T), np.int32),
        segment_ids=ids,
        loss_mask=(generator.random((B, T)) < 0.7) * (ids > 0).astype(np.float32),
    )


@pytest.fixture(scope="module")
def alone(draw_parameters, drawn):
    """Returns parameters, loss and gradient on one device of a layout; each computed once."""

    @functools.cache
    def made(layout, has_segments, feedforward_dim=24):
        model = model_config(
            layout, implementation="reference", activations="keep", feedforward_dim=feedforward_dim
        )
        graph, params = draw_parameters(lambda: TrajectoryModel(model, 3, 2, 5, nnx.Rngs(0)))
        batch = drawn if has_segments else drawn._replace(segment_ids=None)

        def loss(params):
            predicted = nnx.merge(graph, params)(batch)
            return action_loss(predicted, batch.action, batch.loss_mask, "deterministic")

        return params, *jax.jit(jax.value_and_grad(loss))(params)

    return made


MESHES = [
    ("return_state_action", {"context": 8}, True),
    ("fused", {"fsdp": 2, "context": 4, "attention": "ring"}, False),
    ("return_state_action", {"data": 2, "context": 4, "attention": "ulysses"}, True),
    ("fused", {"data": 2, "fsdp": 2, "context": 2}, False),
    ("return_state_action", {"fsdp": 8}, True),
]


def assert_alike(model, mesh, batch, params, expected, expected_gradient):
    graph = nnx.graphdef(nnx.eval_shape(lambda: TrajectoryModel(model, 3, 2, 5, nnx.Rngs(0))))

    def loss(params, batch):
        return loss_over_devices(graph, params, batch, None, model=model, mesh=mesh)

    got, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient), strict=True
    )
    for (path, leaf), twin in leaves:
        # Both round in float32, but sum in another order.
        assert np.abs(leaf - twin).max() <= 1e-5 * np.abs(twin).max(), path


@pytest.mark.parametrize(("layout", "mesh", "has_segments"), MESHES)
def test_devices_together_have_the_loss_and_the_gradient_of_one(layout, mesh, has_segments, drawn, alone):
    batch = drawn if has_segments else drawn._replace(segment_ids=None)
    assert_alike(model_config(layout), MeshConfig(**mesh), batch, *alone(layout, has_segments))


def test_matrices_that_all_devices_cannot_share_are_split_by_those_of_fsdp(drawn, alone):
    """A feedforward of 20 entries: two devices of fsdp can share its rows, two of context too, but not four of it."""
    params, *expected = alone("fused", False, 20)
    model, batch = model_config("fused", feedforward_dim=20), drawn._replace(segment_ids=None)
    for context, axes in ((2, ("fsdp", "context")), (4, ("fsdp",))):
        mesh = MeshConfig(fsdp=2, context=context, attention="ring")
        splits = {spec for spec in jax.tree.leaves(parameter_specs(params, make_mesh(mesh))) if spec}
        assert splits == {PartitionSpec(None, axes)}
    assert_alike(model, mesh, batch, params, *expected)


def test_each_device_draws_dropout_of_its_own(drawn, draw_parameters):
    """On a device with one row, what one device would draw with a key made of its place in the mesh."""
    model = model_config("fused", dropout=0.3)
    graph, params = draw_parameters(lambda: TrajectoryModel(model, 3, 2, 5, nnx.Rngs(0)))
    # Rows all alike: only masks tell them apart.
    batch = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, axis=0), drawn)
    mesh, key = MeshConfig(data=2, fsdp=2), jax.random.key(3)

    @jax.jit
    def alone(row, key):
        predicted = nnx.merge(graph, params)(row, key)
        return action_loss(predicted, row.action, row.loss_mask, "deterministic")

    def folded(i, j):
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, i), j), 0)

    first = jax.tree.map(lambda leaf: leaf[:1], batch)
    losses = [float(alone(first, folded(i, j))) for i in range(2) for j in range(2)]
    assert len(set(losses)) == 4
    shared = jax.jit(lambda key: loss_over_devices(graph, params, batch, key, model=model, mesh=mesh))
    np.testing.assert_allclose(shared(key), np.mean(losses), rtol=1e-5)
    assert shared(key) == shared(key) != shared(jax.random.key(4))


def test_devices_of_a_row_draw_dropout_of_their_own_and_none_at_rate_0(drawn, draw_parameters):
    def loss(rate, key):
        model = model_config("fused", dropout=rate)
        graph, params = draw_parameters(lambda: TrajectoryModel(model, 3, 2, 5, nnx.Rngs(0)))
        mesh = MeshConfig(context=2, attention="ring")
        batch = jax.tree.map(lambda leaf: leaf[:1], drawn)
        return jax.jit(
            lambda params, batch, key: loss_over_devices(graph, params, batch, key, model=model, mesh=mesh)
        )(params, batch, key)

    key, other = jax.random.key(3), jax.random.key(4)
    assert loss(0.0, key) == loss(0.0, None)
    assert loss(0.3, key) == loss(0.3, key) != loss(0.3, other)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 3}, "got 8 rows for 3"),
        ({"fsdp": 8, "context": 2}, "16 in all, and 8 of kind"),
        ({"fsdp": 4, "data": 2}, "got 4, 16 and 30"),
        ({"context": 8, "attention": "ulysses"}, "got 4 heads and 8 devices"),
    ],
)
def test_what_does_not_divide_is_refused(mesh, message, drawn):
    model = model_config("fused", feedforward_dim=30 if "got 4," in message else 24)
    graph = nnx.graphdef(nnx.eval_shape(lambda: TrajectoryModel(model, 3, 2, 5, nnx.Rngs(0))))
    with pytest.raises(ValueError, match=message):
        loss_over_devices(graph, {}, drawn, None, model=model, mesh=MeshConfig(**mesh))


def test_a_device_of_a_ring_holds_its_share_and_sends_no_more_than_keys():
    """Whatever is kept a turn of the ring, as masks were once, adds up to the whole row again."""
    model = model_config("fused", query_chunk_size=32, key_chunk_size=32, feedforward_chunk_size=32)
    make = functools.partial(TrajectoryModel, model, 3, 2, 5)
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    params = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(make(nnx.Rngs(0)))))
    row = jax.ShapeDtypeStruct((1, 8192), np.float32)
    batch = PackedBatch(
        observation=jax.ShapeDtypeStruct((1, 8192, 3), np.float32),
        action=jax.ShapeDtypeStruct((1, 8192, 2), np.float32),
        reward=row,
        return_to_go=row,
        completion=row,
        step=jax.ShapeDtypeStruct((1, 8192), np.int32),
        episode=jax.ShapeDtypeStruct((1, 8192), np.int32),
        segment_ids=None,
        loss_mask=row,
    )

    def compiled(num_devices):
        mesh = MeshConfig(context=num_devices, attention="ring")

        def loss(params, batch):
            return loss_over_devices(graph, params, batch, None, model=model, mesh=mesh)

        return jax.jit(jax.grad(loss)).lower(params, batch).compile()

    alone, shared = compiled(1), compiled(4)
    # A quarter, and what does not shrink: the batch itself, chunks and gradients.
    assert shared.memory_analysis().temp_size_in_bytes < 0.4 * alone.memory_analysis().temp_size_in_bytes
    found = re.findall(
        r" (collective-permute|all-to-all|all-gather|reduce-scatter)(?:-start)?\(", shared.as_text()
    )
    # Keys and values, as one array, set out and go on: forward, again, and backward, where the compiler sets out once
    # for the last two; their gradients go on in the loop, behind it, and home. Before all that, steps go to where they
    # belong, in two halves, and the last of each part to the next device.
    # Six matrices of a layer are gathered forward and again, and the sums of their gradients split.
    permuted = 2 + 2 + 2 - 1 + 3 + 2 + 1
    assert collections.Counter(found) == {
        "collective-permute": permuted,
        "all-gather": 2 * 6,
        "reduce-scatter": 6,
    }
