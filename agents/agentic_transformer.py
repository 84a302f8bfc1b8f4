"""Agentic Transformer: actions from chains of hindsight."""

from bpt_rl.config import TrainConfig
from bpt_rl.nn.trajectory_learner import TrajectoryLearner, check_asks_for_a_return
from bpt_rl.types import DataStatistics


class AgenticTransformer(TrajectoryLearner):
    """Predicts actions from the whole chain so far: n trajectories in one context, asked for the best return.

    With n = 1 it is the Decision Transformer's control on the same backbone: whole episodes, one a context.

    Source: Liu and Abbeel 2023, "Emergent Agentic Transformer from Chain of Hindsight Experience".
    """

    def __init__(self, config: TrainConfig, statistics: DataStatistics) -> None:
        check_asks_for_a_return(config)
        super().__init__(config, statistics)
