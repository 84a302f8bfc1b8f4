"""Active pre-training on the features of inverse and forward dynamics: particle entropy of states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.particle_entropy import particle_entropy
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron
from bpt_rl.nn.running_moments import RunningMoments
from bpt_rl.nn.vectors import lengths
from bpt_rl.types import Transition

NUM_FEATURES = 512


class FeatureNetworks(NamedTuple):
    """Trunk and the two models that train it; a pytree."""

    trunk: Perceptron
    """Observation to features, before their layer normalisation."""
    scale: Float[jax.Array, "F"]
    offset: Float[jax.Array, "F"]
    forward: Perceptron
    """Features and action to the next features."""
    backward: Perceptron
    """Features and next features to the action, before tanh."""

    def features(self, observation: Float[jax.Array, "B O"]) -> Float[jax.Array, "B F"]:
        """Returns features in (-1, 1)."""
        x = apply_perceptron(self.trunk, observation)
        x = (x - x.mean(axis=-1, keepdims=True)) / jnp.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return jnp.tanh(self.scale * x + self.offset)


class IcmAptState(NamedTuple):
    """What APT learns; a pytree."""

    networks: FeatureNetworks
    optimizer: Any
    distance_moments: RunningMoments


class IcmApt:
    """Rewards observations that lie far from the batch's others.

    reward = log(1 + mean distance of f(s) to its 12 nearest neighbours in the batch), over 512 features f.

    Source: Liu and Abbeel 2021 (Behavior From the Void); features after Pathak et al. 2017, section 2, as
    in URLB's `icm_apt`, with its settings: lengths of errors, not their squares, are minimised, gradients pass through
    the features that are to be predicted as well, and the reward is that of the transition's first observation.
    """

    skill_dim = 0
    skill_steps = 0
    has_successor_features = False

    def __init__(self, config: ExplorationConfig, observation_dim: int, action_dim: int) -> None:
        self._dims = (observation_dim, action_dim, config.hidden_dim)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> IcmAptState:
        """Returns the state before the first update."""
        observation_dim, action_dim, hidden_dim = self._dims
        trunk_key, forward_key, backward_key = jax.random.split(key, 3)
        networks = FeatureNetworks(
            trunk=init_perceptron(trunk_key, (observation_dim, NUM_FEATURES)),
            scale=jnp.ones(NUM_FEATURES),
            offset=jnp.zeros(NUM_FEATURES),
            forward=init_perceptron(forward_key, (NUM_FEATURES + action_dim, hidden_dim, NUM_FEATURES)),
            backward=init_perceptron(backward_key, (2 * NUM_FEATURES, hidden_dim, action_dim)),
        )
        return IcmAptState(networks, self._optimizer.init(networks), RunningMoments.create())

    def draw_skills(self, state: IcmAptState, key: jax.Array, num_skills: int) -> Float[jax.Array, "N Z"]:
        """Returns skills without entries."""
        del state, key
        return jnp.zeros((num_skills, 0))

    def update(
        self, state: IcmAptState, batch: Transition, key: jax.Array
    ) -> tuple[IcmAptState, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one step of the networks, rewards by the stepped trunk, and metrics."""
        del key

        def loss_of(networks: FeatureNetworks) -> jax.Array:
            now, after = networks.features(batch.observation), networks.features(batch.next_observation)
            forward = apply_perceptron(networks.forward, jnp.concatenate([now, batch.action], axis=-1))
            backward = jnp.tanh(apply_perceptron(networks.backward, jnp.concatenate([now, after], axis=-1)))
            return lengths(after - forward).mean() + lengths(batch.action - backward).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.networks)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer)
        networks = optax.apply_updates(state.networks, updates)
        reward, moments = particle_entropy(networks.features(batch.observation), state.distance_moments)
        return IcmAptState(networks, optimizer, moments), reward, {"explorer_loss": loss}
