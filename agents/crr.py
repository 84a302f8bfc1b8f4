"""CRR: imitation of those actions of the data that a critic finds better than the policy's own."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bpt_rl.agents.base import Params
from bpt_rl.datasets.transitions import TransitionBatch
from bpt_rl.nn.actor_critic import critic_values, mean_action
from bpt_rl.nn.twin_critics import ActorLoss, Metrics, TwinCritics

LARGEST_WEIGHT = 20.0
"""Of exp(advantage)."""


class CRR(TwinCritics):
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

    def _actor_loss(
        self, actor: Params, critic: Params, batch: TransitionBatch, key: jax.Array
    ) -> tuple[ActorLoss, Metrics]:
        weight = self._weight(actor, critic, batch, key)

        def loss(actor: Params) -> jax.Array:
            return -(weight * self._log_likelihood(actor, batch)).mean()

        return loss, {"weight": weight.mean()}

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
