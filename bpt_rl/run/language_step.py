"""The training step of a language model, for measurements and one tiny example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jaxtyping import Float, Int

from bpt_rl.agents.base import Params
from bpt_rl.config import ModelConfig
from bpt_rl.nn.language_model import LanguageModel


class LanguageState(NamedTuple):
    """All that a gradient step reads and changes."""

    params: Params
    optimizer_state: Any


class LanguageFunctions(NamedTuple):
    """A language model as pure functions of its parameters."""

    init: Callable[[jax.Array], Params]
    """Draws parameters."""
    loss: Callable[..., Float[jax.Array, ""]]
    """Of parameters and texts [B, S + 1]: the mean over the last S tokens, in nats."""


def language_functions(config: ModelConfig, vocabulary_size: int) -> LanguageFunctions:
    """Returns the functions of a model of `vocabulary_size` entries."""

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(config, vocabulary_size, nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def loss(params: Params, text: Int[jax.Array, "B _"]) -> Float[jax.Array, ""]:
        mean: jax.Array = nnx.merge(graph, params).losses(text[:, :-1], text[:, 1:]).mean()
        return mean

    return LanguageFunctions(lambda key: nnx.to_pure_dict(nnx.state(make(key))), loss)


def init_language_state(
    model: LanguageFunctions, optimizer: optax.GradientTransformation, seed: int
) -> LanguageState:
    """Returns the state before the first step."""
    params = model.init(jax.random.key(seed))
    return LanguageState(params, optimizer.init(params))


def language_step(
    model: LanguageFunctions,
    optimizer: optax.GradientTransformation,
    state: LanguageState,
    text: Int[jax.Array, "B _"],
) -> tuple[LanguageState, dict[str, jax.Array]]:
    """Returns the state after one gradient step and its metrics; dropout is off."""
    loss, gradient = jax.value_and_grad(model.loss)(state.params, text)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    return LanguageState(optax.apply_updates(state.params, updates), optimizer_state), {"loss": loss}
