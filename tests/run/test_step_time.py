"""Planned seconds beside all measured steps of which there are records, and their parts beside sums by hand."""

import collections
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from bpt_rl.config import ModelConfig
from bpt_rl.nn.memory_plan import LEVELS, count_flops, plan_memory
from bpt_rl.nn.workload import StepShare, Workload
from bpt_rl.run.devices import H100
from bpt_rl.run.step_time import attention_seconds, computing_seconds
from bpt_rl.run.streamed_bytes import streamed_bytes

ROOT = Path(__file__).parents[2]
LARGE = ModelConfig(
    embed_dim=1024,
    num_layers=24,
    num_heads=8,
    dropout=0.0,
    feedforward_chunk_size=4096,
    compute_dtype="bfloat16",
    activation="gelu",
)


def workload(tokens, *, model=LARGE, num_parameters=303_109_126, **changes):
    return Workload(
        model=model,
        implementation="cudnn",
        num_parameters=num_parameters,
        context_length=tokens,
        **changes,
    )


def checks():
    """Returns what the scaling page shows: each measured step and its plan."""
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    return list(scaling.checks(ROOT / "results"))


def test_planned_seconds_are_within_a_twentieth_of_every_measured_step_but_one():
    ratios = collections.defaultdict(list)
    for each in checks():
        ratios[each.record, each.tokens].append(each.planned_seconds / each.seconds)
    # The first step of a process, with a hundred GiB on their way to a host whose memory was never touched before.
    [first] = ratios.pop(("bench_step_1m_h100.json", 1_048_576))
    assert 0.85 < first < 0.95
    assert len(ratios) > 12
    for step, values in ratios.items():
        assert values == pytest.approx([1] * len(values), rel=0.05), step


def test_rates_of_attention_are_the_means_of_those_measured_beside_long_steps():
    forward, backward = [], []
    for path in [*ROOT.glob("results/bench_step*h100.json"), *ROOT.glob("results/two_gpus/*.json")]:
        record = json.loads(path.read_text())
        # Of a record's levels, each has the same kernels.
        for row in {row["tokens"]: row for row in record["rows"] if row.get("tokens")}.values():
            if row["tokens"] >= 131_072 and row.get("attention_both_seconds"):
                product = row["num_rows"] * row["tokens"] ** 2 * 1024
                forward.append(2 * product / row["attention_forward_seconds"])
                backward.append(
                    5 * product / (row["attention_both_seconds"] - row["attention_forward_seconds"])
                )
    assert len(forward) == 5
    assert H100.rates.attention_forward == pytest.approx(np.mean(forward), rel=0.005)
    assert H100.rates.attention_backward == pytest.approx(np.mean(backward), rel=0.005)


@pytest.mark.parametrize(("level", "passes"), [("keep", 1), ("save_attention", 1), ("recompute", 2)])
def test_attention_goes_forward_as_often_as_the_level_asks_and_backward_once(level, passes):
    work = workload(131_072)
    product = 24 * 131_072**2 * 1024
    expected = passes * 2 * product / 569e12 + 5 * product / 520e12
    flops = count_flops(work, level)
    np.testing.assert_allclose(attention_seconds(H100.rates, work, level, flops), expected, rtol=1e-12)
    blockwise = dataclasses.replace(work, implementation="blockwise")
    np.testing.assert_allclose(
        attention_seconds(H100.rates, blockwise, level, flops), (2 * passes + 5) * product / 31e12, rtol=1e-12
    )


