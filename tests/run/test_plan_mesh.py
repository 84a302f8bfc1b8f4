"""Plans of steps that several devices share, against the compiled step and against sums by hand."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.memory_plan import count_flops, plan_memory
from bpt_rl.nn.traffic import step_traffic
from bpt_rl.nn.workload import StepShare, Workload
from bpt_rl.run.bench_collectives import read_collectives
from bpt_rl.run.bench_subject import agent_subject
from bpt_rl.run.devices import H100
from bpt_rl.run.plan import Rows, plan_step
from bpt_rl.run.step import compile_step
from bpt_rl.run.step_time import call_seconds, devices_in_host, exposed_seconds
from bpt_rl.run.synthetic import synthetic_statistics

SMALL = ModelConfig(
    layout="fused",
    embed_dim=128,
    num_layers=2,
    num_heads=4,
    implementation="blockwise",
    dropout=0.0,
    query_chunk_size=128,
    key_chunk_size=128,
    feedforward_chunk_size=128,
)
TOKENS = 8192


@functools.cache
def compiled_and_planned(activations, accumulation=1, **mesh):
    """Returns the compiled step of small rows, and the plan of it."""
    model = dataclasses.replace(SMALL, activations=activations)
    optimizer = OptimizerConfig(num_steps=1000, accumulation=accumulation)
    config = TrainConfig(
        data=DataConfig(task="walker_run"), model=model, optimizer=optimizer, mesh=MeshConfig(**mesh)
    )
    num_rows = config.mesh.data * config.mesh.fsdp
    subject = agent_subject(config, TOKENS, num_rows)
    step = compile_step(
        subject.agent, optimizer, subject.placed_batch(), jax.random.key(0), mesh=subject.mesh
    )
    rows = Rows(
        statistics=synthetic_statistics("walker_run"),
        num_rows=num_rows,
        context_length=TOKENS,
        is_one_chain_a_row=True,
    )
    processor = dataclasses.replace(H100, name="cpu", is_host=True, rates=None)
    return step.programs[0], plan_step(config, rows, processor).level(activations)


STEPS = [
    ("recompute", {"data": 2, "context": 4, "attention": "ring"}),
    ("save_attention", {"fsdp": 2, "context": 4, "attention": "ulysses", "accumulation": 2}),
]


@pytest.mark.devices(8)
@pytest.mark.parametrize(("activations", "mesh"), STEPS)
def test_planned_bytes_of_a_device_are_those_of_the_compiled_step(activations, mesh):
    program, level = compiled_and_planned(activations, **mesh)
    compiled = program.memory_analysis()
    # A tenth, as for one device.
    assert level.memory.temporary == pytest.approx(compiled.temp_size_in_bytes, rel=0.1)
    # What is given back in place is the state, but for its counts of steps.
    state = level.memory.parameters + level.memory.optimizer
    assert state == pytest.approx(compiled.alias_size_in_bytes, abs=64)


@pytest.mark.devices(8)
@pytest.mark.parametrize(("activations", "mesh"), STEPS)
def test_planned_transfers_are_those_of_the_compiled_step(activations, mesh):
    program, level = compiled_and_planned(activations, **mesh)
    sent = read_collectives(program.as_text(), unknown_turns=mesh["context"] - 2)
    planned = dict.fromkeys(sent, 0)
    for transfer in level.traffic:
        planned[transfer.collective] += transfer.count * transfer.num_bytes
    # A device's steps of the batch and what came before each are dealt out once, which is left out of the plan, as are
    # single numbers.
    step = 24 + 2 * (6 + 2) + 4
    dealt = mesh.get("accumulation", 1) * 4 * step * TOKENS // mesh["context"] + 1024
    for name, found in sent.items():
        assert 0 <= found.num_bytes - planned[name] < dealt, name


def test_text_of_a_program_is_read_with_its_loops():
    text = """
%inside (p: f32[8]) -> f32[8] {
  %a = f32[1,1000]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %b = (f32[500]{0}, bf16[500]{0}) all-to-all(%p, %p), replica_groups={{0,1},{2,3}}
}

