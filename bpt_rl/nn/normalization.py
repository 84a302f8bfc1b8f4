"""Scaling of observations, returns and rewards by the statistics of the training data."""

import dataclasses
from typing import Literal

import numpy as np

from bpt_rl.types import DataStatistics, PackedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Maps raw units to those the model sees."""

    observation_mean: np.ndarray
    observation_std: np.ndarray
    return_scale: float
    reward_scale: float

    @classmethod
    def from_statistics(
        cls, statistics: DataStatistics, return_scale: Literal["largest_return", "mean_return", "none"]
    ) -> "Normalizer":
        """Returns the normalizer of a data set; a scale of 0 becomes 1."""
        scales = {
            "largest_return": abs(statistics.largest_return),
            "mean_return": abs(statistics.mean_return),
            "none": 1.0,
        }
        return cls(
            observation_mean=np.asarray(statistics.observation_mean, np.float32),
            observation_std=np.asarray(statistics.observation_std, np.float32),
            return_scale=scales[return_scale] or 1.0,
            reward_scale=1.0 if return_scale == "none" else statistics.reward_abs_max or 1.0,
        )

    def __call__(self, batch: PackedBatch) -> PackedBatch:
        """Returns the batch in the model's units."""
        return batch._replace(
            observation=(batch.observation - self.observation_mean) / self.observation_std,
            return_to_go=batch.return_to_go / self.return_scale,
            reward=batch.reward / self.reward_scale,
        )
