import numpy as np
import pytest

from bpt_rl.nn.normalization import Normalizer
from bpt_rl.types import DataStatistics, PackedBatch


def statistics(returns=(-1.0, 3.0, 4.0), reward_abs_max=0.5):
    return DataStatistics(
        task="task",
        observation_mean=(1.0, -2.0),
        observation_std=(0.5, 4.0),
        action_dim=1,
        action_repeat=1,
        episode_steps=3,
        returns=returns,
        reward_abs_max=reward_abs_max,
        num_episodes=3,
        source="test",
        subset="full",
        subset_digest="0" * 64,
        digest="",
    )


@pytest.mark.parametrize(
    ("name", "returns", "return_to_go", "reward"),
    [
        ("largest_return", (-1.0, 3.0, 4.0), 1.5, 6.0),
        ("mean_return", (-1.0, 3.0, 4.0), 3.0, 6.0),
        ("none", (-1.0, 3.0, 4.0), 6.0, 3.0),
        # A scale has no sign, and nothing is divided by 0.
        ("largest_return", (-9.0, -4.0), 1.5, 6.0),
        ("largest_return", (-9.0, 0.0), 6.0, 6.0),
    ],
)
def test_scales_are_those_of_the_data(name, returns, return_to_go, reward):
    ones = np.ones((1, 1), np.float32)
    batch = PackedBatch(
        observation=np.array([[[2.0, 2.0]]], np.float32),
        action=ones[..., None],
        reward=3 * ones,
        return_to_go=6 * ones,
        completion=ones,
        step=ones.astype(int),
        episode=ones.astype(int),
        segment_ids=ones.astype(int),
        loss_mask=ones,
    )
    scaled = Normalizer.from_statistics(statistics(returns), name)(batch)
    np.testing.assert_array_equal(scaled.observation, [[[2.0, 1.0]]])
    assert scaled.observation.dtype == np.float32
    assert (scaled.return_to_go.item(), scaled.reward.item()) == (return_to_go, reward)
    rest = set(PackedBatch._fields) - {"observation", "return_to_go", "reward"}
    assert all(getattr(scaled, field) is getattr(batch, field) for field in rest)


def test_rewards_that_are_all_zero_stay_so():
    assert Normalizer.from_statistics(statistics(reward_abs_max=0.0), "mean_return").reward_scale == 1