%ring (p: f32[8]) -> f32[8] {
  %c = f32[1000]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %l = f32[8] while(%p), condition=%x, body=%inside, backend_config={"known_trip_count":{"n":"3"}}
  %m = f32[8] while(%p), condition=%x, body=%ring
  %r = f32[250]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add
  %s = f32[] all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  %t = f32[4000]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
  %u = f32[2000]{0} all-reduce(%p), replica_groups=mesh['a'=2,'b'=3] {'a','b'}, to_apply=%add
}
"""
    found = read_collectives(text, unknown_turns=5)
    assert {name: (sent.calls, sent.executed, sent.num_bytes) for name, sent in found.items()} == {
        "collective-permute": (2, 8, 8 * 4000),
        "all-to-all": (1, 3, 3 * 3000),
        "reduce-scatter": (1, 1, 4000),
        "all-reduce": (1, 1, 8000),
    }


LARGE = config_toml.load(TrainConfig, "at_350m").model


def workload(tokens, *, num_rows=1, **share):
    return Workload(
        model=LARGE,
        implementation="cudnn",
        num_parameters=303_109_126,
        num_rows=num_rows,
        context_length=tokens,
        share=StepShare(**share),
    )


@pytest.mark.parametrize("level", ["keep", "save_attention", "recompute", "offload"])
def test_devices_share_rows_tokens_and_matrices_evenly(level):
    alone = workload(131_072, num_rows=4)
    whole, flops = plan_memory(alone, level), count_flops(alone, level)
    for share in ({"context": 8}, {"data": 2, "context": 4}, {"fsdp": 4, "context": 2}):
        shared = dataclasses.replace(alone, share=StepShare(**share))
        part = plan_memory(shared, level)
        split, among = 24 * 12 * 1024**2, 8 // share.get("data", 1)
        # Where all is kept, so are the gathered matrices.
        gathered = 2 * split if level == "keep" else 0
        assert (part.kept, part.host) == (whole.kept // 8 + gathered, whole.host // 8)
        assert part.parameters == 4 * (303_109_126 - split + split // among)
        assert part.optimizer == 2 * part.parameters
        # Of a layer, and of what all-to-alls and gathered matrices hold besides, a part of each device's own.
        assert whole.layer / 8 < part.layer < whole.layer / 4
        # Half of the pairs of queries and keys, whoever has them.
        assert 8 * count_flops(shared, level).attention == flops.attention
        assert 8 * count_flops(shared, level).matrices == flops.matrices


def test_what_crossing_devices_holds_is_added_to_what_a_device_would_hold_alone():
    alone = plan_memory(workload(131_072), "recompute").layer
    gathered = plan_memory(workload(131_072, num_rows=4, fsdp=4), "recompute").layer - alone
    # A layer's matrices before they are cast, and their gradients after.
    assert gathered == 2 * 4 * 12 * 1024**2
    heads = plan_memory(workload(8 * 131_072, context=8), "recompute").layer - alone
    assert heads == gathered + 131_072 * 3 * 2 * 1024


def test_matrices_that_context_cannot_share_stay_those_of_fsdp():
    model = dataclasses.replace(LARGE, feedforward_dim=4098)
    whole, split = (
        dataclasses.replace(workload(131_072, num_rows=2, fsdp=2, context=count), model=model)
        for count in (4, 1)
    )
    assert whole.local_parameters == split.local_parameters < 0.51 * 303_109_126
    assert {each.axes for each in step_traffic(whole, "keep") if "layer" in each.purpose} == {("fsdp",)}
    summed, rest = step_traffic(whole, "keep")[-2:]
    assert (summed.axes, rest.axes) == (("data", "context"), ("data", "fsdp", "context"))
    assert summed.num_bytes == 4 * whole.matrix_parameters // 2


def test_rows_are_padded_to_two_chunks_of_steps_a_device():
    model = dataclasses.replace(LARGE, layout="return_state_action")
    work = dataclasses.replace(workload(3 * 1001, num_rows=5, data=2, context=4), model=model)
    assert (work.padded_length, work.local_length) == (3 * 1008, 3 * 252)
    assert (work.local_rows, work.num_tokens) == (3, 3 * 3 * 252)
    assert workload(1001).padded_length == 1001


def test_a_ring_holds_more_than_ulysses_and_both_less_than_one_device():
    alone = plan_memory(workload(524_288), "recompute")
    ulysses, ring = (
        plan_memory(workload(524_288, context=8, method=method), "recompute")
        for method in ("ulysses", "ring")
    )
    assert ulysses.device < ring.device < alone.device / 3


def test_ulysses_sends_and_holds_repeated_keys_where_devices_are_more_than_key_heads():
    model = dataclasses.replace(LARGE, num_kv_heads=2)
    shared = dataclasses.replace(workload(131_072, context=8), model=model)
    [there, back, matrices, summed, rest] = step_traffic(shared, "save_attention")
    # Queries of 8 heads, keys and values of 2 that stand 4 times: 24 of 128 entries, in three passes.
    assert there.num_bytes == 3 * back.num_bytes == 131_072 // 8 * 2 * 128 * 24
    assert (there.count, back.count) == (3 * 24, 3 * 24)
    # What is split is not summed once more with the rest.
    assert matrices.axes == summed.axes == ("context",)
    assert rest.num_bytes == 4 * (303_109_126 - shared.matrix_parameters)
    assert back.sent == back.count * back.num_bytes * 7 // 8


def test_a_ring_sends_only_key_heads_and_their_gradients_in_float32():
    model = dataclasses.replace(LARGE, num_kv_heads=2)
    shared = dataclasses.replace(workload(131_072, context=4, method="ring"), model=model)
    keys, sums, home, *_ = step_traffic(shared, "keep")
    part = 131_072 // 4 * 2 * 2 * 128
    assert [(each.count, each.num_bytes) for each in (keys, sums, home)] == [
        (24 * 2 * 3, 2 * part),
        (24 * 3, 4 * part),
        (24, 2 * part),
    ]


def test_devices_fill_hosts_from_the_context_axis_on():
    share = StepShare(data=4, fsdp=2, context=4)
    counts = {
        axes: devices_in_host(H100.links, share, axes)
        for axes in [("context",), ("fsdp",), ("data",), ("fsdp", "context"), ("data", "fsdp", "context")]
    }
    assert list(counts.values()) == [4, 2, 1, 8, 8]
    assert devices_in_host(H100.links, StepShare(context=64), ("context",)) == 8


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_waiting_is_what_links_take_longer_than_the_turns_that_hide_it(method):
    work = workload(131_072, context=8, method=method)
    links = dataclasses.replace(H100.links, latency=0.0)

    def waited(bytes_per_second):
        rates = dict.fromkeys(("permute", "all_to_all", "all_reduce"), bytes_per_second)
        found = dataclasses.replace(links, **rates)
        traffic = step_traffic(work, "save_attention")
        rest = sum(
            each.count * call_seconds(found, work.share, each)
            for each in traffic
            if each.collective in ("all-gather", "reduce-scatter", "all-reduce")
        )
        return exposed_seconds(found, H100.rates, work, "save_attention", traffic) - rest

    product = 16_384**2 * 1024
    forward = 2 * product / H100.rates.attention_forward
    backward = 5 * product / H100.rates.attention_backward
    part = 16_384 * 1024
    if method == "ulysses":
        sent = 3 * 24 * 4 * 2 * part * 7 / 8
        np.testing.assert_allclose(waited(1e12), sent / 1e12, rtol=1e-9)
        return
    # Fast links: the gradients' way home is not hidden, nor theirs beside keys. Slow ones: each turn waits.
    np.testing.assert_allclose(waited(1e12), 24 * (2 * 2 + 6 * 2 * 4) * part / 1e12, rtol=1e-9)
    slow = 1e9
    keys, sums = 2 * 2 * part / slow, 2 * 4 * part / slow
    expected = 7 * (keys - forward) + 7 * (keys - backward) + 6 * sums + (sums - backward)
    np.testing.assert_allclose(waited(slow), 24 * (expected + keys), rtol=1e-9)


def test_between_hosts_the_network_sets_the_pace():
    share = StepShare(context=16)
    traffic = step_traffic(workload(131_072, context=16, method="ring"), "keep")
    hop = call_seconds(H100.links, share, traffic[0])
    links = H100.links
    assert hop == pytest.approx(links.network_latency + traffic[0].num_bytes / links.network)
    sums = call_seconds(H100.links, share, traffic[-1])
    # Eight cards of a host together outdo NVLink.
    assert 8 * links.network > links.all_reduce
    assert sums == pytest.approx(4 * links.network_latency + traffic[-1].sent / links.all_reduce)
    work = dataclasses.replace(workload(131_072, context=16), model=dataclasses.replace(LARGE, num_heads=16))
    heads, *_ = step_traffic(work, "keep")
    # 15 parts, eight of which leave the host.
    sent = 8 / 16 * heads.num_bytes
    seconds = 4 * links.network_latency + sent / links.network
    assert call_seconds(links, share, heads) == pytest.approx(seconds)


def test_matrices_of_a_layer_are_gathered_one_by_one_and_again_where_they_are_not_kept():
    shared = workload(8192, num_rows=2, fsdp=2, context=2)
    for level, passes in (("keep", 1), ("save_attention", 2), ("recompute", 2)):
        *_, gathered, summed, rest = step_traffic(shared, level)
        assert gathered.axes == summed.axes == ("fsdp", "context")
        assert gathered.num_devices == summed.num_devices == 4
        assert gathered.count * gathered.num_bytes == passes * 24 * 4 * 12 * 1024**2
        assert gathered.count == passes * summed.count == passes * 24 * 6
        assert rest.num_bytes == 4 * (303_109_126 - 24 * 12 * 1024**2)
