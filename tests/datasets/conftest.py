"""Short cartpole episodes, recorded with real dm_control: its reward reads the control."""

import dataclasses

import numpy as np
import pytest

from bpt_rl.config import CollectConfig
from bpt_rl.datasets import exorl
from bpt_rl.run.collect import record_episode
from bpt_rl.types import Trajectory

LENGTHS = (40, 60, 20)
"""Control steps; actions are held for 4."""


def cut(trajectory: Trajectory, num_steps: int) -> Trajectory:
    columns = {key: getattr(trajectory, key)[: num_steps + 1] for key in exorl.KEYS}
    return dataclasses.replace(trajectory, **columns)


@pytest.fixture(scope="session")
def episodes() -> list[Trajectory]:
    config = CollectConfig(task="cartpole_swingup", action_repeat=4, algorithm="random")
    return [cut(record_episode(config, i), length) for i, length in enumerate(LENGTHS)]


@pytest.fixture
def episode(episodes) -> Trajectory:
    """A copy that a test may spoil."""
    columns = {key: np.array(getattr(episodes[0], key)) for key in exorl.KEYS}
    return Trajectory(**columns)


@pytest.fixture(scope="session")
def folder(episodes, tmp_path_factory):
    """`cartpole/random/buffer` with the three episodes."""
    buffer = tmp_path_factory.mktemp("exorl") / "cartpole" / "random" / "buffer"
    buffer.mkdir(parents=True)
    for i, trajectory in enumerate(episodes):
        exorl.write_episode(buffer / f"episode_{i:06d}_{trajectory.num_steps}.npz", trajectory)
    return buffer