def test_bytes_that_pass_through_memory_are_those_of_a_sum_by_hand():
    model = dataclasses.replace(LARGE, num_layers=1, embed_dim=128, num_heads=1)
    work = workload(4096, model=model, num_parameters=200_000)
    D = 128
    # bfloat16. Norm, queries and keys; two sums of three, norm, hidden activations.
    forward = 2 * (2 + 4) * D + 2 * (6 + 2 + 2 * 4) * D
    # Two norms with three float32 tensors; five copies of gelu and the gradient through it; rotary; the sums of
    # residuals and of queries', keys' and values' gradients; the float32 gradient of queries.
    backward = 2 * (24 + 4) * D + 2 * 4 * (10 + 2) * D + 8 * D + 2 * 15 * D + 6 * D
    weights = 3 * (4 + 2) * 12 * D**2 + 32 * 200_000
    assert streamed_bytes(work, "keep") == 4096 * (forward + backward) + weights
    kept = 2 * (4 * D + 4)
    assert streamed_bytes(work, "save_attention") == 4096 * (2 * forward + backward + kept) + weights
    # Chunks: two arrays cut and one joined, forward, again and backward.
    chunked = dataclasses.replace(work, context_length=8192)
    cuts = 3 * 6 * 2 * D
    assert (
        streamed_bytes(chunked, "save_attention") == 8192 * (2 * forward + backward + kept + cuts) + weights
    )
    assert streamed_bytes(chunked, "keep") == 8192 * (forward + backward) + weights
    # Groups of layers go forward once more, and whole.
    model = dataclasses.replace(model, num_layers=2)
    one, two = (
        dataclasses.replace(work, model=dataclasses.replace(model, layer_groups=count)) for count in (1, 2)
    )
    assert streamed_bytes(two, "recompute") - streamed_bytes(one, "recompute") == 2 * 4096 * forward
    sums = dataclasses.replace(work, accumulation=2)
    once = 3 * (4 + 2) * 12 * D**2 + 12 * 200_000 + 4096 * (forward + backward)
    assert streamed_bytes(sums, "keep") == 2 * once + 32 * 200_000


def test_what_crosses_devices_passes_through_memory_on_its_way():
    D = 1024
    alone = streamed_bytes(workload(131_072, num_parameters=0), "save_attention")
    found = {}
    for method in ("ulysses", "ring"):
        shared = workload(262_144, num_parameters=0, share=StepShare(context=2, method=method))
        found[method] = (streamed_bytes(shared, "save_attention") - alone) / 131_072 / 24 / D
    # Three times queries, keys and values and twice the output, each laid out before and behind its way.
    assert found["ulysses"] == 3 * 4 * 2 * 3 + 2 * 4 * 2
    again, once = (
        streamed_bytes(workload(262_144, num_parameters=0, share=StepShare(context=2, method="ring")), level)
        - streamed_bytes(workload(131_072, num_parameters=0), level)
        for level in ("recompute", "save_attention")
    )
    # Attention that is computed again merges again.
    assert again - once == 131_072 * 24 * (8 + 2 + 4) * D
    # One turn: the merged output and the keys cut for it; operands cut, and float32 sums of three gradients.
    assert found["ring"] == (8 + 2 + 4) + 4 * 4 + 12 * 3 + 8


@pytest.mark.parametrize("level", LEVELS)
def test_computing_is_the_sum_of_four_rates(level):
    work = workload(65_536)
    flops, memory = count_flops(work, level), plan_memory(work, level)
    rates = H100.rates
    without = dict.fromkeys(("matrices", "memory", "host"), np.inf)
    parts = [
        computing_seconds(dataclasses.replace(rates, **without | kept), work, level, flops, memory)
        - attention_seconds(rates, work, level, flops)
        for kept in ({}, *({name: getattr(rates, name)} for name in without))
    ]
    assert parts[0] == 0
    expected = [
        flops.matrices / rates.matrices,
        streamed_bytes(work, level) / rates.memory,
        2 * memory.host / rates.host,
    ]
    np.testing.assert_allclose(parts[1:], expected, rtol=1e-9)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_state_in_the_host_comes_to_the_device_and_goes_back_once_a_step(accumulation):
    def moving(**changes):
        work = workload(65_536, accumulation=accumulation, **changes)
        flops, memory = count_flops(work, "offload"), plan_memory(work, "offload")
        rates = dataclasses.replace(H100.rates, matrices=np.inf, memory=np.inf)
        return computing_seconds(rates, work, "offload", flops, memory)

    # Parameters and two moments for the update and back, and parameters for the working copy, float32.
    num_bytes = (3 + 3 + 1) * 4 * 303_109_126
    assert moving(optimizer_in_host=True) - moving() == pytest.approx(num_bytes / H100.rates.host, rel=1e-6)
