"""CQL: soft actor-critic whose critics are held down wherever the data does not go."""

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
    two_errors,
)
from bpt_rl.nn.actor_policy import ActorPolicy
from bpt_rl.td_config import TDConfig

LOG_STD = (-10.0, 2.0)
"""Bounds of the logarithm of the standard deviation before the tanh."""
LARGEST_ALPHA = 1e6
Metrics = dict[str, Float[jax.Array, ""]]


class CQLState(NamedTuple):
    """What CQL has learnt so far; a pytree."""

    actor: Trained
    critic: Trained
    target: Params
    """The slowly moving critic behind the targets."""
    log_temperature: Trained
    """Of the entropy's weight in the actor's loss."""
    log_alpha: Trained
    """Of the penalty's weight, where it is learnt."""


class CQL:
    """Soft actor-critic with a penalty on the values of actions other than the data's.

    Critic: TD error + alpha sum over both critics of (log sum exp of Q(s, .) over sampled actions and the data's own
    - Q(s, a)). Sampled are uniform actions, the policy's at s, and the policy's at s', a few of each, none with a
    gradient. Actor: a Gaussian squashed by tanh; least temperature log p - min(Q1, Q2). The temperature moves until
    the entropy is -A, for A entries of an action.

    Source: Kumar et al. 2020 (CQL(H)), Haarnoja et al. 2018 (SAC); in the form of ExoRL (Yarats et al. 2022), which is
    followed where they differ: no entropy in the targets (the default of CQL's authors too, SAC's has it), no
    importance weights in the log sum exp (the paper's appendix has them), the data's action among the sampled ones,
    and one multiplier for the penalty of both critics together. Two things are SAC's instead, which ExoRL's code may
    have meant: a log-density is the sum over an action's entries (there each entry's entropy is held to -A by itself),
    and the mean is squashed once (twice there, so that no action at the mean reaches 0.77).
    """

    def __init__(self, config: TDConfig, observation_dim: int, action_dim: int) -> None:
        self._config = config
        self._sizes = (observation_dim, action_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> CQLState:
        """Returns the state before the first update; the target is the critic and both weights are 1."""
        (observation_dim, action_dim), width = self._sizes, self._config.hidden_dim
        actor_key, critic_key = jax.random.split(key)
        actor = init_network(jax.random.split(actor_key, 3), observation_dim, width, 2 * action_dim)
        critic = init_critic(critic_key, observation_dim + action_dim, width)
        create, optimizer = Trained.create, self._optimizer
        return CQLState(
            actor=create(optimizer, actor),
            critic=create(optimizer, critic),
            target=jax.tree.map(jnp.copy, critic),
            log_temperature=create(optimizer, jnp.zeros(())),
            log_alpha=create(optimizer, jnp.zeros(())),
        )

    def update(self, state: CQLState, batch: TransitionBatch, key: jax.Array) -> tuple[CQLState, Metrics]:
        """Returns the state after one step of the critic, the temperature, the actor and the target, in this order.

        With a learnt penalty its weight steps first of all, by the penalty of the critic before its step.
        """
        target_key, sample_key, actor_key = jax.random.split(key, 3)
        after, _ = sample_actions(state.actor.params, batch.next_observation, target_key)
        value = critic_values(state.target, batch.next_observation, after).min(axis=0)
        target = batch.reward + batch.discount * value
        candidates = self._candidates(state.actor.params, batch, sample_key)
        log_alpha, alpha = self._penalty_weight(state, batch, candidates)

        def critic_loss(critic: Params) -> jax.Array:
            error = two_errors(critic_values(critic, batch.observation, batch.action), target)
            return error + alpha * conservative_penalty(critic, batch, candidates)

        critic, critic_error = descend(self._optimizer, state.critic, critic_loss)
        log_temperature, entropy = self._temperature(state, batch, actor_key)

        def actor_loss(actor: Params) -> jax.Array:
            action, log_density = sample_actions(actor, batch.observation, actor_key)
            values = critic_values(critic.params, batch.observation, action).min(axis=0)
            return (jnp.exp(log_temperature.params) * log_density - values).mean()

        actor, actor_error = descend(self._optimizer, state.actor, actor_loss)
        following = optax.incremental_update(critic.params, state.target, self._config.target_rate)
        metrics = {
            "critic_loss": critic_error,
            "actor_loss": actor_error,
            "value": target.mean(),
            "penalty": conservative_penalty(state.critic.params, batch, candidates),
            "alpha": alpha,
            "entropy": entropy,
            "temperature": jnp.exp(log_temperature.params),
        }
        return CQLState(actor, critic, following, log_temperature, log_alpha), metrics

    def _candidates(
        self, actor: Params, batch: TransitionBatch, key: jax.Array
    ) -> Float[jax.Array, "samples B A"]:
        """Returns the actions whose values the penalty holds down, beside the data's own."""
        uniform_key, here_key, after_key = jax.random.split(key, 3)
        num_samples = self._config.cql.num_samples
        shape = (num_samples, *batch.observation.shape)
        uniform = jax.random.uniform(uniform_key, (num_samples, *batch.action.shape), minval=-1.0, maxval=1.0)
        here, _ = sample_actions(actor, jnp.broadcast_to(batch.observation, shape), here_key)
        after, _ = sample_actions(actor, jnp.broadcast_to(batch.next_observation, shape), after_key)
        return jnp.concatenate([uniform, here, after])

    def _penalty_weight(
        self, state: CQLState, batch: TransitionBatch, candidates: Float[jax.Array, "samples B A"]
    ) -> tuple[Trained, Float[jax.Array, ""]]:
        config = self._config.cql
        if not config.is_lagrangian:
            return state.log_alpha, jnp.float32(config.alpha)
        excess = conservative_penalty(state.critic.params, batch, candidates) - config.target_penalty

        def weight(log_alpha: jax.Array) -> jax.Array:
            return jnp.minimum(jnp.exp(log_alpha), LARGEST_ALPHA)

        log_alpha, _ = descend(self._optimizer, state.log_alpha, lambda log: -weight(log) * excess / 2)
        return log_alpha, weight(log_alpha.params)

    def _temperature(
        self, state: CQLState, batch: TransitionBatch, key: jax.Array
    ) -> tuple[Trained, Float[jax.Array, ""]]:
        """Returns the temperature after its step, and the policy's entropy before the actor's."""
        _, log_density = sample_actions(state.actor.params, batch.observation, key)
        excess = (log_density - self._sizes[1]).mean()
        stepped, _ = descend(self._optimizer, state.log_temperature, lambda log: -log * excess)
        return stepped, -log_density.mean()

    def policy(self, state: CQLState) -> ActorPolicy:
        """Returns the policy that takes the tanh of the mean before it."""
        return ActorPolicy(squashed_mean, state.actor.params)


def squashed_mean(actor: Params, observation: Float[jax.Array, "*batch O"]) -> Float[jax.Array, "*batch A"]:
    """Returns the action at the Gaussian's mean, in [-1, 1]."""
    mean, _ = jnp.split(apply_network(actor, observation), 2, axis=-1)
    return jnp.tanh(mean)


def sample_actions(
    actor: Params, observation: Float[jax.Array, "*batch O"], key: jax.Array
) -> tuple[Float[jax.Array, "*batch A"], Float[jax.Array, "*batch"]]:
    """Returns actions of the squashed Gaussian and the logarithm of their density; both carry gradients."""
    mean, log_std = jnp.split(apply_network(actor, observation), 2, axis=-1)
    log_std = jnp.clip(log_std, *LOG_STD)
    noise = jax.random.normal(key, mean.shape)
    unsquashed = mean + jnp.exp(log_std) * noise
    gaussian = -jnp.square(noise) / 2 - log_std - math.log(2 * math.pi) / 2
    # log(1 - tanh(u)^2) without the loss of digits where the tanh is nearly 1.
    squashing = 2 * (math.log(2) - unsquashed - jax.nn.softplus(-2 * unsquashed))
    return jnp.tanh(unsquashed), (gaussian - squashing).sum(axis=-1)


def conservative_penalty(
    critic: Params, batch: TransitionBatch, candidates: Float[jax.Array, "samples B A"]
) -> Float[jax.Array, ""]:
    """Returns how far the values of any action lie above those of the data's, summed over both critics.

    Args:
      critic: Both.
      batch: Whose actions' values are held up.
      candidates: Actions whose values are held down; the data's own are added to them.
    """
    own = critic_values(critic, batch.observation, batch.action)
    observation = jnp.broadcast_to(batch.observation, (len(candidates), *batch.observation.shape))
    others = critic_values(critic, observation, candidates)
    largest = jax.nn.logsumexp(jnp.concatenate([others, own[:, None]], axis=1), axis=1)
    return (largest - own).mean(axis=1).sum()
