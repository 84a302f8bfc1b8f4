"""A small store of real cartpole episodes and one run trained on it, shared by the tests of this folder."""

import dataclasses

import jax
import numpy as np
import pytest

from bpt_rl.agents.registry import make_agent
from bpt_rl.collect_config import CollectConfig
from bpt_rl.config import BuildConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.envs.tasks import make_vector
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.collect import collect
from bpt_rl.run.step import init_state, make_optimizer
from bpt_rl.run.train import train

TASK = "cartpole_swingup"
ACTION_REPEAT = 20
"""An episode of 1000 control steps has 50 agent steps."""


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
