"""Algorithm distillation: actions from what a learning agent had gone through by then, asked for nothing."""

from bpt_rl.config import DataConfig, TrainConfig
from bpt_rl.nn.trajectory_learner import TrajectoryLearner
from bpt_rl.types import WITHOUT_RETURN, DataStatistics


class AlgorithmDistillation(TrajectoryLearner):
    """Predicts actions from the episodes before, in the order in which their collector made them.

    Neither return-to-go nor completion enters the model: what improvement there is in context is that of the collector.
    It is the control of chains of hindsight, which are sorted by return and asked for the best.

    Source: Laskin et al. 2022, "In-context Reinforcement Learning with Algorithm Distillation", whose histories are of
    one task each and often thinned out (`data.stride`). Here they are of one task and one collector.
    """

    def __init__(self, config: TrainConfig, statistics: DataStatistics) -> None:
        if config.model.layout not in WITHOUT_RETURN:
            raise ValueError(
                f"Algorithm distillation is asked for no return; got layout {config.model.layout!r}, which carries "
                f"one. Set model.layout to {' or '.join(WITHOUT_RETURN)}, as preset ad does."
            )
        if config.data.order != "collected":
            raise ValueError(
                "Algorithm distillation learns from episodes in the order in which they were collected; got order "
                f"{config.data.order!r}. Set data.order to collected, and data.draw to consecutive, as preset ad does."
            )
        if config.data.relabel != DataConfig.relabel:
            raise ValueError(
                f"Algorithm distillation is asked for no return, so none is relabelled; got relabel "
                f"{config.data.relabel!r}. Leave data.relabel out."
            )
        super().__init__(config, statistics)
