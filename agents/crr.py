"""CRR: imitation of those actions of the data that a critic finds better than the policy's own."""

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

LARGEST_WEIGHT = 20.0
"""Of exp(advantage)."""
Metrics = dict[str, Float[jax.Array, ""]]


class CRRState(NamedTuple):
    """What CRR has learnt so far; a pytree."""

    actor: Trained
    critic: Trained
    target: Params
    """The slowly moving critic behind the targets."""


class CRR:
    """Regression on the data's actions, weighted by their advantage.

    Actor: the largest w(A) log p(a | s) for the data's actions, A = min(Q1, Q2)(s, a) less the mean of the same over
    actions of the policy at s, by the critic after its step. Neither has a gradient. w is 1 where A > 0 and else 0
    (indicator), exp(A) up to 20 (exp), or A itself (identity, ExoRL's third choice). The critic is TD3's.

    p is the density of a Gaussian around the actor's mean, of the fixed standard deviation `noise` in each entry: not
    of the actions as they are clipped, which would put a lump of probability at the bounds.

    Source: Wang et al. 2020 (Critic Regularized Regression), in the form of ExoRL (Yarats et al. 2022), which is
    followed where the two differ: two critics and their minimum instead of a distribution of returns, a fixed
    deviation instead of a learnt mixture, 10 samples of the value instead of 4, the identity as a third weight, and
    the present actor behind the targets. The default, the indicator, is what the paper calls binary.
    """

    def __init__(self, config: TDConfig, observation_dim: int, action_dim: int) -> None:
        self._config = config
        self._sizes = (observation_dim, action_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> CRRState:
        """Returns the state before the first update; the target is the critic."""
        (observation_dim, action_dim), width = self._sizes, self._config.hidden_dim
        actor_key, critic_key = jax.random.split(key)
        actor = init_network(jax.random.split(actor_key, 3), observation_dim, width, action_dim)
        critic = init_critic(critic_key, observation_dim + action_dim, width)
        create = Trained.create
        return CRRState(
            create(self._optimizer, actor), create(self._optimizer, critic), jax.tree.map(jnp.copy, critic)
        )

    def update(self, state: CRRState, batch: TransitionBatch, key: jax.Array) -> tuple[CRRState, Metrics]:
        """Returns the state after one step of the critic, then one of the actor, then one of the target."""
        target_key, actor_key = jax.random.split(key)
        after = self._action(state.actor.params, batch.next_observation, target_key)
        value = critic_values(state.target, batch.next_observation, after).min(axis=0)
        target = batch.reward + batch.discount * value

        def critic_loss(critic: Params) -> jax.Array:
            return two_errors(critic_values(critic, batch.observation, batch.action), target)

        critic, critic_error = descend(self._optimizer, state.critic, critic_loss)

        weight = self._weight(state.actor.params, critic.params, batch, actor_key)

        def actor_loss(actor: Params) -> jax.Array:
            return -(weight * self._log_likelihood(actor, batch)).mean()

        actor, actor_error = descend(self._optimizer, state.actor, actor_loss)
        following = optax.incremental_update(critic.params, state.target, self._config.target_rate)
        metrics = {"critic_loss": critic_error, "actor_loss": actor_error, "value": target.mean()}
        metrics["weight"] = weight.mean()
        return CRRState(actor, critic, following), metrics

    def _weight(
        self, actor: Params, critic: Params, batch: TransitionBatch, key: jax.Array
    ) -> Float[jax.Array, "B"]:
        """Returns what each action's likelihood counts."""
        shape = (self._config.crr.num_value_samples, *batch.observation.shape)
        observation = jnp.broadcast_to(batch.observation, shape)
        own = critic_values(critic, observation, self._action(actor, observation, key))
        value = critic_values(critic, batch.observation, batch.action).min(axis=0)
        advantage = value - own.min(axis=0).mean(axis=0)
        weights = {
            "indicator": (advantage > 0).astype(jnp.float32),
            "exp": jnp.minimum(jnp.exp(advantage), LARGEST_WEIGHT),
            "identity": advantage,
        }
        return weights[self._config.crr.weight]

    def _log_likelihood(self, actor: Params, batch: TransitionBatch) -> Float[jax.Array, "B"]:
        deviations = (batch.action - mean_action(actor, batch.observation)) / self._config.noise
        constant = math.log(self._config.noise * math.sqrt(2 * math.pi))
        return (-jnp.square(deviations) / 2 - constant).sum(axis=-1)

    def _action(
        self, actor: Params, observation: Float[jax.Array, "*batch O"], key: jax.Array
    ) -> Float[jax.Array, "*batch A"]:
        mean = mean_action(actor, observation)
        return noisy_action(mean, key, noise=self._config.noise, clip=self._config.noise_clip)

    def policy(self, state: CRRState) -> ActorPolicy:
        """Returns the policy without noise."""
        return ActorPolicy(mean_action, state.actor.params)
