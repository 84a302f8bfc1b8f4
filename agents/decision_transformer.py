"""Decision Transformer: return-conditioned actions from one trajectory."""

from bpt_rl.agents.base import Params
from bpt_rl.config import FullContext, TrainConfig
from bpt_rl.nn.cached_policy import CachedPolicy
from bpt_rl.nn.trajectory_learner import TrajectoryLearner, check_asks_for_a_return
from bpt_rl.nn.windowed_policy import WindowedPolicy
from bpt_rl.types import DataStatistics


class DecisionTransformer(TrajectoryLearner):
    """One trajectory a context, or its last `data.window` steps; the context never outlives an episode.

    Source: Chen et al. 2021, "Decision Transformer: Reinforcement Learning via Sequence Modeling".
    """

    def __init__(self, config: TrainConfig, statistics: DataStatistics) -> None:
        if config.data.num_trajectories != 1:
            raise ValueError(
                "A Decision Transformer sees one trajectory a context; got num_trajectories "
                f"{config.data.num_trajectories}. Set data.num_trajectories to 1, or train agent at."
            )
        check_asks_for_a_return(config)
        super().__init__(config, statistics)

    def policy(
        self,
        params: Params,
        *,
        num_episodes: int = 1,
        clear_context: bool = False,
        full_context: FullContext = "refuse",
        sample_seed: int | None = None,
    ) -> CachedPolicy | WindowedPolicy:
        """Returns the policy; at each episode's end it forgets what it played, whatever is asked."""
        del num_episodes, clear_context, full_context
        return super().policy(params, num_episodes=1, clear_context=True, sample_seed=sample_seed)
