"""Proto-RL: prototypes of observations, and distance to candidates drawn by them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron
from bpt_rl.nn.vectors import nearest_distances, unit_vectors
from bpt_rl.types import Transition

NUM_PROTOTYPES = 512
NUM_FEATURES = 128
PROJECTOR_DIM = 512
TEMPERATURE = 0.1
SINKHORN_ITERATIONS = 3
QUEUE_SIZE = 2048
"""Candidates; a multiple of the number of prototypes."""
NEIGHBOUR = 3
"""Which of the nearest candidates' distance is the reward."""
TARGET_RATE = 0.05


class ProtoNetworks(NamedTuple):
    """What gradients train; a pytree."""

    predictor: Perceptron
    """Observation to features, one linear layer."""
    projector: Perceptron
    prototypes: Float[jax.Array, "M F"]
    """Unit vectors, one a row."""

    def features(self, observation: Float[jax.Array, "B O"]) -> Float[jax.Array, "B F"]:
        """Returns unit vectors."""
        return unit_vectors(apply_perceptron(self.predictor, observation))


class ProtoState(NamedTuple):
    """What Proto-RL learns; a pytree."""

    networks: ProtoNetworks
    target: Perceptron
    """Slowly following the predictor."""
    optimizer: Any
    queue: Float[jax.Array, "Q F"]
    """Candidates, the newest in the place of the oldest; zeros before the first."""
    num_updates: Int[jax.Array, ""]


def sinkhorn(scores: Float[jax.Array, "B M"]) -> Float[jax.Array, "B M"]:
    """Returns exp(scores), its rows scaled to sum to 1 and its columns, nearly, to B / M.

    Source: Cuturi 2013; three iterations, rows last, as in Caron et al. 2020 (SwAV), section 3.1.
    """
    assigned = jax.nn.softmax(scores.reshape(-1)).reshape(scores.shape)
    for _ in range(SINKHORN_ITERATIONS):
        assigned /= assigned.sum(axis=0) * scores.shape[1]
        assigned /= assigned.sum(axis=1, keepdims=True) * scores.shape[0]
    return assigned / assigned.sum(axis=1, keepdims=True)


class Proto:
    """Rewards observations that lie far from what 512 prototypes have drawn from the last batches.

    reward = distance of f(s') to the third nearest of 2048 candidates. At each update every prototype draws one
    candidate from the batch, with probabilities softmax over the batch of its products with f(s'); f has length 1.

    Source: Yarats et al. 2021 (Reinforcement Learning with Prototypical Representations); URLB's settings.
    As in URLB candidates are drawn without the temperature, an observation may be its own neighbour, the queue is
    filled with zeros at first, and actor and critic read plain observations.
    """

    skill_dim = 0
    skill_steps = 0
    has_successor_features = False

    def __init__(self, config: ExplorationConfig, observation_dim: int, action_dim: int) -> None:
        del action_dim
        self._observation_dim = observation_dim
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> ProtoState:
        """Returns the state before the first update."""
        predictor_key, projector_key, prototype_key = jax.random.split(key, 3)
        prototypes = init_perceptron(prototype_key, (NUM_FEATURES, NUM_PROTOTYPES))[0].kernel.T
        networks = ProtoNetworks(
            predictor=init_perceptron(predictor_key, (self._observation_dim, NUM_FEATURES)),
            projector=init_perceptron(projector_key, (NUM_FEATURES, PROJECTOR_DIM, NUM_FEATURES)),
            prototypes=unit_vectors(prototypes),
        )
        queue = jnp.zeros((QUEUE_SIZE, NUM_FEATURES))
        optimizer = self._optimizer.init(networks)
        return ProtoState(networks, networks.predictor, optimizer, queue, jnp.asarray(0, jnp.int32))

    def draw_skills(self, state: ProtoState, key: jax.Array, num_skills: int) -> Float[jax.Array, "N Z"]:
        """Returns skills without entries."""
        del state, key
        return jnp.zeros((num_skills, 0))

    def update(
        self, state: ProtoState, batch: Transition, key: jax.Array
    ) -> tuple[ProtoState, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one step of the networks, rewards by the stepped ones, and metrics.

        `key` draws the candidates.
        """
        next_features = unit_vectors(apply_perceptron(state.target, batch.next_observation))
        assigned = sinkhorn(next_features @ state.networks.prototypes.T / TEMPERATURE)

        def loss_of(networks: ProtoNetworks) -> jax.Array:
            projected = apply_perceptron(
                networks.projector, apply_perceptron(networks.predictor, batch.observation)
            )
            scores = unit_vectors(projected) @ networks.prototypes.T / TEMPERATURE
            return -(assigned * jax.nn.log_softmax(scores)).sum(axis=-1).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.networks)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer)
        networks = optax.apply_updates(state.networks, updates)
        networks = networks._replace(prototypes=unit_vectors(networks.prototypes))

        features = networks.features(batch.next_observation)
        candidates = features[jax.random.categorical(key, networks.prototypes @ features.T)]
        place = state.num_updates * NUM_PROTOTYPES % QUEUE_SIZE
        queue = jax.lax.dynamic_update_slice_in_dim(state.queue, candidates, place, axis=0)
        reward = nearest_distances(features, queue, NEIGHBOUR)[:, -1]

        target = optax.incremental_update(networks.predictor, state.target, TARGET_RATE)
        # Only its remainder counts; kept small so that it never overflows.
        num_updates = (state.num_updates + 1) % (QUEUE_SIZE // NUM_PROTOTYPES)
        return ProtoState(networks, target, optimizer, queue, num_updates), reward, {"explorer_loss": loss}
