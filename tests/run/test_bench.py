"""Benchmarks as users run them, in sizes that a CPU measures in seconds."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_agent
from bpt_rl.bench_config import AttentionBenchConfig, StepBenchConfig
from bpt_rl.bench_verbs import BENCH_VERBS
from bpt_rl.cli import main
from bpt_rl.config import ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.envs.tasks import DOMAINS
from bpt_rl.nn.transformer import Transformer
from bpt_rl.run import bench_attention, bench_record, bench_step, bench_subject, synthetic
from bpt_rl.run.bench_measurement import copy_bandwidth, failure_of, median_seconds
from bpt_rl.run.bench_record import Column, table

TINY = ModelConfig(
    layout="fused",
    embed_dim=8,
    num_layers=1,
    dropout=0.0,
    implementation="reference",
    activations="keep",
)
TRAIN = TrainConfig(model=TINY, optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.1))


def run(line):
    """Returns exit status, standard output and standard error of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(shlex.split(line))
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), " ".join(re.sub("[│╭╮╰╯─|]", " ", err.getvalue()).split())


def record_of(line, path):
    """Returns what a command line wrote and printed, and checks that it says where it comes from."""
    status, out, err = run(f"{line} --out {path}")
    assert status == 0, err
    record = json.loads(path.read_text())
    assert record["command"] == f"bpt-rl {line} --out {path}"
    assert record["device"] == f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    assert record["packages"]["jax"] == jax.__version__
    assert record["git_commit"]
    assert record["config"]["out"] == str(path)
    assert out.endswith(f"Record: {path}\n")
    return record, out


def preset(folder, config=TRAIN):
    path = folder / "tiny.toml"
    path.write_text(config_toml.to_toml(config))
    return path


def test_step_operations_count_every_matrix_of_a_layer_and_half_of_the_attention():
    model = ModelConfig(embed_dim=24, num_heads=6, num_kv_heads=2, num_layers=3, feedforward_dim=40)
    blocks = nnx.to_pure_dict(nnx.state(Transformer(model, nnx.Rngs(0))))["blocks"]
    entries = sum(leaf.size for leaf in jax.tree.leaves(blocks) if leaf.ndim == 3)
    num_tokens = 10
    attention = 2 * (2 * num_tokens * num_tokens * 24) / 2
    assert bench_subject.step_flops(model, num_tokens) == 3 * (2 * entries * num_tokens + 3 * attention)


def test_step_operations_are_those_of_the_rates_published_here():
    model = config_toml.load(TrainConfig, "at_350m").model
    # 6.07 s a step were 457 TFLOP/s; both are rounded to three digits.
    assert bench_subject.step_flops(model, 131_072) / 6.07e12 == pytest.approx(457, rel=2e-3)


@pytest.mark.parametrize("layout", ["return_state_action_reward", "fused"])
def test_synthetic_chains_fill_their_rows_with_whole_episodes(layout):
    train = dataclasses.replace(
        TRAIN, model=dataclasses.replace(TINY, layout=layout), optimizer=OptimizerConfig(accumulation=2)
    )
    domain = dataclasses.replace(DOMAINS["walker"], episode_steps=3)
    num_tokens = 32 if layout == "return_state_action_reward" else 8
    batch = bench_subject.synthetic_batch(train, domain, num_tokens, 3)
    assert batch.observation.shape == (2, 3, 8, 24)
    assert batch.action.shape == (2, 3, 8, 6)
    assert batch.step[1, 2].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert batch.episode[1, 2].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert batch.completion[1, 2].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    assert batch.segment_ids is None
    assert (batch.loss_mask == 1).all()
    # Rows and micro-batches are drawn apart, and twice the same.
    assert len(np.unique(batch.observation)) == batch.observation.size
    again = bench_subject.synthetic_batch(train, domain, num_tokens, 3)
    np.testing.assert_array_equal(batch.observation, again.observation)


