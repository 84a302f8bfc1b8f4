"""The same backbone as a language model, at the sizes that long-context papers measure with.

It is there for measurements and one tiny example; nothing generates text.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bpt_rl.config import ModelConfig
from bpt_rl.nn.transformer import Transformer
from bpt_rl.nn.vocabulary_loss import vocabulary_losses

GPT_VOCABULARY_SIZE = 50_257
"""Entries of GPT-2's and GPT-3's vocabulary."""


def _gpt(num_layers: int, num_heads: int, embed_dim: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        num_heads=num_heads,
        embed_dim=embed_dim,
        activation="gelu",
        dropout=0.0,
        activations="recompute",
        feedforward_chunk_size=4096,
        compute_dtype="bfloat16",
    )


GPT_SHAPES: Mapping[str, ModelConfig] = {
    "1.3B": _gpt(num_layers=24, num_heads=16, embed_dim=2048),
    "2.7B": _gpt(num_layers=32, num_heads=20, embed_dim=2560),
    "6.7B": _gpt(num_layers=32, num_heads=32, embed_dim=4096),
}
"""GPT-3's depths and widths with heads of 128, the widest that cuDNN attends with.

What AdamW in float32 takes with `GPT_VOCABULARY_SIZE`, before any activation, in 10^9 bytes:

          parameters   with both moments   with the gradient
    1.3B         5.2                15.7                21.0
    2.7B        10.6                31.8                42.3
    6.7B        26.6                79.8               106.4

The first two so leave an 80 GB card 59 and 37 GB for a context. The third fits no card of that size unless its
optimizer's state lies in the host's memory or is split among devices.

Source: Brown et al. 2020, table 2.1, whose 1.3B and 2.7B have heads of another size.
"""


class LanguageModel(nnx.Module):
    """Predicts each token from those before it; one matrix embeds tokens and reads out logits.

    Source: Radford et al. 2019 (the shared matrix); positions, norms and blocks are those of `Transformer`.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int, rngs: nnx.Rngs) -> None:
        self.config = config
        initial = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(vocabulary_size, config.embed_dim, embedding_init=initial, rngs=rngs)
        self.transformer = Transformer(config, rngs)

    def __call__(
        self, tokens: Int[Array, "B S"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "B S D"]:
        """Returns the normed stream whose product with the embedding is the logits; no dropout without a key."""
        # Looked up in float32 and cast then, not before: the gradient of a frequent token is a long sum.
        x = self.embed(tokens).astype(self.config.compute_dtype)
        dtype = jnp.dtype(self.config.compute_dtype)
        stream: Array = self.transformer(x, None, dropout_key, read=lambda normed: normed.astype(dtype))
        return stream

    def losses(
        self,
        tokens: Int[Array, "B S"],
        targets: Int[Array, "B S"],
        dropout_key: jax.Array | None = None,
        *,
        vocabulary_chunk_size: int = 8192,
    ) -> Float[Array, "B S"]:
        """Returns the negative log-likelihood of each target in nats, float32.

        Args:
          tokens: Each row one text; a token sees itself and those before it.
          targets: The token after each of `tokens`.
          dropout_key: Draws dropout; none without it.
          vocabulary_chunk_size: Most vocabulary entries whose logits exist at a time, for `feedforward_chunk_size`
            tokens.
        """
        return vocabulary_losses(
            self(tokens, dropout_key),
            jnp.asarray(self.embed.embedding),
            targets,
            token_chunk_size=self.config.feedforward_chunk_size,
            vocabulary_chunk_size=vocabulary_chunk_size,
        )
