"""The networks that deterministic and TD agents share, as plain pytrees, and the arithmetic of their updates.

One network: linear, layer norm, tanh; linear, ReLU; linear. An actor is one over observations; a critic is two over
observation and action, with no parameter in common.

Source: ExoRL's agents (Yarats et al. 2022) and URLB's (Laskin et al. 2021).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

Params = Any
"""Nested dicts of float32 arrays."""
INSIDE = 1e-6
"""Actions keep this distance from -1 and 1."""
_orthogonal = jax.nn.initializers.orthogonal()


class Trained(NamedTuple):
    """Parameters, and what the optimizer remembers of their gradients; a pytree."""

    params: Params
    moments: optax.OptState

    @classmethod
    def create(cls, optimizer: optax.GradientTransformation, params: Params) -> "Trained":
        """Returns parameters that have seen no gradient yet."""
        return cls(params, optimizer.init(params))


def descend(
    optimizer: optax.GradientTransformation,
    trained: Trained,
    loss: Callable[[Params], Float[jax.Array, ""]],
) -> tuple[Trained, Float[jax.Array, ""]]:
    """Returns the parameters after one step along the gradient of a loss, and the loss before it.

    What the loss closes over is a constant: only its argument is differentiated.
    """
    value, gradient = jax.value_and_grad(loss)(trained.params)
    updates, moments = optimizer.update(gradient, trained.moments)
    return Trained(optax.apply_updates(trained.params, updates), moments), value


def init_linear(key: jax.Array, num_inputs: int, num_outputs: int) -> Params:
    """Returns an orthogonal kernel and a bias of 0."""
    return {"kernel": _orthogonal(key, (num_inputs, num_outputs)), "bias": jnp.zeros(num_outputs)}


def init_trunk(key: jax.Array, num_inputs: int, width: int) -> Params:
    """Returns a linear layer and the layer norm behind it."""
    return {**init_linear(key, num_inputs, width), "scale": jnp.ones(width), "shift": jnp.zeros(width)}


def init_network(keys: jax.Array, num_inputs: int, width: int, num_outputs: int) -> Params:
    """Returns the parameters of one network; there are three keys, one for each layer."""
    return {
        "trunk": init_trunk(keys[0], num_inputs, width),
        "hidden": init_linear(keys[1], width, width),
        "head": init_linear(keys[2], width, num_outputs),
    }


def init_critic(key: jax.Array, num_inputs: int, width: int) -> Params:
    """Returns two networks of one output each, stacked on a leading axis.

    Args:
      key: Draws both.
      num_inputs: Length of observation and action together.
      width: Of the hidden layers.
    """
    return jax.vmap(lambda keys: init_network(keys, num_inputs, width, 1))(jax.random.split(key, (2, 3)))


def apply_linear(layer: Params, x: Float[jax.Array, "*batch I"]) -> Float[jax.Array, "*batch J"]:
    """Returns the linear map of x."""
    y: jax.Array = x @ layer["kernel"] + layer["bias"]
    return y


def apply_trunk(trunk: Params, x: Float[jax.Array, "*batch I"]) -> Float[jax.Array, "*batch J"]:
    """Returns the tanh of the normalised linear map of x."""
    x = apply_linear(trunk, x)
    normalized = jax.nn.standardize(x, variance=x.var(axis=-1, keepdims=True), epsilon=1e-5)
    return jnp.tanh(normalized * trunk["scale"] + trunk["shift"])


def apply_network(network: Params, x: Float[jax.Array, "*batch I"]) -> Float[jax.Array, "*batch J"]:
    """Returns the outputs of one network, without an activation behind the last layer."""
    hidden = jax.nn.relu(apply_linear(network["hidden"], apply_trunk(network["trunk"], x)))
    return apply_linear(network["head"], hidden)


def mean_action(actor: Params, observation: Float[jax.Array, "*batch O"]) -> Float[jax.Array, "*batch A"]:
    """Returns the action without noise, in [-1, 1]."""
    return jnp.tanh(apply_network(actor, observation))


def critic_values(
    critic: Params, observation: Float[jax.Array, "*batch O"], action: Float[jax.Array, "*batch A"]
) -> Float[jax.Array, "2 *batch"]:
    """Returns what each of the two networks of `init_critic` says."""
    inputs = jnp.concatenate([observation, action], axis=-1)
    return jax.vmap(apply_network, in_axes=(0, None))(critic, inputs)[..., 0]


def inside(action: Float[jax.Array, "*batch A"]) -> Float[jax.Array, "*batch A"]:
    """Returns the nearest action within the bounds."""
    return jnp.clip(action, -1 + INSIDE, 1 - INSIDE)


def noisy_action(
    mean: Float[jax.Array, "*batch A"], key: jax.Array, *, noise: float, clip: float
) -> Float[jax.Array, "*batch A"]:
    """Returns the mean with Gaussian noise, within the bounds; gradients pass as if it were the mean.

    Args:
      mean: In [-1, 1].
      key: Draws the noise.
      noise: Its standard deviation.
      clip: Largest noise.

    Source: ExoRL and URLB, where an action beyond the bounds is brought back without a trace in the gradient.
    """
    drawn = noise * jax.random.normal(key, mean.shape)
    action = mean + jnp.clip(drawn, -clip, clip)
    return action + jax.lax.stop_gradient(inside(action) - action)


def two_errors(values: Float[jax.Array, "2 B"], target: Float[jax.Array, "B"]) -> Float[jax.Array, ""]:
    """Returns the mean squared error of each of two critics, added up."""
    return jnp.square(values - target).mean(axis=1).sum()
