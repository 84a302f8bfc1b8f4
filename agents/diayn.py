"""Diversity is all you need: skills that can be told apart by the states they lead to."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron
from bpt_rl.types import Transition

NUM_SKILLS = 16
SKILL_STEPS = 50


class DiaynState(NamedTuple):
    """What DIAYN learns; a pytree."""

    discriminator: Perceptron
    """Observation to a logit for each skill."""
    optimizer: Any


class Diayn:
    """Rewards observations by which a discriminator recognises the skill that the policy follows.

    reward = log q(z | s') + log 16, for one of 16 skills z, drawn uniformly and given to actor and critic one-hot.

    Source: Eysenbach et al. 2019 (Diversity is All You Need), section 3; URLB's settings, where a skill is followed
    for 50 steps instead of an episode and the entropy bonus for actions is left to the learner's noise.
    """

    skill_dim = NUM_SKILLS
    skill_steps = SKILL_STEPS
    has_successor_features = False

    def __init__(self, config: ExplorationConfig, observation_dim: int, action_dim: int) -> None:
        del action_dim
        self._sizes = (observation_dim, config.hidden_dim, config.hidden_dim, NUM_SKILLS)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> DiaynState:
        """Returns the state before the first update."""
        discriminator = init_perceptron(key, self._sizes)
        return DiaynState(discriminator, self._optimizer.init(discriminator))

    def draw_skills(self, state: DiaynState, key: jax.Array, num_skills: int) -> Float[jax.Array, "N Z"]:
        """Returns one-hot skills, drawn uniformly."""
        del state
        return jax.nn.one_hot(jax.random.randint(key, (num_skills,), 0, NUM_SKILLS), NUM_SKILLS)

    def update(
        self, state: DiaynState, batch: Transition, key: jax.Array
    ) -> tuple[DiaynState, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one step of the discriminator, rewards by the stepped one, and metrics.

        The metrics hold `skill_accuracy`, the share of skills that the stepped discriminator gets right.
        """
        del key

        def log_probabilities(discriminator: Perceptron) -> jax.Array:
            logs: jax.Array = jax.nn.log_softmax(apply_perceptron(discriminator, batch.next_observation))
            return logs

        def loss_of(discriminator: Perceptron) -> jax.Array:
            return -jnp.sum(batch.skill * log_probabilities(discriminator), axis=-1).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.discriminator)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer)
        discriminator = optax.apply_updates(state.discriminator, updates)
        logs = log_probabilities(discriminator)
        reward = (batch.skill * logs).sum(axis=-1) + math.log(NUM_SKILLS)
        accuracy = (logs.argmax(axis=-1) == batch.skill.argmax(axis=-1)).mean()
        state = DiaynState(discriminator, optimizer)
        return state, reward, {"explorer_loss": loss, "skill_accuracy": accuracy}
