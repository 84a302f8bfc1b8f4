"""Explorers at their smallest, each compiled once for all tests."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.agents.registry import make_explorer
from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.types import Transition

CONFIG = ExplorationConfig(hidden_dim=8, batch_size=6, learning_rate=1e-3)


@functools.cache
def explorer(name):
    """Of observations of 3 entries and actions of 2."""
    return make_explorer(name, CONFIG, 3, 2)


@functools.cache
def start(name):
    return jax.jit(explorer(name).init)(jax.random.key(0))


@functools.cache
def step(name):
    """Returns the compiled update; it takes the number of a key, not a key."""
    return jax.jit(
        lambda state, batch, number: explorer(name).update(state, batch, jax.random.key(number)),
    )


@functools.cache
def compiled_draw(name):
    state = start(name)
    return jax.jit(
        lambda number: explorer(name).draw_skills(state, jax.random.key(number), 4096),
    )


def draw(name, number):
    """Returns 4096 skills drawn with the key of this number."""
    return compiled_draw(name)(number)


def batch(name, seed, size=6):
    """Returns random transitions with skills of the explorer's kind, of float32."""
    generator = np.random.default_rng(seed)
    arrays = Transition(
        observation=generator.normal(size=(size, 3)),
        action=generator.uniform(-0.9, 0.9, (size, 2)),
        discount=np.full(size, 0.97),
        next_observation=generator.normal(size=(size, 3)),
        skill=draw(name, seed)[:size],
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)


def train(name, state, batch, num_steps):
    """Returns the state after steps on one batch with one key, the last rewards and each step's metrics."""
    metrics = []
    for _ in range(num_steps):
        state, reward, found = step(name)(state, batch, 7)
        metrics.append(found)
    return state, reward, metrics


@pytest.fixture(scope="session")
def explorers():
    return SimpleNamespace(explorer=explorer, start=start, step=step, draw=draw, batch=batch, train=train)
