"""A small store of real cartpole episodes and one run trained on it, shared by the tests of this folder."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_agent
from bpt_rl.collect_config import CollectConfig
from bpt_rl.config import BuildConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.envs.tasks import make_vector
from bpt_rl.run import records
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.collect import collect
from bpt_rl.run.step import init_state, make_optimizer
from bpt_rl.run.train import train
from bpt_rl.types import EpisodeLog, PackedBatch

TASK = "cartpole_swingup"
ACTION_REPEAT = 20
"""An episode of 1000 control steps has 50 agent steps."""
_VERSIONS = {"packages": {"jax": "0.11.2", "numpy": "2.4.6"}, "python": "3.11.7", "git_commit": "abc123"}
_RETURNS = {
    "chain": [[30.0, 50.0], [34.0, 46.0], [32.0, 54.0]],
    "memoryless": [[30.0, 32.0], [34.0, 31.0], [32.0, 33.0]],
    "random": [[10.0, 11.0], [12.0, 9.0], [10.0, 8.0]],
}


@pytest.fixture(scope="session")
def store_path(tmp_path_factory):
    """Six episodes, two tasks."""
    root = tmp_path_factory.mktemp("data")
    buffer = collect(
        CollectConfig(
            task="cartpole_balance",
            num_steps=6000,
            action_repeat=ACTION_REPEAT,
            out=str(root),
            num_workers=1,
        )
    )
    return build_store(
        BuildConfig(
            source=(str(buffer),),
            out=str(root / "store.h5"),
            tasks=("cartpole_balance", TASK),
            action_repeat=ACTION_REPEAT,
            subset="first-6-episodes",
            num_workers=1,
        )
    )


@pytest.fixture(scope="session")
def tiny(store_path):
    """Returns the smallest sensible configuration of an Agentic Transformer, in a run folder of one's own.

    Keywords are fields of TrainConfig, or of the first of its parts that has them, or "PART.FIELD".
    """

    def make(run, **changes):
        parts = {
            "data": DataConfig(store=str(store_path), task=TASK, num_trajectories=2, batch_size=2),
            "model": ModelConfig(
                layout="fused", embed_dim=16, num_layers=1, implementation="reference", activations="keep"
            ),
            "optimizer": OptimizerConfig(num_steps=6, warmup_steps=2, learning_rate=1e-2),
        }
        own = {"checkpoint_every": 2, "log_every": 1}
        for name, value in changes.items():
            owner, _, field = name.rpartition(".")
            owner = owner or next((key for key, part in parts.items() if hasattr(part, name)), None)
            if owner:
                parts[owner] = dataclasses.replace(parts[owner], **{field: value})
            else:
                own[name] = value
        return TrainConfig(run=str(run), **parts, **own)

    return make


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The run folder of the tiny configuration, trained without an interruption. Not to be changed."""
    return train(tiny(tmp_path_factory.mktemp("runs") / "at"))


@pytest.fixture(scope="session")
def environments():
    """Three environments of the store's task in one process, reset by whoever uses them."""
    made = make_vector(TASK, 3, 0, ACTION_REPEAT, num_workers=1)
    yield made
    made.close()


@pytest.fixture(scope="session")
def read_state():
    """Returns the newest saved TrainState of a run folder."""

    def read(folder):
        config = folder.config()
        agent, optimizer = make_agent(config, folder.statistics()), make_optimizer(config.optimizer)
        template = jax.eval_shape(lambda: init_state(agent, optimizer, config.seed))
        with Checkpoints(folder.checkpoints_path) as saved:
            return saved.restore(saved.latest_step, template)

    return read


@pytest.fixture(scope="session")
def micro_batches():
    """Returns two micro-batches of random observations and actions, drawn with a seed, for agents of a few numbers."""

    def make(seed=0):
        generator = np.random.default_rng(seed)
        zeros = np.zeros((2, 2, 5), np.float32)
        return PackedBatch(
            observation=generator.normal(size=(2, 2, 5, 3)).astype(np.float32),
            action=generator.normal(size=(2, 2, 5, 2)).astype(np.float32),
            reward=zeros,
            return_to_go=zeros,
            completion=zeros,
            step=zeros.astype(int),
            episode=zeros.astype(int),
            segment_ids=None,
            loss_mask=zeros + 1,
        )

    return make


