"""What agents that learn from trajectories through a transformer share; they differ in what they may be shown."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Float

from bpt_rl.config import FullContext, TrainConfig
from bpt_rl.nn.cached_policy import CachedPolicy
from bpt_rl.nn.loss_over_devices import loss_over_devices
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.policy import make_policy
from bpt_rl.nn.trajectory_model import TrajectoryModel, action_loss
from bpt_rl.nn.windowed_policy import WindowedPolicy
from bpt_rl.types import WITHOUT_RETURN, DataStatistics, PackedBatch

Params = Any
"""Pytree of float32 arrays."""


class TrajectoryLearner:
    """A trajectory model that learns the actions of the steps that count, and acts over chains of episodes."""

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
        normalized, mesh = self._normalizer(batch), self._config.mesh
        if mesh.num_devices > 1:
            model_config = self._config.model
            loss = loss_over_devices(self._graph, params, normalized, key, model=model_config, mesh=mesh)
            return loss, {"loss": loss}
        predicted = nnx.merge(self._graph, params)(normalized, key)
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
    ) -> CachedPolicy | WindowedPolicy:
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


def check_asks_for_a_return(config: TrainConfig) -> None:
    """Refuses layouts that carry no return to an agent that is asked for one.

    Raises:
      ValueError: If the layout is one of them.
    """
    if config.model.layout in WITHOUT_RETURN:
        raise ValueError(
            f"Agent {config.agent} is asked for a return, which layout {config.model.layout!r} does not carry. Use "
            "return_state_action_reward, return_state_action or fused, or train agent ad."
        )
