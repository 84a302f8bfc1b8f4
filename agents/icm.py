"""Intrinsic curiosity: what forward dynamics cannot yet predict is new."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron
from bpt_rl.nn.vectors import lengths
from bpt_rl.types import Transition


class DynamicsModels(NamedTuple):
    """The two models; a pytree."""

    forward: Perceptron
    """Observation and action to the next observation."""
    backward: Perceptron
    """Observation and next observation to the action, before tanh."""


class IcmState(NamedTuple):
    """What the curiosity module learns; a pytree."""

    models: DynamicsModels
    optimizer: Any


def _forward_errors(models: DynamicsModels, batch: Transition) -> jax.Array:
    before = jnp.concatenate([batch.observation, batch.action], axis=-1)
    return lengths(batch.next_observation - apply_perceptron(models.forward, before))


class Icm:
    """Rewards transitions whose next observation is badly predicted.

    reward = log(1 + |s' - f(s, a)|), with the Euclidean length of the error of a model f of forward dynamics.

    Source: Pathak et al. 2017 (Curiosity-driven Exploration by Self-supervised Prediction), section 2; URLB's settings.
    As in URLB plain observations stand for the paper's features, so that the model of inverse dynamics is trained
    beside but changes no reward; lengths of errors are minimised, not their squares; and s' lies the transition's n
    steps after s, though only the first action is known.
    """

    skill_dim = 0
    skill_steps = 0
    has_successor_features = False

    def __init__(self, config: ExplorationConfig, observation_dim: int, action_dim: int) -> None:
        self._forward_sizes = (observation_dim + action_dim, config.hidden_dim, observation_dim)
        self._backward_sizes = (2 * observation_dim, config.hidden_dim, action_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> IcmState:
        """Returns the state before the first update."""
        forward_key, backward_key = jax.random.split(key)
        models = DynamicsModels(
            init_perceptron(forward_key, self._forward_sizes),
            init_perceptron(backward_key, self._backward_sizes),
        )
        return IcmState(models, self._optimizer.init(models))

    def draw_skills(self, state: IcmState, key: jax.Array, num_skills: int) -> Float[jax.Array, "N Z"]:
        """Returns skills without entries."""
        del state, key
        return jnp.zeros((num_skills, 0))

    def update(
        self, state: IcmState, batch: Transition, key: jax.Array
    ) -> tuple[IcmState, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one step of the models, rewards by the stepped ones, and metrics."""
        del key
        both = jnp.concatenate([batch.observation, batch.next_observation], axis=-1)

        def loss_of(models: DynamicsModels) -> jax.Array:
            action = jnp.tanh(apply_perceptron(models.backward, both))
            return _forward_errors(models, batch).mean() + lengths(batch.action - action).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.models)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer)
        models = optax.apply_updates(state.models, updates)
        reward = jnp.log1p(_forward_errors(models, batch))
        return IcmState(models, optimizer), reward, {"explorer_loss": loss}
