"""Exploration by disagreement: where models of the dynamics predict different things, data is missing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron
from bpt_rl.nn.vectors import lengths
from bpt_rl.types import Transition

NUM_MODELS = 5


class DisagreementState(NamedTuple):
    """What the ensemble learns; a pytree."""

    models: Perceptron
    """Observation and action to the next observation; each array has an axis of 5 models in front."""
    optimizer: Any


class Disagreement:
    """Rewards transitions on whose outcome five models of forward dynamics differ.

    reward = variance over the models of the predicted next observation, mean over its entries; the variance is the
    unbiased one.

    Source: Pathak et al. 2019 (Self-Supervised Exploration via Disagreement); URLB's settings. As in URLB
    all models learn from the same batches and differ by their first parameters alone, plain observations stand for
    features, lengths of errors are minimised, not their squares, and the next observation lies n steps later.
    """

    skill_dim = 0
    skill_steps = 0
    has_successor_features = False

    def __init__(self, config: ExplorationConfig, observation_dim: int, action_dim: int) -> None:
        self._sizes = (observation_dim + action_dim, config.hidden_dim, observation_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> DisagreementState:
        """Returns the state before the first update."""
        each = [init_perceptron(k, self._sizes) for k in jax.random.split(key, NUM_MODELS)]
        models = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
        return DisagreementState(models, self._optimizer.init(models))

    def draw_skills(
        self, state: DisagreementState, key: jax.Array, num_skills: int
    ) -> Float[jax.Array, "N Z"]:
        """Returns skills without entries."""
        del state, key
        return jnp.zeros((num_skills, 0))

    def update(
        self, state: DisagreementState, batch: Transition, key: jax.Array
    ) -> tuple[DisagreementState, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one step of the models, rewards by the stepped ones, and metrics."""
        del key
        before = jnp.concatenate([batch.observation, batch.action], axis=-1)

        def predictions(models: Perceptron) -> jax.Array:
            return jax.vmap(apply_perceptron, in_axes=(0, None))(models, before)

        def loss_of(models: Perceptron) -> jax.Array:
            return lengths(batch.next_observation - predictions(models)).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.models)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer)
        models = optax.apply_updates(state.models, updates)
        reward = predictions(models).var(axis=0, ddof=1).mean(axis=-1)
        return DisagreementState(models, optimizer), reward, {"explorer_loss": loss}