def test_bench_step_measures_the_training_step(tmp_path):
    line = f"bench step {preset(tmp_path)} --tokens 12 --implementations reference cudnn --num-rows 2"
    record, out = record_of(line, tmp_path / "new" / "step.json")
    measured, refused = record["rows"]

    domain = DOMAINS["walker"]
    agent = make_agent(TRAIN, synthetic.synthetic_statistics("walker_run"))
    params = agent.init(jax.random.key(TRAIN.seed))
    batch = bench_subject.synthetic_batch(TRAIN, domain, 12, 2)
    loss, _ = agent.loss(params, jax.tree.map(lambda leaf: leaf[0], batch), None)
    # Before any update, and equal but for the order of float32 sums.
    assert measured["loss"] == pytest.approx(float(loss), rel=1e-5)
    # Parameters, AdamW's two moments, three counters and the batch; this model embeds no episode and draws nothing.
    held = [params, params, params, np.zeros(3, np.int32), batch._replace(episode=None)]
    assert measured["argument_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert measured["temporary_bytes"] > 0
    assert measured["compile_seconds"] > 0
    assert measured["tokens_per_second"] * measured["step_seconds"] == pytest.approx(24)
    operations = measured["model_flops_per_second"] * measured["step_seconds"]
    assert operations == pytest.approx(2 * bench_subject.step_flops(TINY, 12))
    assert measured["failure"] == ""
    if jax.default_backend() == "cpu" and measured["peak_bytes"]:
        # Of the process: more than the interpreter, less than a machine.
        assert 2**27 < measured["peak_bytes"] < 2**36
    # A layer that keeps everything attends once in each direction; 12 x 8 x 8 weights, each in three products.
    matrices = 3 * 2 * (12 * 8 * 8) * 24
    floor = measured["attention_both_seconds"] + matrices / measured["matrix_flops_per_second"]
    assert measured["floor_seconds"] == pytest.approx(floor)
    assert measured["floor_share"] * measured["step_seconds"] == pytest.approx(floor)
    rate = measured["utilization"] * measured["matrix_flops_per_second"]
    assert rate == pytest.approx(measured["model_flops_per_second"])

    assert "cudnn attention must have" in refused["failure"]
    assert (refused["implementation"], refused["step_seconds"], refused["loss"]) == ("cudnn", None, None)
    assert out.count("cudnn attention must have") == 1


def test_compiling_alone_tells_memory_and_runs_nothing(tmp_path):
    line = f"bench step {preset(tmp_path)} --tokens 12 --num-rows 2 --compile-only"
    line += " --activations auto --implementations auto"
    record, out = record_of(line, tmp_path / "step.json")
    [row] = record["rows"]
    # The fastest level, which fits any machine at this size, and the attention of a CPU, not the words that ask.
    assert (row["activations"], row["implementation"]) == ("keep", "blockwise")
    assert row["argument_bytes"] > 0
    assert {name for name, value in row.items() if value is None} == {
        "peak_bytes",
        "step_seconds",
        "tokens_per_second",
        "model_flops_per_second",
        "matrix_flops_per_second",
        "utilization",
        "attention_forward_seconds",
        "attention_both_seconds",
        "floor_seconds",
        "floor_share",
        "communication_seconds",
        "hidden_seconds",
        "loss",
    }
    assert "step s" not in out


def test_a_loss_that_is_not_finite_is_a_failure():
    # In several programs, of a working copy, its gradient and the update.
    optimizer = OptimizerConfig(warmup_steps=0, learning_rate=1e30, place="host")
    train = dataclasses.replace(TRAIN, optimizer=optimizer)
    config = StepBenchConfig(tokens=(12,), num_rows=2, num_steps=3, floors=False, train=train)
    [row] = bench_step.measure_steps(config)
    # Finite at the first step, before the update that breaks the parameters.
    assert row.loss < 10
    assert re.fullmatch(r"the loss of step [2-4] is nan", row.failure)
    assert row.losses[0] == row.loss
    json.loads(json.dumps(dataclasses.asdict(row)), parse_constant=pytest.fail)


def test_every_length_meets_every_implementation_and_every_level():
    config = StepBenchConfig(
        tokens=(8, 12),
        implementations=("blockwise", "cudnn"),
        activations=("recompute", "offload"),
        train=TRAIN,
    )
    seen = [
        (n, train.model.implementation, train.model.activations)
        for n, train in bench_step.step_variants(config)
    ]
    assert seen == [
        (n, i, a) for n in (8, 12) for i in ("blockwise", "cudnn") for a in ("recompute", "offload")
    ]
    [(_, own)] = bench_step.step_variants(StepBenchConfig(tokens=(8,), train=TRAIN))
    assert own == TRAIN


def test_attention_operations_count_the_pairs_that_are_not_masked():
    config = AttentionBenchConfig(num_rows=2, num_heads=4, num_kv_heads=2, head_dim=16)
    num_tokens = 1000
    pairs = sum(range(1, num_tokens + 1))
    exact = 2 * 4 * pairs * 2 * (2 * 16)
    # The diagonal is a thousandth of the matrix.
    assert bench_attention.forward_flops(config, num_tokens) == pytest.approx(exact, rel=2e-3)


def test_bench_attention_sets_implementations_side_by_side(tmp_path):
    line = "bench attention --tokens 256 --num-heads 4 --num-kv-heads 2 --head-dim 8 --chunk-size 32 --dtype float32"
    record, out = record_of(line, tmp_path / "attention.json")
    reference, blockwise, cudnn = record["rows"]
    matrix_bytes = 4 * 256 * 256 * 4
    assert reference["temporary_bytes"] >= matrix_bytes > blockwise["temporary_bytes"]
    operations = bench_attention.forward_flops(
        AttentionBenchConfig(num_heads=4, num_kv_heads=2, head_dim=8), 256
    )
    for row in (reference, blockwise):
        assert row["forward_flops_per_second"] * row["forward_seconds"] == pytest.approx(operations)
        assert row["both_flops_per_second"] * row["both_seconds"] == pytest.approx(3 * operations)
    assert "cudnn attention must have" in cudnn["failure"]
    assert "reference" in out


def test_what_does_not_fit_is_a_row_with_the_reason():
    # The matrix of one head is larger than what any process can address.
    config = AttentionBenchConfig(
        tokens=(2**23, 16),
        implementations=("reference",),
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
    )
    too_long, short = bench_attention.measure_attention(config)
    assert re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", too_long.failure)
    assert too_long.forward_seconds is None
    assert short.failure == ""
    assert short.both_seconds > 0


@pytest.mark.parametrize(
    "verb", [verb for verb in BENCH_VERBS if verb not in ("bench plot", "bench rollout")]
)
def test_every_example_parses(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(BENCH_VERBS[verb].example.removeprefix("bpt-rl ") + " --tokens 0")
    assert (status, "Traceback" in err) == (2, False)
    assert "tokens must be positive and not empty" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench stpe", r"got 'bench stpe'\. Nearest: bpt-rl bench step\."),
        ("bench step", "`bpt-rl bench step` needs a configuration"),
        ("bench step bc10", "The agent must have a transformer.*got bc"),
        ("bench step at_small --train.data.task walker_rnu", "'walker_rnu'"),
        ("bench step at_paper --tokens 10", "multiple of the layout's tokens a step; got 10 and 4"),
        ("bench step at_small --num-warmup-steps -1", "num_warmup_steps must not be negative; got -1"),
        ("bench attention --num-heads 3 --num-kv-heads 2", "num_kv_heads must divide num_heads; got 2 and 3"),
        (
            "bench decode at_paper --tokens 80",
            "hold the tokens of every call; got 80 tokens, and 20 calls after a first one write 84",
        ),
        ("bench decode at_small --num-kv-heads 3", "num_kv_heads must divide num_heads; got 3 and 4"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(line)
    assert (status, out, "Traceback" in err) == (2, "", False)
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    size: int
    seconds: float | None
    never: float | None = None


def test_a_table_aligns_numbers_and_leaves_out_what_no_row_has():
    columns = [
        Column(heading="name", field="name"),
        Column(heading="KiB", field="size", divisor=1024, digits=1),
        Column(heading="never", field="never"),
        Column(heading="ms", field="seconds", divisor=1e-3, digits=2),
    ]
    assert table([Row("a", 1024 * 2000, 0.0015), Row("long", 512, None)], columns) == (
        "name      KiB    ms\n"  #
        "----  -------  ----\n"
        "a     2,000.0  1.50\n"
        "long      0.5"
    )


def sleeping(*seconds):
    """Returns a function that sleeps so long at each of its calls, which must not be more."""
    left = iter(seconds)

    def call():
        time.sleep(next(left))
        return np.zeros(1)

    return call


def test_warm_up_does_not_count_and_the_median_is_no_mean():
    # Far apart, so that a busy machine blurs nothing.
    assert median_seconds(sleeping(0.5, 0), 1) < 0.2
    assert median_seconds(sleeping(0, 0, 0.9, 0), 3) < 0.2
    assert 0.2 < median_seconds(sleeping(0.2, 0.3), 2, num_warmup=0) < 1
    # A long call is the last one, even in place of a warm-up.
    assert 0.3 < median_seconds(sleeping(0, 0.3), 9, enough=0.25) < 0.9


def test_copying_reads_and_writes_at_a_speed_of_this_world():
    # From a hundred megabytes a second, on a busy machine, to ten terabytes.
    assert 1e8 < copy_bandwidth(10_000_000) < 1e13


def test_a_reason_is_one_line():
    assert failure_of(ValueError("\nfirst line\nsecond line")) == "first line"
    assert failure_of(MemoryError()) == "MemoryError"
    assert len(failure_of(ValueError("x" * 1000))) == 200


@pytest.mark.parametrize(
    ("out", "reason"), [("file/attention.json", "its folder is a file"), ("folder", "is a directory")]
)
def test_a_record_that_cannot_be_written_is_refused_before_measuring(out, reason, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    status, printed, err = run(f"bench attention --tokens 100_000_000 --out {tmp_path}/{out}")
    assert (status, printed) == (2, "")
    assert re.fullmatch(
        rf"bpt-rl: out must be a file that can be written; got .*{out} \(({reason})\)\. .*", err
    ), err


def test_an_old_record_stays_until_something_is_measured(tmp_path):
    path = tmp_path / "attention.json"
    path.write_text("old")
    bench_record.check_writable(path)
    assert (path.read_text(), [*tmp_path.iterdir()]) == ("old", [path])


def test_the_preset_is_of_the_size_its_name_says():
    train = config_toml.load(TrainConfig, "at_350m")
    agent = make_agent(train, synthetic.synthetic_statistics("walker_run"))
    shapes = jax.eval_shape(lambda: agent.init(jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(303e6, rel=0.01)
    assert Path(train.run).name == "at_350m"
