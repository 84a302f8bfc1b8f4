"""Training steps that several devices share, as the benchmark runs them."""

import dataclasses

import pytest

from bpt_rl.bench_config import StepBenchConfig
from bpt_rl.config import ModelConfig, TrainConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.run.bench_step import measure_steps, step_variants

pytestmark = pytest.mark.devices(4)

MODEL = ModelConfig(
    embed_dim=16, num_layers=1, num_heads=2, layout="fused", dropout=0.0, implementation="blockwise"
)


def config_of(**mesh):
    train = TrainConfig(model=dataclasses.replace(MODEL, activations="recompute"), mesh=MeshConfig(**mesh))
    return StepBenchConfig(tokens=(512,), num_rows=2, num_steps=1, floors=False, train=train)


def test_devices_that_share_a_step_lose_the_same_and_hold_less():
    [alone] = measure_steps(config_of())
    [shared] = measure_steps(config_of(data=2, context=2, attention="ring"))
    assert (alone.failure, shared.failure) == ("", "")
    assert shared.losses == pytest.approx(alone.losses, rel=1e-5)
    assert len(shared.losses) == 2
    assert shared.mesh == "data 2, context 2 (ring)"
    # A fourth of the tokens each.
    assert shared.temporary_bytes < 0.5 * alone.temporary_bytes


def test_tokens_that_devices_cannot_share_are_refused():
    train = dataclasses.replace(config_of().train, mesh=MeshConfig(context=3))
    with pytest.raises(ValueError, match="got 512 tokens, 512 steps, for 3"):
        step_variants(dataclasses.replace(config_of(), train=train))
