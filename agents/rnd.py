"""Random network distillation: what a network cannot yet predict of another's outputs is new."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron
from bpt_rl.nn.running_moments import RunningMoments
from bpt_rl.types import Transition

NUM_OUTPUTS = 512
OBSERVATION_CLIP = 5.0
"""In standard deviations."""


class RndState(NamedTuple):
    """What random network distillation learns; a pytree."""

    predictor: Perceptron
    target: Perceptron
    """Drawn once, never trained."""
    optimizer: Any
    observation_moments: RunningMoments
    error_moments: RunningMoments


class Rnd:
    """Rewards observations whose random features are badly predicted.

    reward = e(s) / std(e), where e(s) is the mean squared difference of the predictor's and a frozen random network's
    outputs for the normalised observation, and std(e) the standard deviation of all errors so far.

    Source: Burda et al. 2019 (Exploration by Random Network Distillation), section 2; URLB's settings. As in URLB the
    predictor learns from replayed observations, the reward is that of the transition's first observation, and errors
    are divided by their own deviation, where the paper takes the next observation and the deviation of returns.
    Observations are normalised by running moments, as in the paper; URLB's code has a batch normalisation that never
    leaves training mode and so takes each batch's own moments.
    """

    skill_dim = 0
    skill_steps = 0
    has_successor_features = False

    def __init__(self, config: ExplorationConfig, observation_dim: int, action_dim: int) -> None:
        del action_dim
        self._sizes = (observation_dim, config.hidden_dim, config.hidden_dim, NUM_OUTPUTS)
        self._optimizer = optax.adam(config.learning_rate)

    def init(self, key: jax.Array) -> RndState:
        """Returns the state before the first update."""
        predictor, target = (init_perceptron(k, self._sizes) for k in jax.random.split(key))
        moments = RunningMoments.create((self._sizes[0],))
        return RndState(predictor, target, self._optimizer.init(predictor), moments, RunningMoments.create())

    def draw_skills(self, state: RndState, key: jax.Array, num_skills: int) -> Float[jax.Array, "N Z"]:
        """Returns skills without entries."""
        del state, key
        return jnp.zeros((num_skills, 0))

    def update(
        self, state: RndState, batch: Transition, key: jax.Array
    ) -> tuple[RndState, Float[jax.Array, "B"], dict[str, Float[jax.Array, ""]]]:
        """Returns the state after one step of the predictor, rewards by the stepped predictor, and metrics."""
        del key
        seen = state.observation_moments.update(batch.observation)
        # 1e-5 is batch normalisation's; an entry that never moves stays at 0 instead of dividing by 0.
        normalized = (batch.observation - seen.mean) / jnp.sqrt(seen.variance + 1e-5)
        x = jnp.clip(normalized, -OBSERVATION_CLIP, OBSERVATION_CLIP)
        wanted = apply_perceptron(state.target, x)

        def errors(predictor: Perceptron) -> jax.Array:
            return jnp.square(apply_perceptron(predictor, x) - wanted).mean(axis=-1)

        loss, gradient = jax.value_and_grad(lambda predictor: errors(predictor).mean())(state.predictor)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer)
        predictor = optax.apply_updates(state.predictor, updates)
        error = errors(predictor)
        error_moments = state.error_moments.update(error)
        reward = error / (jnp.sqrt(error_moments.variance) + 1e-8)
        state = RndState(predictor, state.target, optimizer, seen, error_moments)
        return state, reward, {"explorer_loss": loss}
