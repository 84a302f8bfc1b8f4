"""Training on several virtual devices, as users start it."""

import functools

import jax
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.device_mesh import make_mesh, placed_batch
from bpt_rl.run.records import RunFolder
from bpt_rl.run.step import compile_step, placed_state
from bpt_rl.run.synthetic import synthetic_statistics
from bpt_rl.run.train import train
from bpt_rl.run.train_seeds import train_seeds
from bpt_rl.types import PackedBatch

pytestmark = pytest.mark.devices(8)

MODEL = {
    "model.layout": "return_state_action",
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.implementation": "blockwise",
    "model.activations": "recompute",
    "model.dropout": 0.0,
}


def test_a_run_goes_on_with_other_devices_and_ends_where_one_device_would(tiny, tmp_path, read_state, cli):
    alone = train(tiny(tmp_path / "alone", **MODEL, num_steps=4))
    begun = tiny(tmp_path / "shared", **MODEL, num_steps=4, mesh=MeshConfig(context=2, fsdp=2))

    def stop(step, total, values):
        if step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(begun, stop)
    path = tmp_path / "shared.toml"
    path.write_text(config_toml.to_toml(begun))
    cli.succeed(f"train {path} --mesh.context 2 --mesh.data 1 --mesh.fsdp 1 --mesh.attention ring")
    shared = RunFolder(tmp_path / "shared")
    assert [line["step"] for line in shared.metrics()] == [1, 2, 3, 4]
    for name in ("loss", "gradient_norm", "parameter_norm"):
        values = [[line[name] for line in folder.metrics()] for folder in (shared, alone)]
        # Float32 sums in another order, four updates one after another.
        np.testing.assert_allclose(*values, rtol=1e-4)
    # Adam divides by the root of squares that are almost 0 here and there: 1e-3 of an update, which is 1e-2.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        read_state(shared).params,
        read_state(alone).params,
    )


def test_no_device_holds_more_than_its_share_of_state_batch_and_activations():
    data = DataConfig(task="cartpole_swingup", batch_size=4)
    model = ModelConfig(
        layout="fused",
        embed_dim=64,
        num_layers=2,
        num_heads=2,
        dropout=0.0,
        implementation="blockwise",
        query_chunk_size=32,
        key_chunk_size=32,
        feedforward_chunk_size=32,
        activations="recompute",
    )
    optimizer = OptimizerConfig()
    row = np.zeros((4, 1024), np.float32)
    whole = PackedBatch(
        observation=np.zeros((4, 1024, 5), np.float32),
        action=row[..., None],
        reward=row,
        return_to_go=row,
        completion=row,
        step=row.astype(np.int32),
        episode=row.astype(np.int32),
        segment_ids=None,
        loss_mask=row,
    )

    def compiled(config):
        agent = make_agent(
            TrainConfig(data=data, model=model, mesh=config),
            synthetic_statistics(data.task),
        )
        mesh = make_mesh(config)
        batch = (placed_batch(whole, mesh),)
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        key = jax.device_put(jax.random.key(0), place)
        make_batch = functools.partial(jax.tree.map, lambda leaf: leaf[None])
        step = compile_step(
            agent, optimizer, batch, key, make_batch=lambda inputs: make_batch(inputs[0]), mesh=mesh
        )
        state = placed_state(agent, optimizer, 0, mesh)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, batch)))
        return step.programs[0].memory_analysis(), held, state

    alone, all_bytes, state = compiled(MeshConfig())
    shared, own_bytes, parts = compiled(MeshConfig(fsdp=4, context=2, attention="ring"))
    matrices = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim == 3)
    batch = sum(leaf.nbytes for leaf in whole if leaf is not None)
    assert own_bytes == all_bytes - 7 / 8 * (matrices + batch)
    # What the step is given is that, and a key.
    assert 0 <= shared.argument_size_in_bytes - own_bytes < 64
    # An eighth of what is computed of tokens, and chunks and gathered matrices, which do not shrink.
    assert shared.temp_size_in_bytes < 0.25 * alone.temp_size_in_bytes
    # Compiled together, what is drawn may round otherwise.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), parts, state)


def test_several_seeds_are_of_one_device(tiny, tmp_path):
    runs = [tiny(tmp_path / str(seed), **MODEL, seed=seed, mesh=MeshConfig(context=2)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="got 2 seeds and mesh context 2"):
        train_seeds(runs)
