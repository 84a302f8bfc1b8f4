"""What the data's behaviour is to expect from a state and a time on: least squares on returns-to-go."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from bpt_rl.expected_return_config import ExpectedReturnConfig
from bpt_rl.nn.perceptron import Perceptron, apply_perceptron, init_perceptron

NUM_CHECKS = 10
"""Places at which the error on held-out steps is measured."""


class Steps(NamedTuple):
    """Steps of episodes; a pytree."""

    observation: Float[Any, "B O"]
    """Normalised."""
    time: Float[Any, "B"]
    """Step within the episode over the steps of the longest one, in [0, 1)."""
    return_to_go: Float[Any, "B"]
    """Reward from this step to the episode's end."""


class Fit(NamedTuple):
    """A fitted value function; a pytree."""

    layers: Perceptron
    centre: Float[Any, ""]
    scale: Float[Any, ""]
    held_out_error: Float[Any, ""]
    """Mean squared error on held-out steps over their variance: 0 is perfect, 1 is no better than the mean."""

    def __call__(
        self, observation: Float[Any, "*batch O"], time: Float[Any, "*batch"]
    ) -> Float[jax.Array, "*batch"]:
        """Returns the return that is to be expected from these states and times on."""
        value: jax.Array = self.centre + self.scale * _apply(self.layers, observation, time)
        return value


def _apply(
    layers: Perceptron, observation: Float[Any, "*batch O"], time: Float[Any, "*batch"]
) -> Float[jax.Array, "*batch"]:
    value: jax.Array = apply_perceptron(layers, jnp.concatenate([observation, time[..., None]], axis=-1))
    return value[..., 0]


def fit_value(config: ExpectedReturnConfig, fitted: Steps, held_out: Steps) -> Fit:
    """Returns the value function of the smallest error on the held-out steps.

    Raises:
      FloatingPointError: If the error is not finite at any place where it is measured.
    """
    centre = fitted.return_to_go.mean()
    scale = jnp.maximum(fitted.return_to_go.std(), 1e-6)
    sizes = (fitted.observation.shape[1] + 1, config.hidden_dim, config.hidden_dim, 1)
    key, init_key = jax.random.split(jax.random.key(config.seed))
    num_updates = -(-config.num_updates // NUM_CHECKS)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_updates * NUM_CHECKS))
    layers = init_perceptron(init_key, sizes)
    state = (layers, optimizer.init(layers))
    advance = functools.partial(_advance, optimizer, config.batch_size, num_updates)
    best: Fit | None = None
    for check in range(NUM_CHECKS):
        state = advance(state, fitted, centre, scale, jax.random.fold_in(key, check))
        error = _error(state[0], held_out, centre, scale)
        if np.isfinite(error) and (best is None or error < best.held_out_error):
            best = Fit(state[0], centre, scale, error)
    if best is None:
        raise FloatingPointError(
            "The error of a value function must be finite; it was not after any part of the fit. Lower "
            "expected_return.learning_rate or check the data with `bpt-rl data verify`."
        )
    return best


_State = tuple[Perceptron, optax.OptState]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(
    optimizer: optax.GradientTransformation,
    batch_size: int,
    num_updates: int,
    state: _State,
    steps: Steps,
    centre: jax.Array,
    scale: jax.Array,
    key: jax.Array,
) -> _State:
    def loss(layers: Perceptron, batch: Steps) -> jax.Array:
        wanted = (batch.return_to_go - centre) / scale
        return jnp.square(_apply(layers, batch.observation, batch.time) - wanted).mean()

    def update(state: _State, key: jax.Array) -> tuple[_State, None]:
        layers, moments = state
        drawn = jax.random.randint(key, (batch_size,), 0, len(steps.time))
        gradient = jax.grad(loss)(layers, Steps(*(values[drawn] for values in steps)))
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(layers, updates), moments), None

    advanced: _State = jax.lax.scan(update, state, jax.random.split(key, num_updates))[0]
    return advanced


@jax.jit
def _error(layers: Perceptron, steps: Steps, centre: jax.Array, scale: jax.Array) -> jax.Array:
    missed = centre + scale * _apply(layers, steps.observation, steps.time) - steps.return_to_go
    return jnp.square(missed).mean() / jnp.maximum(steps.return_to_go.var(), 1e-12)
