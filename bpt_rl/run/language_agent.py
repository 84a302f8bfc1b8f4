"""A language model in the place of an agent, so that the step of training runs it: for measurements and one example."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from bpt_rl.agents.base import Params, Policy
from bpt_rl.config import FullContext, ModelConfig
from bpt_rl.nn.language_model import LanguageModel
from bpt_rl.types import PackedBatch

_NOTHING: Any = None


class LanguageAgent:
    """Loss of a language model; it acts in no environment."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        """Takes the backbone and the number of entries that a token can be."""
        self._config = config
        self._vocabulary_size = vocabulary_size
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: self._make(jax.random.key(0))))

    def _make(self, key: jax.Array) -> LanguageModel:
        return LanguageModel(self._config, self._vocabulary_size, nnx.Rngs(key))

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def loss(
        self, params: Params, batch: PackedBatch, key: jax.Array | None
    ) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
        """Returns the mean loss of all but the first token of a `text_batch`, in nats; no dropout without a key."""
        text = jnp.asarray(batch.step)
        model = nnx.merge(self._graph, params)
        loss = model.losses(text[:, :-1], text[:, 1:], key).mean()
        return loss, {"loss": loss}

    def policy(
        self,
        params: Params,
        *,
        num_episodes: int = 1,
        clear_context: bool = False,
        full_context: FullContext = "refuse",
        sample_seed: int | None = None,
    ) -> Policy:
        """Refuses: there are no actions.

        Raises:
          NotImplementedError: Always.
        """
        raise NotImplementedError("A policy must be of an agent; got a language model. Train at, dt or bc.")


def text_batch(text: Int[np.ndarray, "*micro B _"]) -> PackedBatch:
    """Returns texts as a batch: `step` holds their tokens, and they weigh alike; the other fields hold nothing."""
    weight = np.ones(text.shape[:-1], np.float32)
    fields = dict.fromkeys(PackedBatch._fields, _NOTHING)
    return PackedBatch(**fields | {"step": text, "loss_mask": weight})
