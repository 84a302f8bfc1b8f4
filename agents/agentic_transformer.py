"""Agentic Transformer: actions from chains of hindsight."""

import jax
from flax import nnx
from jaxtyping import Float

from bpt_rl.agents.base import Params, Policy
from bpt_rl.config import FullContext, TrainConfig
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.policy import make_policy
from bpt_rl.nn.trajectory_model import TrajectoryModel, action_loss
from bpt_rl.types import DataStatistics, PackedBatch


class AgenticTransformer:
    """Predicts actions from the whole chain so far: n trajectories in one context, asked for the best return.

    Source: Liu and Abbeel 2023, "Emergent Agentic Transformer from Chain of Hindsight Experience".
    """

    def __init__(self, config: TrainConfig, statistics: DataStatistics) -> None:
        if config.data.window and config.data.num_trajectories > 1:
            raise ValueError(
                "Training must show what evaluation will: episodes follow one another whole there; got window "
                f"{config.data.window} and num_trajectories {config.data.num_trajectories}. Set window to 0, or "
                "num_trajectories to 1."
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
        model = nnx.merge(self._graph, params)
        predicted = model(self._normalizer(batch), key)
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
        """Returns the policy over chains of `num_episodes` episodes."""
        return make_policy(
            self._graph,
            params,
            self._config,
            self._normalizer,
            num_episodes=num_episodes,
            clear_context=clear_context,
            full_context=full_context,
            sample_seed=sample_seed,
        )
