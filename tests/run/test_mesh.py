"""Training on several virtual devices, as users start it."""

import jax
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.run.records import RunFolder
from bpt_rl.run.train import train
from bpt_rl.run.train_seeds import train_seeds

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


def test_plans_and_several_seeds_are_of_one_device(cli, tiny, tmp_path):
    assert "got MeshConfig" in cli.refuse("plan at_small --mesh.context 2")
    runs = [tiny(tmp_path / str(seed), **MODEL, seed=seed, mesh=MeshConfig(context=2)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="got 2 seeds and MeshConfig"):
        train_seeds(runs)
