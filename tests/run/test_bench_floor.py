"""The floor of a step, and a forward pass by itself."""

import dataclasses

import jax
import pytest

from bpt_rl.bench_config import StepBenchConfig
from bpt_rl.config import ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.run import bench_floor, bench_step, bench_subject
from bpt_rl.run.bench_attention import AttentionTimes

TINY = ModelConfig(
    layout="fused",
    embed_dim=8,
    num_layers=1,
    dropout=0.0,
    implementation="reference",
    activations="keep",
)
TRAIN = TrainConfig(model=TINY)


@pytest.mark.parametrize(
    ("activations", "layer_groups", "num_attended", "num_products"),
    # Attention runs forward once more where its result is not kept; a layer's products, but the last one, where only
    # its input is, and those behind the attention too.
    [
        ("keep", 1, 1, 3 * (4 + 4)),
        ("save_attention", 1, 1, 4 * (4 + 4) - 2),
        ("offload_attention", 1, 1, 4 * (4 + 4) - 2),
        ("recompute", 1, 2, 4 * (4 + 4) - 2),
        ("offload", 1, 2, 4 * (4 + 4) - 2),
        # Groups of layers go forward once more.
        ("save_attention", 3, 2, 5 * (4 + 4) - 2),
    ],
)
def test_a_floor_counts_what_a_level_computes_again(activations, layer_groups, num_attended, num_products):
    model = ModelConfig(
        embed_dim=8,
        num_layers=3,
        num_heads=2,
        feedforward_dim=16,
        activations=activations,
        layer_groups=layer_groups,
        layout="fused",
    )
    train = dataclasses.replace(TRAIN, model=model, optimizer=OptimizerConfig(accumulation=2))
    subject = bench_subject.agent_subject(train, 10, 5)
    attention = AttentionTimes(forward=0.5, both=3.0, temporary_bytes=None)
    # A matrix of 8 x 8 is the unit of products: four in the attention, two twice as wide in the feedforward.
    matrices = 3 * num_products * 2 * 8 * 8 * (2 * 5 * 10) / 1000.0
    expected = 2 * 3 * (0.5 * num_attended + 2.5) + matrices
    assert bench_floor.floor_seconds(subject, attention, 1000.0) == pytest.approx(expected)
    forward = 2 * 3 * 0.5 + 3 * (4 + 4) * 2 * 8 * 8 * 100 / 1000.0
    assert bench_floor.floor_seconds(subject, attention, 1000.0, forward_only=True) == pytest.approx(forward)


def test_a_forward_pass_alone_has_the_loss_of_the_step_and_needs_no_optimizer():
    model = dataclasses.replace(TINY, dropout=0.5)
    train = dataclasses.replace(TRAIN, model=model, optimizer=OptimizerConfig(accumulation=3))
    config = StepBenchConfig(tokens=(12,), num_steps=1, num_warmup_steps=0, floors=False, train=train)
    [step] = bench_step.measure_steps(config)
    [alone] = bench_step.measure_steps(dataclasses.replace(config, forward_only=True))
    # The same dropout; equal but for the order of float32 sums.
    assert alone.loss == pytest.approx(step.loss, rel=1e-6)
    params = bench_subject.agent_subject(train, 12, 1).agent.init(jax.random.key(0))
    # The optimizer's two moments, and three counters.
    optimizer_bytes = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + 12
    assert step.argument_bytes - alone.argument_bytes == optimizer_bytes
    rates = [row.model_flops_per_second * row.step_seconds for row in (step, alone)]
    assert rates == pytest.approx([3 * rates[1], rates[1]])
