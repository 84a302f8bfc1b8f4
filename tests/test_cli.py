"""The command line as users meet it: real files, real physics, tiny settings."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.bench_verbs import BENCH_VERBS
from bpt_rl.cli import VERBS
from bpt_rl.config import EvaluateConfig, TrainConfig
from bpt_rl.datasets import capacity, exorl
from bpt_rl.run.records import RunFolder

COMMAND = str(Path(sys.executable).with_name("bpt-rl"))
HEAVY = ("jax", "numpy", "flax", "h5py", "mujoco", "dm_control", "matplotlib", "rich", "tyro", "gymnasium")
TINY_MODEL = {"layout": "fused", "embed-dim": 8, "num-layers": 1, "implementation": "reference"}
TINY_STEPS = {"num-steps": 4, "warmup-steps": 0}


def options(prefix="", **groups):
    """Returns a line of options: `--{prefix}{group}.{name} value`."""
    return " ".join(
        f"--{prefix}{group}.{name} {value}"
        for group, values in groups.items()
        for name, value in values.items()
    )


@pytest.fixture(scope="module")
def project(cli, tmp_path_factory):
    """A folder with episodes, a store and a trained run, all made by the command line."""
    root = tmp_path_factory.mktemp("project")
    out = cli.succeed(
        f"data collect --task cartpole_balance --num-steps 3000 --action-repeat 20 --num-workers 1 --out {root}"
    )
    buffer = root / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    assert out == f"Episodes: {buffer}\n"
    out = cli.succeed(
        f"data build --source {buffer} --out {root}/store.h5 --tasks cartpole_swingup cartpole_balance "
        "--action-repeat 20 --num-workers 1 --subset first-3-episodes"
    )
    assert out == f"Store: {root}/store.h5\n"
    out = cli.succeed(train_line(root, root / "at"))
    assert out == f"Run: {root}/at\n"
    return root


def train_line(root, path, **changes):
    data = {"store": root / "store.h5", "task": "cartpole_swingup", "num-trajectories": 2, "batch-size": 1}
    return (
        f"train at_small --run {path} --log-every 1 --checkpoint-every 2 --model.activations keep "
        f"{options(data=data | changes, model=TINY_MODEL, optimizer=TINY_STEPS)}"
    )


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    # Rendering has its own tests, and takes tens of seconds.
    monkeypatch.setattr("bpt_rl.run.film.BACKENDS", ())
    monkeypatch.delenv("MUJOCO_GL", raising=False)


def test_help_answers_within_four_tenths_of_a_second():
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        text = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - began)
    assert all(f"  {verb} " in text for verb in VERBS)
    assert all(name in text for name in config_toml.preset_names())
    assert min(seconds) < 0.4, seconds


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from bpt_rl.cli import main; main(['--help'])\n"
        f"print(sorted(sys.modules.keys() & set({HEAVY!r})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_defaults_and_an_example(cli, verb):
    status, out, _ = cli.run(f"{verb} --help")
    assert status == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    assert VERBS[verb].summary in text
    assert f"Example: bpt-rl {verb}" in text
    names = re.findall(r"--[a-z][\w.-]*", text.split("-h, --help")[1])
    assert text.count("(default: ") >= len(set(names)) // 2
    assert ("(default: " in text) == (verb != "data list")


# Verbs that need no file of the user's; `data download` would try to reach its server.
NEEDS_NOTHING = ("demo", "plan", "data list", "data download", "data collect", *BENCH_VERBS)


def test_a_gpus_memory_is_offered_nearly_whole_unless_the_user_says(cli, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    cli.succeed("data list walker")
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    pinned = int(os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) * 2**30
    # Other processes take and give memory meanwhile.
    assert 0.5 * capacity.host_memory() < pinned < capacity.host_memory()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in NEEDS_NOTHING])
def test_every_example_parses_and_only_lacks_its_files(cli, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search("(data|runs)/", cli.refuse(VERBS[verb].example.removeprefix("bpt-rl ")))
    assert not list(tmp_path.iterdir())


def test_from_collecting_to_the_report(cli, project, tmp_path):
    root = project
    described = json.loads(cli.succeed(f"data info {root}/store.h5"))
    assert (described["num_episodes"], described["subset"], described["action_repeat"]) == (
        3,
        "first-3-episodes",
        20,
    )
    assert list(described["returns"]) == ["cartpole_swingup", "cartpole_balance"]
    assert "every byte matches its digest" in cli.succeed(f"data verify {root}/store.h5")
    assert ": 3 episodes, readable, finite" in cli.succeed(f"data verify {root}/cartpole/ornstein_uhlenbeck")

    folder = RunFolder(root / "at")
    assert folder.config().optimizer.num_steps == 4
    assert folder.versions()["command"] == "bpt-rl " + train_line(root, root / "at")
    line = f"evaluate {root}/at --num-chains 2 --num-workers 1"
    out = cli.succeed(line)
    assert "one training seed (0); 2 chains of 2 episodes" in out
    assert "No episode was drawn" in out
    [record] = folder.evaluations()
    assert (record["num_episodes"], record["command"]) == (2, f"bpt-rl {line}")

    cells = root / "cells"
    # The perceptron compiles fastest; the grid itself has its own tests.
    data = {"store": root / "store.h5", "task": "cartpole_swingup", "batch-size": 1}
    grid = options("train.", data=data, optimizer=TINY_STEPS, model={"embed-dim": 8})
    out = cli.succeed(
        f"ablate trajectory_count --out {cells} --axes.train.data.num-trajectories 2 --axes.train.seed 0 "
        f"--train.agent bc {grid} "
        "--evaluate.num-chains 2 --evaluate.num-workers 1 --evaluate.num-episodes 1 --evaluate.no-random"
    )
    assert out.startswith(f"1 of 1 cells are finished.\nPage: {cells}/trajectory_count/ablation.html\n")
    [cell] = (cells / "cells").iterdir()
    assert cell.name.startswith("bc_cartpole_swingup_n2_seed0-")

    out = cli.succeed(f"report {root}/at --out {tmp_path}/page.html")
    assert out == f"Report: {tmp_path}/page.html\n"
    assert "cartpole_swingup" in (tmp_path / "page.html").read_text()
    assert cli.succeed(f"report {cell}") == f"Report: {cell}/report.html\n"


def test_demo_makes_data_runs_and_report(cli, tmp_path):
    data = {"num-trajectories": 1, "batch-size": 1, "top-fraction": 1}
    model = {"embed-dim": 8, "num-layers": 1, "implementation": "reference"}
    optimizer = {"num-steps": 2, "warmup-steps": 0}
    parts = " ".join(
        options(f"{part}.", data=data, model=model, optimizer=optimizer)
        for part in ("ablation.train", "dt", "bc")
    )
    line = (
        f"demo --out {tmp_path}/demo --algorithms random --collect.num-steps 2000 --collect.action-repeat 50 "
        f"--collect.num-workers 1 --ablation.axes.train.data.num-trajectories 1 {parts} "
        "--ablation.evaluate.num-chains 2"
    )
    out = cli.succeed(line)
    assert out.endswith(f"Report: {tmp_path}/demo/report.html\n")
    assert {path.name for path in (tmp_path / "demo").iterdir()} >= {"table.csv", "bc", "dt", "store.h5"}
    assert "cartpole_swingup" in (tmp_path / "demo" / "report.html").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian at_small", r"got 'trian'\. Nearest: bpt-rl train\."),
        ("data biuld", r"got 'data biuld'\. Nearest: bpt-rl data build\."),
        ("train at_smal", r"got 'at_smal'\. .* Nearest: at_small\."),
        ("data collect --task walker_rnu", "got 'walker_rnu'. Nearest valid one: 'walker_run'"),
        (
            "train at_small --lerning-rate 3",
            r"no option --lerning-rate\. Nearest: --optimizer\.learning-rate\.",
        ),
        ("train at_small --data.bach-size=3", r"no option --data\.bach-size\. Nearest: --data\.batch-size\."),
        ("evaluate runs/at --no-randm", r"no option --no-randm\. Nearest: --random\."),
        ("data info s.h5 --quick", r"no option --quick\."),
        ("train", "`bpt-rl train` needs a configuration: .* Example: bpt-rl train at_small"),
        ("data verify", "`bpt-rl data verify` needs the path of a store"),
    ],
)
def test_a_misspelt_word_names_the_nearest_valid_one(cli, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, cli.refuse(line))
    assert not list(tmp_path.iterdir())


def test_impossible_values_are_refused_with_the_rule(cli):
    status, _, err = cli.run("train at_small --model.embed-dim 6 --model.num-heads 2")
    assert (status, "Traceback" in err) == (2, False)
    assert "embed_dim must be a multiple of 2 * num_heads" in " ".join(err.split())


def test_an_unknown_key_of_a_file_names_the_nearest_valid_one(cli, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[optimizer]\nlerning_rate = 1.0\n")
    sentence = cli.refuse(f"train {path}")
    assert "got 'optimizer.lerning_rate'. Nearest valid key: 'optimizer.learning_rate'" in sentence


def spoil(arrays, **changes):
    changed = arrays | changes
    return {key: values for key, values in changed.items() if values is not None}


def with_nan(values):
    values = values.copy()
    values[7] = np.nan
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: spoil(a, physics=None), r"episode_000001_1000\.npz lacks physics"),
        (lambda a: spoil(a, action=a["action"][:-1]), r"action must have .* got shape \(1000, 1\)"),
        (lambda a: spoil(a, physics=a["physics"][:, :3]), r"physics of cartpole must have shape \[T\+1, 4\]"),
        (lambda a: spoil(a, physics=a["physics"].astype("f4")), "physics must be float64"),
        (lambda a: spoil(a, reward=a["reward"].astype("i8")), "reward must be of a floating type; got int64"),
        (
            lambda a: spoil(a, observation=with_nan(a["observation"])),
            "observation must be finite; got nan in row 7",
        ),
        (
            lambda a: {key: values[:501] for key, values in a.items()},
            "must state the episode's number of steps",
        ),
        (None, r"must be a whole npz file; .*episode_000001_1000\.npz cannot be read"),
    ],
    ids=["keys", "rows", "columns", "dtype", "integers", "nan", "length", "truncated"],
)
def test_a_damaged_episode_is_named_and_the_old_store_stays(cli, project, tmp_path, change, message):
    buffer = tmp_path / "cartpole" / "buffer"
    shutil.copytree(project / "cartpole" / "ornstein_uhlenbeck" / "buffer", buffer)
    path = buffer / "episode_000001_1000.npz"
    if change is None:
        path.write_bytes(path.read_bytes()[:20_000])
    else:
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **change(arrays))
    out = tmp_path / "stores" / "store.h5"
    out.parent.mkdir()
    shutil.copy(project / "store.h5", out)
    old = out.read_bytes()
    sentence = cli.refuse(
        f"data build --source {buffer} --out {out} --tasks cartpole_balance --action-repeat 20 --num-workers 1"
    )
    assert re.search(message, sentence)
    assert "episode_000001_1000.npz" in sentence
    assert (out.read_bytes(), list(out.parent.iterdir())) == (old, [out])


def test_missing_and_empty_folders_of_episodes_are_refused(cli, tmp_path):
    build = f"data build --out {tmp_path}/store.h5 --tasks cartpole_balance --source {tmp_path}"
    assert "there is neither at" in cli.refuse(f"{build}/none")
    (tmp_path / "empty").mkdir()
    assert "empty holds none" in cli.refuse(f"{build}/empty")
    (tmp_path / "file.zip").write_bytes(b"no zip")
    assert "is a file but no whole zip" in cli.refuse(f"{build}/file.zip")
    assert not (tmp_path / "store.h5").exists()


def test_stores_that_cannot_serve_are_refused(cli, project, tmp_path):
    runs = tmp_path / "runs"
    assert "none is at" in cli.refuse(train_line(tmp_path, runs / "at"))
    line = train_line(project, runs / "at", task="walker_run")
    assert re.search("got 'walker_run', and .* holds cartpole_swingup, cartpole_balance", cli.refuse(line))
    path = tmp_path / "store.h5"
    shutil.copy(project / "store.h5", path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    for line in (train_line(tmp_path, runs / "at"), f"data info {path}", f"data verify {path}"):
        assert "store.h5 does not end like a store" in cli.refuse(line)
    assert not runs.exists()


def test_a_checkpoint_of_another_architecture_is_refused(cli, project, tmp_path):
    path = shutil.copytree(project / "at", tmp_path / "at")
    config = config_toml.load(TrainConfig, str(path / "config.toml"))
    text = config_toml.to_toml(config).replace("embed_dim = 8", "embed_dim = 24")
    (path / "config.toml").write_text(text)
    assert re.search(r"architecture; params/\S+ is \(8,\) in .* and \(24,\)", cli.refuse(f"evaluate {path}"))
    assert "model.embed_dim = 24, and got 8" in cli.refuse(train_line(project, path))
    assert (path / "config.toml").read_text() == text
    assert "there is none in" in cli.refuse(
        f"evaluate {tmp_path}/none --num-chains {EvaluateConfig().num_chains}"
    )


@pytest.mark.parametrize("installed", ["4.0.0", "3.9.1"])
def test_a_mujoco_that_does_not_fit_is_refused_by_every_verb_that_simulates(
    cli, project, tmp_path, monkeypatch, installed
):
    # What pip would leave behind, found before the real one.
    information = tmp_path / f"mujoco-{installed}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mujoco\nVersion: {installed}\n")
    monkeypatch.syspath_prepend(tmp_path)
    buffer = project / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    for line in (
        f"data collect --task cheetah_run --num-steps 1 --num-workers 1 --out {tmp_path}/exorl",
        f"data build --source {buffer} --tasks cartpole_balance_sparse --num-workers 1 --out {tmp_path}/s.h5",
        f"evaluate {project}/at --num-chains 1",
    ):
        sentence = cli.refuse(line)
        assert f"mujoco {installed} is installed. Run: pip install" in sentence
    assert not list(tmp_path.rglob("*.npz"))
    assert not (tmp_path / "s.h5").exists()


def test_a_full_disk_leaves_the_old_store_and_one_sentence(project, tmp_path):
    out = tmp_path / "store.h5"
    out.write_bytes(b"old")
    buffer = project / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    line = f"{COMMAND} data build --source {buffer} --out {out} --tasks cartpole_balance --num-workers 1"
    # The system itself refuses to let any file grow over 60 blocks of 512 bytes.
    limited = ["sh", "-c", f"ulimit -f 60; exec {line}"]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    expected = f"A file must be written whole; {out} was not: File too large. Free space or use another."
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith(expected)
    assert "Traceback" not in done.stderr
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def interrupt(line, is_begun):
    """Returns standard error of a process that gets Ctrl-C once it has begun, and checks how it ends."""
    process = subprocess.Popen([COMMAND, *shlex.split(line)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not is_begun() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        status, err = process.wait(timeout=30), process.stderr.read()
        assert (status, "Traceback" in err, "bpt-rl: interrupted." in err) == (130, False, True), err
        return err
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_an_interrupted_collection_gives_130_and_keeps_whole_episodes(tmp_path):
    buffer = tmp_path / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    line = f"data collect --task cartpole_balance --num-steps 500_000 --num-workers 2 --out {tmp_path}"
    err = interrupt(line, lambda: len(list(buffer.glob("*.npz"))) > 1)
    assert "interrupted. What is complete on disk stays; the same command goes on from there." in err
    assert 1 < sum(1 for _ in exorl.iterate_episodes(buffer)) < 500
    assert not list(buffer.glob(".*"))


def test_an_interrupted_training_gives_130_and_keeps_its_checkpoint(project, tmp_path):
    line = train_line(project, tmp_path / "at").replace("num-steps 4", "num-steps 1000000") + " --agent bc"
    interrupt(line, (tmp_path / "at" / "checkpoints" / "6").is_dir)
    steps = [int(path.name) for path in (tmp_path / "at" / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(steps) >= 6
    assert max(line["step"] for line in RunFolder(tmp_path / "at").metrics()) >= max(steps)
