"""Active pre-training with successor features: particle entropy, and features that lie along the skill."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.particle_entropy import particle_entropy
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron
from bpt_rl.nn.running_moments import RunningMoments
from bpt_rl.nn.vectors import unit_vectors
from bpt_rl.types import Transition

NUM_FEATURES = 10
SKILL_STEPS = 5


class ApsState(NamedTuple):
    """What APS learns; a pytree."""

    feature_network: Perceptron
    optimizer: Any
    distance_moments: RunningMoments


class Aps:
    """Rewards observations that are far from the batch's others and whose features lie along the skill.

    reward = log(1 + mean distance of f(s') to its 12 nearest neighbours in the batch) + w . f(s') / |f(s')|, for a
    skill w drawn uniformly from the unit sphere of 10 dimensions. The features learn to maximise the second term; the
    critic predicts their successor features, whose product with w is the value.

    Source: Liu and Abbeel 2021 (APS: Active Pretraining with Successor Features); URLB's settings,
    where a skill is followed for 5 steps. Distances are those of features before they are scaled to length 1, and a
    particle counts as one of its own neighbours, as in URLB.
    """

    skill_dim = NUM_FEATURES
    skill_steps = SKILL_STEPS
    has_successor_features = True

    def __init__(self, config: ExplorationConfig, observation_dim: int, action_dim: int) -> None:
        del action_dim
        self._sizes = (observation_dim, config.hidden_dim, config.hidden_dim, NUM_FEATURES)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> ApsState:
        """Returns the state before the first update."""
        network = init_perceptron(key, self._sizes)
        return ApsState(network, self._optimizer.init(network), RunningMoments.create())

    def draw_skills(self, state: ApsState, key: jax.Array, num_skills: int) -> Float[jax.Array, "N Z"]:
        """Returns vectors of length 1 of uniform direction."""
        del state
        return unit_vectors(jax.random.normal(key, (num_skills, NUM_FEATURES)))

    def update(
        self, state: ApsState, batch: Transition, key: jax.Array
    ) -> tuple[ApsState, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one step of the features, rewards by the stepped ones, and metrics.

        The metrics hold the means of both terms, `particle_entropy` and `skill_product`.
        """
        del key

        def products(features: jax.Array) -> jax.Array:
            return jnp.sum(batch.skill * unit_vectors(features), axis=-1)

        def loss_of(network: Perceptron) -> jax.Array:
            return -products(apply_perceptron(network, batch.next_observation)).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.feature_network)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer)
        network = optax.apply_updates(state.feature_network, updates)
        features = apply_perceptron(network, batch.next_observation)
        entropy, moments = particle_entropy(features, state.distance_moments)
        product = products(features)
        metrics = {
            "explorer_loss": loss,
            "particle_entropy": entropy.mean(),
            "skill_product": product.mean(),
        }
        return ApsState(network, optimizer, moments), entropy + product, metrics
