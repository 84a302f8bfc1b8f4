"""State marginal matching: skills that together visit all states alike, and states by which they can be told apart."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron
from bpt_rl.types import Transition

NUM_SKILLS = 4
CODE_DIM = 128
AUTOENCODER_DIM = 150
AUTOENCODER_LEARNING_RATE = 1e-2
DISCRIMINATOR_LEARNING_RATE = 1e-3
BETA = 0.5
"""Weight of the autoencoder's divergence from the prior."""
LOG_VARIANCE_CLIP = 20.0
"""Without a bound, the exponential of an untrained network's output overflows on large observations."""


class Autoencoder(NamedTuple):
    """A variational autoencoder of observation and skill; a pytree."""

    encoder: Perceptron
    """To mean and log-variance of the code."""
    decoder: Perceptron


class SmmState(NamedTuple):
    """What state marginal matching learns; a pytree."""

    autoencoder: Autoencoder
    discriminator: Perceptron
    """Observation to a logit for each skill."""
    autoencoder_optimizer: Any
    discriminator_optimizer: Any


def _autoencoder_loss(network: Autoencoder, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the loss and each row's squared error, summed over its entries."""
    mean, log_variance = jnp.split(apply_perceptron(network.encoder, x), 2, axis=-1)
    log_variance = jnp.clip(log_variance, -LOG_VARIANCE_CLIP, LOG_VARIANCE_CLIP)
    code = mean + noise * jnp.exp(log_variance / 2)
    squared = jnp.square(apply_perceptron(network.decoder, code) - x)
    divergence = (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).sum(axis=-1) / 2
    return BETA * divergence.mean() + squared.mean(), squared.sum(axis=-1)


class Smm:
    """Rewards observations that the skill has rarely visited and by which it is recognised all the same.

    reward = |(s, z) - decoded(s, z)|^2 + log q(z | s) + log 4, for one of 4 skills z, drawn uniformly and followed for
    an episode. The squared error of a variational autoencoder stands for -log density of s under z, up to scale.

    Source: Lee et al. 2019 (Efficient Exploration via State Marginal Matching), for a uniform target;
    URLB's settings. The sign of log q(z | s) is the paper's: URLB's code adds the discriminator's cross-entropy, which
    pays for skills that cannot be told apart. As in URLB both networks' outputs before their step make the reward,
    and the autoencoder's error is a mean over entries in its loss, a sum in the reward.
    """

    skill_dim = NUM_SKILLS
    skill_steps = 0
    has_successor_features = False

    def __init__(self, config: ExplorationConfig, observation_dim: int, action_dim: int) -> None:
        del action_dim
        visible, hidden = observation_dim + NUM_SKILLS, AUTOENCODER_DIM
        self._encoder_sizes = (visible, hidden, hidden, 2 * CODE_DIM)
        self._decoder_sizes = (CODE_DIM, hidden, hidden, visible)
        self._discriminator_sizes = (observation_dim, config.hidden_dim, config.hidden_dim, NUM_SKILLS)
        self._autoencoder_optimizer = optax.adam(AUTOENCODER_LEARNING_RATE)
        self._discriminator_optimizer = optax.adam(DISCRIMINATOR_LEARNING_RATE)

    def init(self, key: jax.Array) -> SmmState:
        """Returns the state before the first update."""
        encoder_key, decoder_key, discriminator_key = jax.random.split(key, 3)
        autoencoder = Autoencoder(
            init_perceptron(encoder_key, self._encoder_sizes),
            init_perceptron(decoder_key, self._decoder_sizes),
        )
        discriminator = init_perceptron(discriminator_key, self._discriminator_sizes)
        return SmmState(
            autoencoder,
            discriminator,
            self._autoencoder_optimizer.init(autoencoder),
            self._discriminator_optimizer.init(discriminator),
        )

    def draw_skills(self, state: SmmState, key: jax.Array, num_skills: int) -> Float[jax.Array, "N Z"]:
        """Returns one-hot skills, drawn uniformly."""
        del state
        return jax.nn.one_hot(jax.random.randint(key, (num_skills,), 0, NUM_SKILLS), NUM_SKILLS)

    def update(
        self, state: SmmState, batch: Transition, key: jax.Array
    ) -> tuple[SmmState, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one step of both networks, rewards by those before it, and metrics.

        `key` draws the autoencoder's codes. The metrics hold both losses; `explorer_loss` is their sum.
        """
        x = jnp.concatenate([batch.observation, batch.skill], axis=-1)
        noise = jax.random.normal(key, (len(x), CODE_DIM))
        (density_loss, squared_error), gradient = jax.value_and_grad(_autoencoder_loss, has_aux=True)(
            state.autoencoder, x, noise
        )
        updates, autoencoder_optimizer = self._autoencoder_optimizer.update(
            gradient, state.autoencoder_optimizer
        )
        autoencoder = optax.apply_updates(state.autoencoder, updates)

        def skill_loss_of(discriminator: Perceptron) -> tuple[jax.Array, jax.Array]:
            logs = jax.nn.log_softmax(apply_perceptron(discriminator, batch.observation))
            recognised = (batch.skill * logs).sum(axis=-1)
            return -recognised.mean(), recognised

        (skill_loss, recognised), gradient = jax.value_and_grad(skill_loss_of, has_aux=True)(
            state.discriminator
        )
        updates, discriminator_optimizer = self._discriminator_optimizer.update(
            gradient, state.discriminator_optimizer
        )
        discriminator = optax.apply_updates(state.discriminator, updates)
        reward = squared_error + recognised + math.log(NUM_SKILLS)
        metrics = {
            "explorer_loss": density_loss + skill_loss,
            "density_loss": density_loss,
            "skill_loss": skill_loss,
        }
        state = SmmState(autoencoder, discriminator, autoencoder_optimizer, discriminator_optimizer)
        return state, reward, metrics
