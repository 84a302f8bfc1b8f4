"""Behaviour cloning with a multilayer perceptron; with `data.top_fraction = 0.1` it is BC-10%."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from bpt_rl.agents.base import Params
from bpt_rl.config import FullContext, TrainConfig
from bpt_rl.datasets.chains import Chain
from bpt_rl.nn.hashed_graph import HashedGraph, hashed_graph
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import ActionDistribution, action_loss
from bpt_rl.nn.transformer import ACTIVATIONS
from bpt_rl.types import DataStatistics, PackedBatch


class Perceptron(nnx.Module):
    """Normalised observation to tanh-bounded action, `num_layers` hidden layers of `embed_dim`."""

    def __init__(self, config: TrainConfig, observation_dim: int, action_dim: int, rngs: nnx.Rngs) -> None:
        model = config.model
        sizes = [observation_dim] + [model.embed_dim] * model.num_layers
        self.activation = ACTIVATIONS[model.activation]
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.head = nnx.Linear(sizes[-1], action_dim, rngs=rngs)

    def __call__(self, observation: Float[Any, "*batch O"]) -> Float[jax.Array, "*batch A"]:
        """Returns the action."""
        x = jnp.asarray(observation)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return jnp.tanh(self.head(x))


@functools.partial(jax.jit, static_argnums=0)
def _act(graph: HashedGraph, params: Params, observation: jax.Array) -> jax.Array:
    action: jax.Array = graph.merge(params)(observation)
    return action


class BehaviourCloning:
    """Imitates the actions of the episodes that may be drawn, from the present observation alone."""

    def __init__(self, config: TrainConfig, statistics: DataStatistics) -> None:
        if config.model.action_distribution != "deterministic":
            raise ValueError(
                "Behaviour cloning has a deterministic head only; got action_distribution "
                f"{config.model.action_distribution!r}. Use deterministic."
            )
        if config.data.relabel == "expected_return":
            raise ValueError(
                "Behaviour cloning is asked for no return, so none is to be expected; got relabel "
                f"{config.data.relabel!r}. Leave data.relabel out."
            )
        self._config = config
        self._normalizer = Normalizer.from_statistics(statistics, config.return_scale)
        self._sizes = (statistics.observation_dim, statistics.action_dim)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: self._model(jax.random.key(0))))

    def _model(self, key: jax.Array) -> Perceptron:
        return Perceptron(self._config, *self._sizes, nnx.Rngs(key))

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters."""
        return nnx.to_pure_dict(nnx.state(self._model(key)))

    def loss(
        self, params: Params, batch: PackedBatch, key: jax.Array | None
    ) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
        """Returns the mean squared error of the actions; the key is not used."""
        del key
        mean = nnx.merge(self._graph, params)(self._normalizer(batch).observation)
        predicted = ActionDistribution(mean, jnp.zeros_like(mean))
        loss = action_loss(predicted, batch.action, batch.loss_mask, "deterministic")
        return loss, {"loss": loss}

    def policy(
        self,
        params: Params,
        *,
        num_episodes: int = 1,
        clear_context: bool = False,
        full_context: FullContext = "refuse",
        sample_seed: int | None = None,
    ) -> "CloningPolicy":
        """Returns the policy; it has no context, so nothing that is said of one matters.

        Raises:
          ValueError: If actions are to be drawn.
        """
        del num_episodes, clear_context, full_context
        if sample_seed is not None:
            raise ValueError(
                "Drawing actions needs a Gaussian head; behaviour cloning has none. Evaluate it without --sample."
            )
        return CloningPolicy(self._graph, params, self._normalizer)


class CloningPolicy:
    """Acts on the present observation; the carry is empty."""

    def __init__(self, graph: nnx.GraphDef[Perceptron], params: Params, normalizer: Normalizer) -> None:
        self._graph = hashed_graph(graph)
        self._params = params
        self._normalizer = normalizer

    def start(self, num_environments: int, context: Sequence[Chain] | None = None) -> tuple[()]:
        """Returns the empty carry."""
        del num_environments, context
        return ()

    def act(
        self, carry: tuple[()], observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[tuple[()], Float[np.ndarray, "B A"]]:
        """Returns the cloned action."""
        del return_to_go
        normalized = (observation - self._normalizer.observation_mean) / self._normalizer.observation_std
        return carry, np.asarray(_act(self._graph, self._params, normalized))

    def observe(
        self, carry: tuple[()], reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]
    ) -> tuple[()]:
        """Returns the empty carry."""
        del reward, done
        return carry
