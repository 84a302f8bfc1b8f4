"""Deterministic policy gradients on whatever reward an explorer pays: the learner behind every one of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.agents.base import Explorer, Params
from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.actor_critic import (
    apply_linear,
    apply_trunk,
    init_linear,
    init_network,
    init_trunk,
    inside,
    mean_action,
    noisy_action,
    two_errors,
)
from bpt_rl.types import Transition

Metrics = dict[str, Float[jax.Array, ""]]


class LearnerState(NamedTuple):
    """What the learner has learnt so far; a pytree."""

    actor: Params
    critic: Params
    target: Params
    """The slowly moving critic behind the targets."""
    actor_moments: optax.OptState
    critic_moments: optax.OptState


class DDPG:
    """Actor, two-headed critic and their updates, as URLB sets them for observations of states.

    Actor: linear, layer norm, tanh; linear, ReLU; linear, tanh. Critic: the same trunk over observation and action,
    and above it two heads of one hidden layer each, whose minimum counts. Both read the skill behind the observation.
    The transition's intrinsic reward, computed from the batch, stands for its n steps: the target is that reward plus
    discount**n times the target critic's value after them. An n-step return of true rewards would add up n of them,
    but URLB, which is followed, sums only the task's rewards over the n steps and then replaces that sum.

    Source: Lillicrap et al. 2016 (DDPG), Fujimoto et al. 2018 (two critics), Yarats et al. 2021 (DrQ-v2: clipped
    noise, n-step targets); URLB's settings (Laskin et al. 2021). URLB's quirks kept: the two heads share a trunk, and
    gradients pass through the clipping of an action as if it were not there.
    """

    def __init__(
        self, config: ExplorationConfig, observation_dim: int, action_dim: int, explorer: Explorer
    ) -> None:
        self._config = config
        self._input_dim = observation_dim + explorer.skill_dim
        self._action_dim = action_dim
        self._feature_dim = explorer.skill_dim if explorer.has_successor_features else 0
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> LearnerState:
        """Returns the state before the first update: orthogonal weights, zero biases, target equal to the critic."""
        width, keys = self._config.hidden_dim, jax.random.split(key, 6)
        actor = init_network(keys[:3], self._input_dim, width, self._action_dim)
        critic = {
            "trunk": init_trunk(keys[3], self._input_dim + self._action_dim, width),
            "hidden": _two_linears(keys[4], width, width),
            "head": _two_linears(keys[5], width, self._feature_dim or 1),
        }
        return LearnerState(
            actor=actor,
            critic=critic,
            target=jax.tree.map(jnp.copy, critic),
            actor_moments=self._optimizer.init(actor),
            critic_moments=self._optimizer.init(critic),
        )

    def act(
        self,
        state: LearnerState,
        observation: Float[jax.Array, "N O"],
        skill: Float[jax.Array, "N Z"],
        key: jax.Array,
        *,
        is_uniform: jax.Array | bool,
    ) -> Float[jax.Array, "N A"]:
        """Returns actions in [-1, 1], with the configured noise, or uniform ones that do not ask the actor."""
        uniform_key, noise_key = jax.random.split(key)
        mean = mean_action(state.actor, _with_skill(observation, skill))
        noisy = inside(mean + self._config.noise * jax.random.normal(noise_key, mean.shape))
        uniform = jax.random.uniform(uniform_key, mean.shape, minval=-1.0, maxval=1.0)
        return jnp.where(is_uniform, uniform, noisy)

    def targets(
        self, state: LearnerState, batch: Transition, reward: Float[jax.Array, "B"], key: jax.Array
    ) -> Float[jax.Array, "B"]:
        """Returns reward + discount min(Q1, Q2)(next observation, clipped noisy action) of the target critic."""
        after = _with_skill(batch.next_observation, batch.skill)
        action = self._clipped_action(state.actor, after, key)
        value = self._values(state.target, after, action, batch.skill).min(axis=0)
        target: jax.Array = reward + batch.discount * value
        return target

    def update(
        self, state: LearnerState, batch: Transition, reward: Float[jax.Array, "B"], key: jax.Array
    ) -> tuple[LearnerState, Metrics]:
        """Returns the state after one step of the critic, then one of the actor, then one of the target."""
        target_key, actor_key = jax.random.split(key)
        target = self.targets(state, batch, reward, target_key)
        critic_loss, gradient = jax.value_and_grad(self._critic_loss)(state.critic, batch, target)
        critic, critic_moments = self._step(state.critic, gradient, state.critic_moments)
        actor_loss, gradient = jax.value_and_grad(self._actor_loss)(state.actor, critic, batch, actor_key)
        actor, actor_moments = self._step(state.actor, gradient, state.actor_moments)
        following = optax.incremental_update(critic, state.target, self._config.target_rate)
        metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "value": target.mean()}
        return LearnerState(actor, critic, following, actor_moments, critic_moments), metrics

    def _critic_loss(
        self, critic: Params, batch: Transition, target: Float[jax.Array, "B"]
    ) -> Float[jax.Array, ""]:
        observation = _with_skill(batch.observation, batch.skill)
        values = self._values(critic, observation, batch.action, batch.skill)
        return two_errors(values, target)

    def _actor_loss(
        self, actor: Params, critic: Params, batch: Transition, key: jax.Array
    ) -> Float[jax.Array, ""]:
        observation = _with_skill(batch.observation, batch.skill)
        action = self._clipped_action(actor, observation, key)
        return -self._values(critic, observation, action, batch.skill).min(axis=0).mean()

    def _step(
        self, params: Params, gradient: Params, moments: optax.OptState
    ) -> tuple[Params, optax.OptState]:
        updates, moments = self._optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments

    def _clipped_action(
        self, actor: Params, inputs: Float[jax.Array, "B I"], key: jax.Array
    ) -> Float[jax.Array, "B A"]:
        mean = mean_action(actor, inputs)
        return noisy_action(mean, key, noise=self._config.noise, clip=self._config.noise_clip)

    def _values(
        self,
        critic: Params,
        inputs: Float[jax.Array, "B I"],
        action: Float[jax.Array, "B A"],
        skill: Float[jax.Array, "B Z"],
    ) -> Float[jax.Array, "2 B"]:
        trunk = apply_trunk(critic["trunk"], jnp.concatenate([inputs, action], axis=-1))
        hidden = jax.nn.relu(jax.vmap(apply_linear, in_axes=(0, None))(critic["hidden"], trunk))
        features = jax.vmap(apply_linear)(critic["head"], hidden)
        return jnp.einsum("hbz,bz->hb", features, skill) if self._feature_dim else features[..., 0]


def _with_skill(observation: jax.Array, skill: jax.Array) -> jax.Array:
    return jnp.concatenate([observation, skill], axis=-1)


def _two_linears(key: jax.Array, num_inputs: int, num_outputs: int) -> Params:
    one, other = (init_linear(k, num_inputs, num_outputs) for k in jax.random.split(key))
    return jax.tree.map(lambda a, b: jnp.stack([a, b]), one, other)
