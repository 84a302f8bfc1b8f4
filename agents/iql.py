"""IQL: values of the best actions in the data, without ever asking about another action."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.agents.base import Params
from bpt_rl.datasets.transitions import TransitionBatch
from bpt_rl.nn.actor_critic import (
    Trained,
    apply_network,
    critic_values,
    descend,
    init_critic,
    init_network,
    mean_action,
    two_errors,
)
from bpt_rl.nn.actor_policy import ActorPolicy
from bpt_rl.td_config import TDConfig

LOG_STD = (-5.0, 2.0)
"""Bounds of the logarithm of the policy's standard deviation."""
Metrics = dict[str, Float[jax.Array, ""]]


class Actor(NamedTuple):
    """A Gaussian policy; a pytree."""

    network: Params
    """To the mean before its tanh."""
    log_std: Float[jax.Array, "A"]
    """The same for every observation."""


class IQLState(NamedTuple):
    """What IQL has learnt so far; a pytree."""

    actor: Trained
    critic: Trained
    value: Trained
    """A network of one output over observations."""
    target: Params
    """The slowly moving critic."""


class IQL:
    """A value network learns an upper expectile of the critic's values, the critic learns from it, the actor imitates.

    Value: |tau - 1(d < 0)| d^2 with d = min(Q1', Q2')(s, a) - V(s) for the data's actions. Critic: (Q(s, a) - r -
    discount V(s'))^2. Actor: the largest exp(temperature d) log p(a | s), the weight at most 100 and without gradient;
    p is a Gaussian around a mean squashed by tanh, not a squashed Gaussian, with a learnt deviation that is the same
    everywhere. Value, actor, critic and target step in this order, the actor and the critic by the new value.

    Source: Kostrikov et al. 2021 (Implicit Q-Learning): expectile 0.7 and temperature 3 are its settings for MuJoCo
    locomotion (0.9 and 10 for the ant's mazes), 100 the bound of its code, which also sets the order of steps, the
    target critic behind the weights, and bounds of the deviation. ExoRL has no IQL; networks, Adam's rate,
    batches and the target's rate are those of ExoRL's agents, so that methods differ by their losses alone: the paper
    has networks of two layers of 256, 3e-4 (with a cosine decay of the actor's), 256 and 0.005, and it scales rewards
    so that the data's returns span 1000.
    """

    def __init__(self, config: TDConfig, observation_dim: int, action_dim: int) -> None:
        self._config = config
        self._sizes = (observation_dim, action_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> IQLState:
        """Returns the state before the first update: the target is the critic, the policy's deviation 1."""
        (observation_dim, action_dim), width = self._sizes, self._config.hidden_dim
        actor_key, critic_key, value_key = jax.random.split(key, 3)
        network = init_network(jax.random.split(actor_key, 3), observation_dim, width, action_dim)
        critic = init_critic(critic_key, observation_dim + action_dim, width)
        value = init_network(jax.random.split(value_key, 3), observation_dim, width, 1)
        create, optimizer = Trained.create, self._optimizer
        return IQLState(
            actor=create(optimizer, Actor(network, jnp.zeros(action_dim))),
            critic=create(optimizer, critic),
            value=create(optimizer, value),
            target=jax.tree.map(jnp.copy, critic),
        )

    def update(self, state: IQLState, batch: TransitionBatch, key: jax.Array) -> tuple[IQLState, Metrics]:
        """Returns the state after one step of each network; nothing is drawn with the key."""
        del key
        config = self._config.iql
        best = critic_values(state.target, batch.observation, batch.action).min(axis=0)

        def value_loss(value: Params) -> jax.Array:
            return expectile_loss(best - _values(value, batch.observation), config.expectile)

        value, value_error = descend(self._optimizer, state.value, value_loss)
        advantage = best - _values(value.params, batch.observation)
        weight = jnp.minimum(jnp.exp(config.temperature * advantage), config.max_weight)

        def actor_loss(actor: Actor) -> jax.Array:
            return -(weight * log_likelihood(actor, batch)).mean()

        actor, actor_error = descend(self._optimizer, state.actor, actor_loss)
        target = batch.reward + batch.discount * _values(value.params, batch.next_observation)

        def critic_loss(critic: Params) -> jax.Array:
            return two_errors(critic_values(critic, batch.observation, batch.action), target)

        critic, critic_error = descend(self._optimizer, state.critic, critic_loss)
        following = optax.incremental_update(critic.params, state.target, self._config.target_rate)
        metrics = {
            "critic_loss": critic_error,
            "actor_loss": actor_error,
            "value_loss": value_error,
            "value": target.mean(),
            "weight": weight.mean(),
        }
        return IQLState(actor, critic, value, following), metrics

    def policy(self, state: IQLState) -> ActorPolicy:
        """Returns the policy that takes the Gaussian's mean."""
        return ActorPolicy(mean_action, state.actor.params.network)


def expectile_loss(difference: Float[jax.Array, "B"], expectile: float) -> Float[jax.Array, ""]:
    """Returns the mean square of differences, those above 0 weighted by the expectile, those below by the rest."""
    return (jnp.where(difference > 0, expectile, 1 - expectile) * jnp.square(difference)).mean()


def log_likelihood(actor: Actor, batch: TransitionBatch) -> Float[jax.Array, "B"]:
    """Returns the logarithm of the policy's density at the batch's actions."""
    log_std = jnp.clip(actor.log_std, *LOG_STD)
    deviations = (batch.action - mean_action(actor.network, batch.observation)) * jnp.exp(-log_std)
    return (-jnp.square(deviations) / 2 - log_std - math.log(2 * math.pi) / 2).sum(axis=-1)


def _values(value: Params, observation: Float[jax.Array, "B O"]) -> Float[jax.Array, "B"]:
    return apply_network(value, observation)[..., 0]
