"""What TD3, TD3+BC and CRR share: an actor, two critics, and how the critics learn; they differ in the actor's loss."""

import abc
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.datasets.transitions import TransitionBatch
from bpt_rl.nn.actor_critic import (
    Params,
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
ActorLoss = Callable[[Params], Float[jax.Array, ""]]


class TwinCriticsState(NamedTuple):
    """What has been learnt so far; a pytree."""

    actor: Trained
    critic: Trained
    target: Params
    """The slowly moving critic behind the targets."""


class TwinCritics(abc.ABC):
    """A learner whose critics follow r + discount min(Q1', Q2')(s', clip(actor(s') + clipped noise)).

    Source: Fujimoto et al. 2018 (TD3), in the form of ExoRL (Yarats et al. 2022); see `bpt_rl.agents.td3`.
    """

    def __init__(self, config: TDConfig, observation_dim: int, action_dim: int) -> None:
        self._config = config
        self._sizes = (observation_dim, action_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> TwinCriticsState:
        """Returns the state before the first update; the target is the critic."""
        (observation_dim, action_dim), width = self._sizes, self._config.hidden_dim
        actor_key, critic_key = jax.random.split(key)
        actor = init_network(jax.random.split(actor_key, 3), observation_dim, width, action_dim)
        critic = init_critic(critic_key, observation_dim + action_dim, width)
        create = Trained.create
        return TwinCriticsState(
            create(self._optimizer, actor), create(self._optimizer, critic), jax.tree.map(jnp.copy, critic)
        )

    def update(
        self, state: TwinCriticsState, batch: TransitionBatch, key: jax.Array
    ) -> tuple[TwinCriticsState, Metrics]:
        """Returns the state after one step of the critic, then one of the actor, then one of the target."""
        target_key, actor_key = jax.random.split(key)
        after = self._action(state.actor.params, batch.next_observation, target_key)
        value = critic_values(state.target, batch.next_observation, after).min(axis=0)
        target = batch.reward + batch.discount * value

        def critic_loss(critic: Params) -> jax.Array:
            return two_errors(critic_values(critic, batch.observation, batch.action), target)

        critic, critic_error = descend(self._optimizer, state.critic, critic_loss)
        actor_loss, metrics = self._actor_loss(state.actor.params, critic.params, batch, actor_key)
        actor, actor_error = descend(self._optimizer, state.actor, actor_loss)
        following = optax.incremental_update(critic.params, state.target, self._config.target_rate)
        metrics = {"critic_loss": critic_error, "actor_loss": actor_error, "value": target.mean()} | metrics
        return TwinCriticsState(actor, critic, following), metrics

    @abc.abstractmethod
    def _actor_loss(
        self, actor: Params, critic: Params, batch: TransitionBatch, key: jax.Array
    ) -> tuple[ActorLoss, Metrics]:
        """Returns the actor's loss, which is differentiated by its argument alone, and metrics of its own.

        Args:
          actor: Parameters before the step, as a constant.
          critic: Parameters after its step.
          batch: Transitions.
          key: Of the actor's noise.
        """

    def _action(
        self, actor: Params, observation: Float[jax.Array, "*batch O"], key: jax.Array
    ) -> Float[jax.Array, "*batch A"]:
        mean = mean_action(actor, observation)
        return noisy_action(mean, key, noise=self._config.noise, clip=self._config.noise_clip)

    def policy(self, state: TwinCriticsState) -> ActorPolicy:
        """Returns the policy without noise."""
        return ActorPolicy(mean_action, state.actor.params)
