import dataclasses

import numpy as np
import pytest

from bpt_rl.datasets.merging import merge


def test_merging_small_literal_arrays(episode):
    trajectory = dataclasses.replace(
        episode,
        observation=np.arange(5, dtype=np.float32)[:, None],
        action=np.array([[0], [3], [3], [7], [7]], np.float32),
        reward=np.array([[0], [1], [2], [3], [4]], np.float32),
        discount=np.array([[1], [1], [0.5], [1], [0]], np.float32),
        physics=np.arange(5.0)[:, None],
        features=np.arange(5.0)[:, None],
        task_reward={"x": np.array([0, 1, 10, 100, 1000], np.float32)},
        extras={"skill": np.arange(5), "z": np.arange(2)},
    )
    merged = merge(trajectory, 2)
    assert (
        merged.observation.ravel().tolist()
        == merged.physics.ravel().tolist()
        == merged.features.ravel().tolist()
        == [0, 2, 4]
    )
    assert merged.action.ravel().tolist() == [0, 3, 7]
    assert merged.reward.ravel().tolist() == [0, 3, 7]
    assert merged.discount.ravel().tolist() == [1, 0.5, 0]
    assert merged.task_reward["x"].tolist() == [0, 11, 1100]
    assert merged.extras["skill"].tolist() == [0, 2, 4]
    assert merged.extras["z"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="action_repeat must divide the steps of an episode; got 3 and 4"):
        merge(trajectory, 3)