@pytest.fixture(scope="session")
def assert_same_bits():
    """Two pytrees are equal bit for bit on every leaf."""

    def check(one, other):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        twins = jax.tree.leaves(other)
        for (path, leaf), twin in zip(jax.tree_util.tree_leaves_with_path(one), twins, strict=True):
            a, b = np.asarray(leaf), np.asarray(twin)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), path
            assert a.tobytes() == b.tobytes(), path

    return check


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; a test that asks for it is skipped where there is none."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "report_pictures.py"
    spec = importlib.util.spec_from_file_location("report_pictures", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    program = tool.find_chromium()
    if program is None:
        pytest.skip(f"none of {', '.join(tool.PROGRAMS)} is installed")
    with tool.Chromium(program) as made:
        yield made


@pytest.fixture(scope="session")
def drawn_plots(browser):
    """Opens a page, holds it to what every page must do, and returns width, height, texts and lines of each plot."""

    def check(page, width):
        browser.open(page.as_uri(), width=width, height=900, dark=width == 390)
        assert browser.complaints() == []
        assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
        # Tables may scroll within the page; the page itself may not.
        assert browser.run("document.documentElement.scrollWidth") == width
        return browser.run(
            "[...document.querySelectorAll('svg')].map((svg) => ["
            "svg.getBoundingClientRect().width, svg.getBoundingClientRect().height,"
            "svg.querySelectorAll('text').length,"
            "[...svg.querySelectorAll('path')].filter((p) => p.getTotalLength() > 20).length])"
        )

    return check


@pytest.fixture(scope="session")
def write_run():
    """Writes a run folder with one evaluation, or none if `logs` is empty; keywords replace parts of the record."""
    return _write_run


@pytest.fixture(scope="session")
def evaluated_log():
    """Returns the JSON form of a log with these returns."""
    return _evaluated_log


def _evaluated_log(returns, context, asked=True, failures=()):
    returns = np.asarray(returns, np.float64)
    made = EpisodeLog(
        returns=returns,
        num_steps=np.full(returns.shape, 1000, np.int64),
        context=context,
        task="walker_run",
        action_repeat=1,
        target_return=60.0 if asked and context != "random" else float("nan"),
        seed=1_000_000,
        failures=tuple(failures),
    )
    return records.log_to_json(made)


def _write_run(
    root,
    name,
    *,
    agent="at",
    seed=0,
    num_trajectories=2,
    logs=None,
    task="walker_run",
    failures=(),
    **evaluation,
):
    """A run folder with one evaluation, or none if `logs` is empty."""
    folder = records.RunFolder(root / name)
    folder.evaluations_path.mkdir(parents=True)
    data = DataConfig(num_trajectories=num_trajectories, task=task)
    folder.config_path.write_text(
        config_toml.to_toml(TrainConfig(run=name, agent=agent, seed=seed, data=data))
    )
    statistics = {
        "task": task,
        "observation_mean": [0.0, 0.0],
        "observation_std": [1.0, 1.0],
        "action_dim": 6,
        "action_repeat": 1,
        "episode_steps": 1000,
        "returns": [5.0, 10.0, 20.0, 25.0, 60.0],
        "reward_abs_max": 1.0,
        "num_episodes": 5,
        "source": "walker/proto",
        "subset": "first-5",
        "subset_digest": "5" * 64,
        "digest": "d1",
    }
    records.write_json(folder.path / "statistics.json", statistics)
    command = f"bpt-rl train at.toml --seed {seed}"
    records.write_json(folder.path / "versions.json", _VERSIONS | {"command": command})
    lines = [{"step": 20 * i, "loss": 1 / i} for i in range(1, 30)]
    folder.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs = _RETURNS if logs is None else logs
    if logs:
        record = {
            "schema": 2,
            "agent": agent,
            "run": name,
            "step": 600,
            "task": task,
            "num_episodes": np.shape(logs["chain"])[1],
            "num_chains": len(logs["chain"]),
            "num_trajectories": num_trajectories,
            "action_repeat": 1,
            "target_return": 60.0,
            "target_rule": "largest return in the data",
            "train_seed": seed,
            "environment_seed": 1_000_000 + seed,
            "data": {
                "source": "walker/proto",
                "subset": "first-5",
                "subset_digest": "5" * 64,
                "digest": "d1",
                "mean_return": 24.0,
                "largest_return": 60.0,
                "num_episodes": 5,
            },
            "context": {
                "num_trajectories": 0,
                "order": "none",
                "capacity": num_trajectories,
                "overflow": "refuse",
            },
            "logs": {
                c: _evaluated_log(r, c, asked=agent != "bc", failures=failures if c == "chain" else ())
                for c, r in logs.items()
            },
            "sweep": [],
            "versions": _VERSIONS,
            "command": f"bpt-rl evaluate {name}",
        }
        records.write_json(folder.evaluations_path / "step.json", record | evaluation)
    return folder.path
