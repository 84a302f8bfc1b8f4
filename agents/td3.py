"""TD3: the plain off-policy learner, on a fixed set of transitions."""

import jax

from bpt_rl.agents.base import Params
from bpt_rl.datasets.transitions import TransitionBatch
from bpt_rl.nn.actor_critic import critic_values
from bpt_rl.nn.twin_critics import ActorLoss, Metrics, TwinCritics


class TD3(TwinCritics):
    """Climbs the smaller of two critics, which learn the value of the climbing policy itself.

    Critic: (Q(s, a) - y)^2 with y = r + discount min(Q1', Q2')(s', clip(actor(s') + clipped noise)). Actor: the
    largest min(Q1, Q2)(s, clip(actor(s) + clipped noise)).

    Source: Fujimoto et al. 2018 (TD3), in the form of ExoRL (Yarats et al. 2022), which is followed where the two
    differ: the actor learns at each step instead of each second, the targets ask the present actor instead of a
    slowly moving one, the actor climbs the minimum of both critics instead of the first, its own actions have the
    clipped noise too, and the noise is clipped at 0.3 instead of 0.5.
    """

    def _actor_loss(
        self, actor: Params, critic: Params, batch: TransitionBatch, key: jax.Array
    ) -> tuple[ActorLoss, Metrics]:
        del actor

        def loss(actor: Params) -> jax.Array:
            action = self._action(actor, batch.observation, key)
            return -critic_values(critic, batch.observation, action).min(axis=0).mean()

        return loss, {}
