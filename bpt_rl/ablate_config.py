"""Configurations of what makes many runs: a grid of cells, and the demo."""

import dataclasses
from typing import Literal

from bpt_rl.collect_config import Algorithm, CollectConfig
from bpt_rl.config import EvaluateConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """A grid of runs over the number of trajectories and the seed."""

    out: str = "runs/trajectory_count"
    """Folder that receives one run folder a cell."""
    num_trajectories: tuple[int, ...] = (1, 2, 4)
    """Trajectories a chain, in training and at evaluation."""
    seeds: tuple[int, ...] = (0,)
    equal: Literal["tokens", "gradient_steps"] = "tokens"
    """What cells share beside the number of gradient steps: trajectories a batch, or chains a batch."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Fixed settings; its batch_size is that of the largest count."""
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if not self.num_trajectories or not self.seeds or min(self.num_trajectories) < 1:
            raise ValueError(
                "A grid needs at least one seed and positive counts of trajectories; got "
                f"num_trajectories {self.num_trajectories} and seeds {self.seeds}. Name some."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything `bpt-rl demo` does, station by station."""

    out: str = "runs/demo"
    """Folder that receives episodes, store, runs and report."""
    seed: int = 0
    """Of data and training. The environments of the evaluation have their own, the same for every seed."""
    collect: CollectConfig = dataclasses.field(default_factory=CollectConfig)
    """What each algorithm records."""
    algorithms: tuple[Algorithm, ...] = ("random", "ornstein_uhlenbeck")
    """Explorers whose episodes make up the data, in equal parts."""
    task: str = "cartpole_swingup"
    """Task that episodes are relabelled for and agents trained on; not the one they were collected for."""
    ablation: AblateConfig = dataclasses.field(default_factory=AblateConfig)
    """Agentic Transformers over the number of trajectories."""
    dt: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    bc: TrainConfig = dataclasses.field(default_factory=TrainConfig)
