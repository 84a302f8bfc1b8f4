"""TD3+BC: TD3 whose actor is drawn towards the actions of the data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.agents.base import Params
from bpt_rl.datasets.transitions import TransitionBatch
from bpt_rl.nn.actor_critic import (
    Trained,
    critic_values,
    descend,
    init_critic,
    init_network,
    mean_action,
    noisy_action,
    two_errors,
)
from bpt_rl.nn.actor_policy import ActorPolicy
from bpt_rl.td_config import TDConfig

Metrics = dict[str, Float[jax.Array, ""]]


class TD3BCState(NamedTuple):
    """What TD3+BC has learnt so far; a pytree."""

    actor: Trained
    critic: Trained
    target: Params
    """The slowly moving critic behind the targets."""


class TD3BC:
    """TD3 with an actor that both climbs the critic and imitates.

    Actor: least -alpha min(Q1, Q2)(s, noisy actor(s)) / mean |min(Q1, Q2)| + (actor(s) - a)^2, both means over the
    batch and the error one over the entries of an action too. The divisor has no gradient: it only makes alpha mean
    the same whatever the size of rewards. The critic is TD3's.

    Source: Fujimoto and Gu 2021 (A Minimalist Approach to Offline Reinforcement Learning), with alpha 2.5, in the form
    of ExoRL (Yarats et al. 2022), which is followed where the two differ: as in `bpt_rl.agents.td3`, and observations
    are not normalised, since the networks' first layer norm stands there instead.
    """

    def __init__(self, config: TDConfig, observation_dim: int, action_dim: int) -> None:
        self._config = config
        self._sizes = (observation_dim, action_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> TD3BCState:
        """Returns the state before the first update; the target is the critic."""
        (observation_dim, action_dim), width = self._sizes, self._config.hidden_dim
        actor_key, critic_key = jax.random.split(key)
        actor = init_network(jax.random.split(actor_key, 3), observation_dim, width, action_dim)
        critic = init_critic(critic_key, observation_dim + action_dim, width)
        create = Trained.create
        return TD3BCState(
            create(self._optimizer, actor), create(self._optimizer, critic), jax.tree.map(jnp.copy, critic)
        )

    def update(self, state: TD3BCState, batch: TransitionBatch, key: jax.Array) -> tuple[TD3BCState, Metrics]:
        """Returns the state after one step of the critic, then one of the actor, then one of the target."""
        target_key, actor_key = jax.random.split(key)
        after = self._action(state.actor.params, batch.next_observation, target_key)
        value = critic_values(state.target, batch.next_observation, after).min(axis=0)
        target = batch.reward + batch.discount * value

        def critic_loss(critic: Params) -> jax.Array:
            return two_errors(critic_values(critic, batch.observation, batch.action), target)

        critic, critic_error = descend(self._optimizer, state.critic, critic_loss)

        def actor_loss(actor: Params) -> jax.Array:
            action = self._action(actor, batch.observation, actor_key)
            value = critic_values(critic.params, batch.observation, action).min(axis=0)
            weight = self._config.td3_bc.alpha / jax.lax.stop_gradient(jnp.abs(value).mean())
            imitation = jnp.square(mean_action(actor, batch.observation) - batch.action).mean()
            return -weight * value.mean() + imitation

        actor, actor_error = descend(self._optimizer, state.actor, actor_loss)
        following = optax.incremental_update(critic.params, state.target, self._config.target_rate)
        metrics = {"critic_loss": critic_error, "actor_loss": actor_error, "value": target.mean()}
        return TD3BCState(actor, critic, following), metrics

    def _action(
        self, actor: Params, observation: Float[jax.Array, "B O"], key: jax.Array
    ) -> Float[jax.Array, "B A"]:
        mean = mean_action(actor, observation)
        return noisy_action(mean, key, noise=self._config.noise, clip=self._config.noise_clip)

    def policy(self, state: TD3BCState) -> ActorPolicy:
        """Returns the policy without noise."""
        return ActorPolicy(mean_action, state.actor.params)
