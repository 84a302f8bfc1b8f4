"""TD3: the plain off-policy learner, on a fixed set of transitions."""

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


class TD3State(NamedTuple):
    """What TD3 has learnt so far; a pytree."""

    actor: Trained
    critic: Trained
    target: Params
    """The slowly moving critic behind the targets."""


class TD3:
    """Climbs the smaller of two critics, which learn the value of the climbing policy itself.

    Critic: (Q(s, a) - y)^2 with y = r + discount min(Q1', Q2')(s', clip(actor(s') + clipped noise)). Actor: the
    largest min(Q1, Q2)(s, clip(actor(s) + clipped noise)).

    Source: Fujimoto et al. 2018 (TD3), in the form of ExoRL (Yarats et al. 2022), which is followed where the two
    differ: the actor learns at each step instead of each second, the targets ask the present actor instead of a
    slowly moving one, the actor climbs the minimum of both critics instead of the first, its own actions have the
    clipped noise too, and the noise is clipped at 0.3 instead of 0.5.
    """

    def __init__(self, config: TDConfig, observation_dim: int, action_dim: int) -> None:
        self._config = config
        self._sizes = (observation_dim, action_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> TD3State:
        """Returns the state before the first update; the target is the critic."""
        (observation_dim, action_dim), width = self._sizes, self._config.hidden_dim
        actor_key, critic_key = jax.random.split(key)
        actor = init_network(jax.random.split(actor_key, 3), observation_dim, width, action_dim)
        critic = init_critic(critic_key, observation_dim + action_dim, width)
        create = Trained.create
        return TD3State(
            create(self._optimizer, actor), create(self._optimizer, critic), jax.tree.map(jnp.copy, critic)
        )

    def update(self, state: TD3State, batch: TransitionBatch, key: jax.Array) -> tuple[TD3State, Metrics]:
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
            return -critic_values(critic.params, batch.observation, action).min(axis=0).mean()

        actor, actor_error = descend(self._optimizer, state.actor, actor_loss)
        following = optax.incremental_update(critic.params, state.target, self._config.target_rate)
        metrics = {"critic_loss": critic_error, "actor_loss": actor_error, "value": target.mean()}
        return TD3State(actor, critic, following), metrics

    def _action(
        self, actor: Params, observation: Float[jax.Array, "B O"], key: jax.Array
    ) -> Float[jax.Array, "B A"]:
        mean = mean_action(actor, observation)
        return noisy_action(mean, key, noise=self._config.noise, clip=self._config.noise_clip)

    def policy(self, state: TD3State) -> ActorPolicy:
        """Returns the policy without noise."""
        return ActorPolicy(mean_action, state.actor.params)
