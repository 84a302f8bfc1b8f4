"""TD3+BC: TD3 whose actor is drawn towards the actions of the data."""

import jax
import jax.numpy as jnp

from bpt_rl.agents.base import Params
from bpt_rl.datasets.transitions import TransitionBatch
from bpt_rl.nn.actor_critic import critic_values, mean_action
from bpt_rl.nn.twin_critics import ActorLoss, Metrics, TwinCritics


class TD3BC(TwinCritics):
    """TD3 with an actor that both climbs the critic and imitates.

    Actor: least -alpha min(Q1, Q2)(s, noisy actor(s)) / mean |min(Q1, Q2)| + (actor(s) - a)^2, both means over the
    batch and the error one over the entries of an action too. The divisor has no gradient: it only makes alpha mean
    the same whatever the size of rewards. The critic is TD3's.

    Source: Fujimoto and Gu 2021 (A Minimalist Approach to Offline Reinforcement Learning), with alpha 2.5, in the form
    of ExoRL (Yarats et al. 2022), which is followed where the two differ: as in `bpt_rl.agents.td3`, and observations
    are not normalised, since the networks' first layer norm stands there instead.
    """

    def _actor_loss(
        self, actor: Params, critic: Params, batch: TransitionBatch, key: jax.Array
    ) -> tuple[ActorLoss, Metrics]:
        del actor

        def loss(actor: Params) -> jax.Array:
            action = self._action(actor, batch.observation, key)
            value = critic_values(critic, batch.observation, action).min(axis=0)
            weight = self._config.td3_bc.alpha / jax.lax.stop_gradient(jnp.abs(value).mean())
            imitation = jnp.square(mean_action(actor, batch.observation) - batch.action).mean()
            return -weight * value.mean() + imitation

        return loss, {}
