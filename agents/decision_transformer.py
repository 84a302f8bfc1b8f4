"""Decision Transformer: return-conditioned actions from one trajectory."""

import jax
from flax import nnx
from jaxtyping import Float

from bpt_rl.agents.base import Params, Policy
from bpt_rl.config import FullContext, TrainConfig
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.policy import make_policy
from bpt_rl.nn.trajectory_model import TrajectoryModel, action_loss
from bpt_rl.types import DataStatistics, PackedBatch


class DecisionTransformer:
    """One trajectory a context, conditioned on its own return; the context never outlives an episode.

    Source: Chen et al. 2021, "Decision Transformer: Reinforcement Learning via Sequence Modeling".
    """

    def __init__(self, config: TrainConfig, statistics: DataStatistics) -> None:
        if config.data.num_trajectories != 1:
            raise ValueError(
                "A Decision Transformer sees one trajectory a context; got num_trajectories "
                f"{config.data.num_trajectories}. Set data.num_trajectories to 1, or train agent at."
            )
        self._config = config
        self._normalizer = Normalizer.from_statistics(statistics, config.return_scale)
        self._sizes = (statistics.observation_dim, statistics.action_dim, statistics.episode_steps)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: self._model(jax.random.key(0))))

    def _model(self, key: jax.Array) -> TrajectoryModel:
        return TrajectoryModel(self._config.model, *self._sizes, nnx.Rngs(key))

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters."""
        return nnx.to_pure_dict(nnx.state(self._model(key)))

    def loss(
        self, params: Params, batch: PackedBatch, key: jax.Array | None
    ) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
        """Returns the action loss over the steps that count; no dropout without a key."""
        predicted = nnx.merge(self._graph, params)(self._normalizer(batch), key)
        loss = action_loss(predicted, batch.action, batch.loss_mask, self._config.model.action_distribution)
        return loss, {"loss": loss}

    def policy(
        self,
        params: Params,
        *,
        num_episodes: int = 1,
        clear_context: bool = False,
        full_context: FullContext = "refuse",
        sample_seed: int | None = None,
    ) -> Policy:
        """Returns the policy; at each episode's end it forgets what it played, whatever is asked."""
        del num_episodes, clear_context, full_context
        return make_policy(
            self._graph,
            params,
            self._config,
            self._normalizer,
            num_episodes=1,
            clear_context=True,
            full_context="refuse",
            sample_seed=sample_seed,
        )
