"""`bpt-rl bench context` as users run it, and the picture it draws."""

import dataclasses
import functools
import json
import math
import re

import jax
import pytest
from flax import nnx

from bpt_rl import config_toml
from bpt_rl.bench_config import ContextBenchConfig
from bpt_rl.bench_verbs import BENCH_VERBS
from bpt_rl.cli import main
from bpt_rl.config import ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.nn.language_model import LanguageModel
from bpt_rl.run import bench_context, bench_plots, bench_subject
from bpt_rl.run.bench_attention import AttentionTimes
from bpt_rl.run.bench_floor import floor_seconds

MODEL = ModelConfig(
    layout="fused",
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    dropout=0.0,
    feedforward_chunk_size=32,
    query_chunk_size=32,
    key_chunk_size=32,
)
TRAIN = TrainConfig(model=MODEL, optimizer=OptimizerConfig(warmup_steps=0))
TOO_LONG = 2**20
"""Tokens whose matrix of one head would take 4 TiB."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(config_toml.to_toml(TRAIN))
    return path


def rows_of(line, path):
    assert main([*line.split(), "--out", str(path)]) == 0
    return {(row["method"], row["tokens"]): row for row in json.loads(path.read_text())["rows"]}


def test_methods_are_what_their_names_say():
    model = dataclasses.replace(MODEL, layer_groups=2, activations="keep")
    said = {}
    for method in ContextBenchConfig().methods:
        made = bench_context.method_model(model, method, 100)
        said[method] = (
            made.implementation,
            made.feedforward_chunk_size,
            made.activations,
            made.layer_groups,
        )
    assert said == {
        "full": ("reference", 100, "recompute", 1),
        "memory_efficient": ("blockwise", 100, "recompute", 1),
        "bpt": ("blockwise", 32, "recompute", 1),
        "save_attention": ("auto", 32, "save_attention", 2),
        "offload_attention": ("auto", 32, "offload_attention", 2),
        "recompute": ("auto", 32, "recompute", 2),
        "offload": ("auto", 32, "offload", 2),
    }


def test_a_method_is_run_while_it_is_quick_then_compiled_until_it_does_not_fit(tiny, tmp_path, capsys):
    line = f"bench context {tiny} --tokens 96 64 {TOO_LONG} {2 * TOO_LONG} --methods full"
    options = "--max-step-seconds 1e-9 --longest --max-tokens 200 --no-floors"
    rows = rows_of(f"{line} {options}", tmp_path / "context.json")
    assert [(tokens, row["status"]) for (_, tokens), row in rows.items()] == [
        (64, "executed"),
        (96, "compiled"),
        (TOO_LONG, "does not fit"),
        (2 * TOO_LONG, "does not fit"),
        # The longest is looked for by doubling the last length that fits, up to a bound.
        (192, "compiled"),
    ]
    executed, compiled, too_long, longer, longest = rows.values()
    # By the compiler's count, or because it gives up.
    assert re.search("GiB, of which the device has|RESOURCE_EXHAUSTED|[Oo]ut of memory", too_long["failure"])
    assert longer["failure"] == f"nor do {TOO_LONG:,} tokens"
    assert (executed["expected_seconds"], compiled["step_seconds"]) == (None, None)
    assert compiled["expected_seconds"] == pytest.approx(2.25 * executed["step_seconds"])
    assert longest["expected_seconds"] == pytest.approx(9 * executed["step_seconds"])

    params = bench_subject.agent_subject(TRAIN, 64, 1).agent.init(jax.random.key(0))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Parameters, two moments and gradients of four bytes; the input of each of two layers.
    assert executed["floor_bytes"] == 16 * num_parameters + 2 * 64 * 8 * 4
    assert executed["device_bytes"] >= executed["argument_bytes"] + executed["temporary_bytes"]
    assert (executed["floor_seconds"], executed["matrix_flops_per_second"]) == (None, None)
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"Plot: {tmp_path / 'context.png'}" in out
    # The longest that was run, that fits, and the shortest that does not.
    assert ["full", "64", "192", f"{TOO_LONG:,}"] in [line.split() for line in out.splitlines()]


def test_a_language_model_is_measured_with_its_own_loss_and_vocabulary():
    model = dataclasses.replace(MODEL, num_layers=1, feedforward_chunk_size=16, activations="recompute")
    train = dataclasses.replace(TRAIN, model=model, optimizer=OptimizerConfig(accumulation=2))
    subject = bench_subject.language_subject(train, 50, 24)
    batch, params = subject.make_batch(), subject.agent.init(jax.random.key(train.seed))
    text = jax.numpy.asarray(batch.step).reshape(2, 25)
    assert set(text.ravel().tolist()) <= set(range(50))
    language_model = LanguageModel(model, 50, nnx.Rngs(jax.random.key(train.seed)))
    loss = nnx.jit(lambda model, text: model.losses(text[:, :-1], text[:, 1:]).mean())(language_model, text)
    measured = jax.jit(functools.partial(bench_subject.first_loss, subject.agent))(params, batch, subject.key)
    assert measured == pytest.approx(float(loss), rel=1e-5)
    # Near an even guess among 50.
    assert abs(measured - math.log(50)) < 0.2

    layer = 2 * (12 * 8 * 8) * 24 + 2 * 24 * 24 * 8
    assert subject.model_flops == 2 * 3 * (layer + 2 * 24 * 8 * 50)
    # Recomputed: attention once more, weights but the last ones, and the logits once more.
    matrices = 2 * (4 * 12 - 4) * 8 * 8 * 24 + 4 * 2 * 24 * 8 * 50
    attention = AttentionTimes(forward=0.5, both=3.0, temporary_bytes=None)
    assert floor_seconds(subject, attention, 1e3) == pytest.approx(2 * (0.5 + 3.0 + matrices / 1e3))


def test_a_gpt_has_the_shape_and_the_vocabulary_of_its_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["bench", "context", "gpt_2.7B", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for default in (r"--vocabulary-size INT [^-]*50257\)", r"--train\.model\.embed-dim INT [^-]*2560\)"):
        assert re.search(default, said)


def record(tmp_path, name, rows, **model):
    values = {
        "bench": "context",
        "device": "card",
        "config": {"train": {"model": dataclasses.asdict(MODEL) | model}, "vocabulary_size": 0},
        "rows": rows,
    }
    path = tmp_path / name
    path.write_text(json.dumps(values))
    return path


def row(method, tokens, status, **fields):
    made = bench_context.ContextRow(
        method=method, tokens=tokens, status=status, limit_bytes=2**30, floor_bytes=2**20, **fields
    )
    return dataclasses.asdict(made)


def test_of_two_rows_about_the_same_the_one_that_knows_more_is_drawn():
    short, long = row("bpt", 64, "executed", step_seconds=1.0), row("bpt", 128, "executed", step_seconds=5.0)
    later = row("bpt", 64, "executed", step_seconds=2.0)
    rows = [
        row("recompute", 64, "does not fit"),
        long,
        short,
        row("bpt", 128, "compiled"),
        later,
        row("full", 64, "failed"),
    ]
    assert bench_plots.best_rows(rows) == {"full": [rows[5]], "bpt": [later, long], "recompute": [rows[0]]}


def test_steps_are_drawn_as_the_methods_that_they_are():
    def step(implementation, activations, seconds, argument, **fields):
        row = {"tokens": 64, "implementation": implementation, "activations": activations, "num_rows": 1}
        return row | {"argument_bytes": argument, "temporary_bytes": 2**36, "step_seconds": seconds} | fields

    steps = [
        step("auto", "save_attention", 1.5, 600, floor_seconds=1.0),
        step("blockwise", "recompute", 9.0, 600),
        step("auto", "offload", None, 600),
        step("auto", "recompute", None, 2**34),
        step("auto", "keep", None, None),
        step("auto", "recompute", 1.0, 600, num_rows=2),
    ]
    train = {"model": dataclasses.asdict(MODEL), "optimizer": {"place": "device"}}
    made = {"device": "NVIDIA H100 80GB HBM3 (gpu)", "config": {"train": train}, "rows": steps}
    rows = bench_plots.rows_of_steps(made)
    assert [(r["method"], r["status"], r["step_seconds"]) for r in rows] == [
        ("save_attention", "executed", 1.5),
        ("bpt", "executed", 9.0),
        ("offload", "compiled", None),
        # 80 GiB, where JAX has 75.7.
        ("recompute", "does not fit", None),
    ]
    # Two layers of width 8, float32; the gradient is a third of parameters and both moments.
    assert rows[0]["floor_bytes"] == 600 + 200 + 2 * 8 * 4 * 64
    assert rows[0]["floor_seconds"] == 1.0
    assert bench_plots.rows_of_steps(made | {"config": {"train": train, "forward_only": True}}) == []


def test_records_of_several_runs_become_one_picture(tmp_path, capsys):
    paths = [
        record(tmp_path, "a.json", [row("bpt", 64, "executed", step_seconds=1.0, device_bytes=2**22)]),
        record(tmp_path, "b.json", [row("full", 64, "does not fit", failure="nor do 32 tokens")]),
    ]
    out = tmp_path / "new" / "both.png"
    assert main(["bench", "plot", *map(str, paths), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"Plot: {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    # Nothing ran, so there is no time to draw, which a logarithmic axis could not do.
    bench_plots.plot_contexts(paths[1:], tmp_path / "memory.png")
    other = record(tmp_path, "c.json", [], embed_dim=16)
    with pytest.raises(
        ValueError, match=r"must be of one model; got 2 layers of width 16.* and 2 layers of width 8"
    ):
        bench_plots.plot_contexts([paths[0], other], out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench context gpt_1.4B", "A GPT must be one of gpt_1.3B, gpt_2.7B, gpt_6.7B; got 'gpt_1.4B'"),
        ("bench context bc10", "The agent must have a transformer, as at and dt have; got bc"),
        ("bench context at_small --max-step-seconds 0", "max_step_seconds must be positive; got 0.0"),
        (
            "bench context at_350m --train.model.head-groups 2",
            "activations = offload_attention moves the attention's result of all heads at once; got head_groups 2",
        ),
        ("bench context at_paper --tokens 8 10", "multiple of the layout's tokens a step; got 10 and 4"),
        (
            BENCH_VERBS["bench plot"].example.removeprefix("bpt-rl "),
            "must be a JSON file that `bpt-rl bench` wrote; there is none at results/bench_context.json",
        ),
        ("bench plot", "`bpt-rl bench plot` needs a record"),
    ],
)
def test_what_cannot_be_measured_or_drawn_is_refused(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(line.split())
    except SystemExit as ended:
        status = ended.code
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert (status, message in err) == (2, True), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "JSON with a field bench"), ('{"bench": "decode"}', "'decode'")]
)
def test_what_is_no_record_of_contexts_is_not_drawn(content, message, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        bench_plots.plot_contexts([path], tmp_path / "out.png")
