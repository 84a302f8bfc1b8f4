"""Steps of trajectories as tokens, through the transformer, to actions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from bpt_rl.config import ModelConfig
from bpt_rl.nn.cached_attention import Stripes
from bpt_rl.nn.context_parallel import ContextAxis
from bpt_rl.nn.device_mesh import Sharing
from bpt_rl.nn.feedforward import blockwise_map
from bpt_rl.nn.transformer import KeyValueCache, Transformer, drop, make_norm
from bpt_rl.types import LAYOUTS, WITHOUT_RETURN, PackedBatch

TOKENS: Mapping[str, tuple[str, ...]] = {
    "return_state_action_reward": ("return", "state", "action", "outcome"),
    "return_state_action": ("return", "state", "action"),
    "state_action_reward": ("state", "action", "outcome"),
}
"""What the tokens of a step carry, in order, in each layout of several."""


class ActionDistribution(NamedTuple):
    """What the model says of an action."""

    mean: Float[jax.Array, "*batch A"]
    """In (-1, 1)."""
    log_std: Float[jax.Array, "*batch A"]
    """Of a Gaussian around the mean; meaningless to a deterministic head."""

    def chosen(self, key: jax.Array | None) -> Float[jax.Array, "*batch A"]:
        """Returns actions in [-1, 1], drawn with the key; their mean without one."""
        if key is None:
            return self.mean
        noise = jax.random.normal(key, self.mean.shape)
        return jnp.clip(self.mean + jnp.exp(self.log_std) * noise, -1, 1)


class Outcomes(NamedTuple):
    """What followed a step."""

    action: Float[Any, "B T A"]
    reward: Float[Any, "B T"]
    completion: Float[Any, "B T"]


class Step(NamedTuple):
    """What one decoding step feeds in, in the model's units: the last step's outcome and this step's state."""

    previous_action: Float[Any, "B A"]
    previous_reward: Float[Any, "B"]
    previous_completion: Float[Any, "B"]
    previous_step: Int[Any, "B"]
    previous_episode: Int[Any, "B"]
    return_to_go: Float[Any, "B"]
    observation: Float[Any, "B O"]
    step: Int[Any, "B"]
    episode: Int[Any, "B"]


class TrajectoryModel(nnx.Module):
    """Predicts action_t from everything up to observation_t, and never from action_t.

    Tokens of a step, in order; the action is read from the last token before it:
      return_state_action_reward: return-to-go, observation, action, (reward, completion)
      return_state_action:        return-to-go, observation, action
      state_action_reward:        observation, action, reward
      fused: one token of return-to-go, observation and the previous step's action, reward and completion
      fused_without_return: one token of observation and the previous step's action and reward

    Source: Chen et al. 2021, section 3; Liu and Abbeel 2023, section 3; Laskin et al. 2022, section 3. The fused
    layouts are this project's.
    """

    def __init__(
        self, config: ModelConfig, observation_dim: int, action_dim: int, episode_steps: int, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.action_dim = action_dim
        self.episode_steps = episode_steps
        width = config.embed_dim

        def linear(inputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, width, param_dtype=jnp.float32, rngs=rngs)

        has_return = config.layout not in WITHOUT_RETURN
        if has_return:
            self.embed_return = linear(1)
        self.embed_observation = linear(observation_dim)
        self.embed_action = linear(action_dim)
        if config.layout != "return_state_action":
            self.embed_reward = linear(2 if has_return else 1)
        embedding = nnx.initializers.normal(0.02)
        self.embed_step = nnx.Embed(episode_steps, width, embedding_init=embedding, rngs=rngs)
        if config.episode_embedding:
            self.embed_episode = nnx.Embed(
                config.episode_embedding, width, embedding_init=embedding, rngs=rngs
            )
        self.embed_norm = make_norm(config, rngs)
        self.transformer = Transformer(config, rngs)
        outputs = 2 * action_dim if config.action_distribution == "gaussian" else action_dim
        self.head = nnx.Linear(width, outputs, param_dtype=jnp.float32, rngs=rngs)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return LAYOUTS[self.config.layout]

    @property
    def _num_known(self) -> int:
        """Tokens of a step up to the one that its action is read from."""
        return 1 if self._is_fused else TOKENS[self.config.layout].index("state") + 1

    @property
    def _is_fused(self) -> bool:
        return self.tokens_per_step == 1

    @property
    def num_dummy(self) -> int:
        """Tokens of the step before the first one, which decoding writes and nothing sees."""
        return self.tokens_per_step - self._num_known

    def check_steps(self, step: Int[np.ndarray, "B"]) -> None:
        """Refuses steps that no training episode had: they have no embedding.

        Raises:
          ValueError: If there is one.
        """
        if step.max() >= self.episode_steps:
            raise ValueError(
                "An episode must not outlast those of the training data, whose steps alone are embedded; they have "
                f"up to {self.episode_steps} steps; got step {step.max() + 1}. Use an environment of that length."
            )

    def _place(self, step: Int[Any, "..."], episode: Int[Any, "..."]) -> Float[jax.Array, "... D"]:
        place = self.embed_step(step)
        if self.config.episode_embedding:
            place = place + self.embed_episode(jnp.minimum(episode, self.config.episode_embedding - 1))
        return place

    def _positions(self, step: Int[Any, "B T"]) -> Int[jax.Array, "B S"] | None:
        """Returns the rotary positions of the tokens of these steps; None where they follow the context."""
        if self.config.positions != "episode":
            return None
        per_step = self.tokens_per_step
        return (jnp.asarray(step)[..., None] * per_step + jnp.arange(per_step)).reshape(len(step), -1)

    def _parts(
        self,
        return_to_go: Float[Any, "..."],
        observation: Float[Any, "... O"],
        action: Float[Any, "... A"],
        reward: Float[Any, "..."],
        completion: Float[Any, "..."],
    ) -> dict[str, Float[jax.Array, "... D"]]:
        """Returns the embedding of each kind of thing that the layout has tokens for."""
        has_return, parts = self.config.layout not in WITHOUT_RETURN, {}
        if has_return:
            parts["return"] = self.embed_return(return_to_go[..., None])
        parts["state"] = self.embed_observation(observation)
        parts["action"] = self.embed_action(action)
        if self.config.layout != "return_state_action":
            outcome = [reward, completion] if has_return else [reward]
            parts["outcome"] = self.embed_reward(jnp.stack(outcome, axis=-1))
        return parts

    def _read(self, x: Float[jax.Array, "B T D"]) -> ActionDistribution:
        output = self.head(x.astype(jnp.float32))
        mean = jnp.tanh(output[..., : self.action_dim])
        log_std = output[..., self.action_dim :]
        return ActionDistribution(mean, jnp.clip(log_std, -5, 1) if log_std.size else jnp.zeros_like(mean))

    def embed(
        self, batch: PackedBatch, dropout_key: jax.Array | None = None, previous: Outcomes | None = None
    ) -> Float[jax.Array, "B S D"]:
        """Returns the token embeddings of a normalised batch, the tokens of a step side by side.

        They are made chunk by chunk in float32, and leave in the compute type. A fused layout takes `previous` for
        what came before each step, where the batch does not hold the step before.
        """
        action, reward, completion = (batch.action, batch.reward, batch.completion)
        if self._is_fused:
            action, reward, completion = previous or previous_outcomes(batch)
        inputs = (
            batch.return_to_go,
            batch.observation,
            action,
            reward,
            completion,
            batch.step,
            batch.episode,
        )
        chunk_steps = max(1, self.config.feedforward_chunk_size // self.tokens_per_step)
        tokens: jax.Array = blockwise_map(
            self._tokens, [jnp.asarray(x) for x in inputs], chunk_steps, key=dropout_key
        )
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])

    def _tokens(
        self,
        return_to_go: Float[jax.Array, "B T"],
        observation: Float[jax.Array, "B T O"],
        action: Float[jax.Array, "B T A"],
        reward: Float[jax.Array, "B T"],
        completion: Float[jax.Array, "B T"],
        step: Int[jax.Array, "B T"],
        episode: Int[jax.Array, "B T"],
        dropout_key: jax.Array | None,
    ) -> Float[jax.Array, "B T N D"]:
        """Returns the N tokens of each step; in the fused layout action, reward and completion are the last step's."""
        place = self._place(step, episode)
        parts = self._parts(return_to_go, observation, action, reward, completion)
        if self._is_fused:
            tokens = [sum(parts.values()) + place]
        else:
            tokens = [parts[kind] + place for kind in TOKENS[self.config.layout]]
        normed = self.embed_norm(jnp.stack(tokens, axis=2))
        return drop(normed, self.config.dropout, dropout_key).astype(self.config.compute_dtype)

    def __call__(
        self,
        batch: PackedBatch,
        dropout_key: jax.Array | None = None,
        *,
        previous: Outcomes | None = None,
        sharing: Sharing | None = None,
    ) -> ActionDistribution:
        """Returns the predicted action of every step of a normalised batch, [B, T, A].

        Args:
          batch: Or this device's share of its rows and steps.
          dropout_key: Draws dropout; none without it.
          previous: As for `embed`.
          sharing: With the devices that have the others.
        """
        tokens_per_step = self.tokens_per_step
        keys = (None, None) if dropout_key is None else tuple(jax.random.split(dropout_key))
        ids = batch.segment_ids
        action: ActionDistribution = self.transformer(
            self.embed(batch, keys[0], previous),
            None if ids is None else jnp.repeat(ids, tokens_per_step, axis=1),
            keys[1],
            positions=self._positions(batch.step),
            read=self._read,
            tokens=slice(self._num_known - 1, None, tokens_per_step),
            sharing=sharing,
        )
        return action

    def init_cache(
        self, num_rows: int, num_steps: int, sharding: jax.sharding.Sharding | None = None
    ) -> KeyValueCache:
        """Returns an empty cache for contexts of `num_steps` steps; `sharding` as for `Transformer.init_cache`."""
        return self.transformer.init_cache(num_rows, num_steps * self.tokens_per_step, sharding)

    def decode(
        self, inputs: Step, cache: KeyValueCache, stripes: Stripes | None = None
    ) -> tuple[ActionDistribution, KeyValueCache]:
        """Returns the action of the next step, [B, A], and the cache that holds its tokens.

        One forward pass of one step's tokens: those the last step's outcome completes, then this step's state.

        Args:
          inputs: Of the step.
          cache: Of the steps before it; donate it.
          stripes: How devices share the cache, of which this one has a part; all have the inputs.
        """
        place = self._place(inputs.step, inputs.episode)
        before = self._place(inputs.previous_step, inputs.previous_episode)
        parts = self._parts(
            inputs.return_to_go,
            inputs.observation,
            inputs.previous_action,
            inputs.previous_reward,
            inputs.previous_completion,
        )
        if self._is_fused:
            tokens = [sum(parts.values()) + place]
        else:
            kinds, known = TOKENS[self.config.layout], self._num_known
            tokens = [parts[kind] + before for kind in kinds[known:]]
            tokens += [parts[kind] + place for kind in kinds[:known]]
        positions = self._positions(jnp.stack([inputs.previous_step, inputs.step], axis=1))
        if positions is not None:
            # The last tokens of the step before, the first of this one.
            positions = positions[:, self._num_known : self._num_known + self.tokens_per_step]
        normed = self.embed_norm(jnp.stack(tokens, axis=1))
        x, cache = self.transformer.decode(
            normed, cache, self.num_dummy, positions=positions, stripes=stripes
        )
        distribution = self._read(x[:, -1:])
        return ActionDistribution(distribution.mean[:, 0], distribution.log_std[:, 0]), cache

    def prefill(
        self,
        batch: PackedBatch,
        cache: KeyValueCache,
        rows: Int[Any, "contexts"],
        num_steps: Int[Any, "contexts"],
        *,
        previous: Outcomes | None = None,
        shares: tuple[ContextAxis, Stripes] | None = None,
    ) -> KeyValueCache:
        """Returns the cache as decoding the first `num_steps` steps of each row of a normalised batch leaves it.

        The last step's tokens that only its outcome completes are not among them: the next step brings these.

        Args:
          batch: Contexts, one a row, padding behind each.
          cache: To be filled; donate it.
          rows: Which rows of the cache the contexts go to, ascending.
          num_steps: Steps of each context.
          previous: As for `embed`.
          shares: How devices share the contexts' steps, of which `batch` is a part, and how the cache.
        """
        return self.transformer.prefill(
            self.embed(batch, previous=previous),
            cache,
            rows,
            jnp.asarray(num_steps) * self.tokens_per_step,
            self.num_dummy,
            positions=self._positions(batch.step),
            shares=shares,
        )


def previous_outcomes(batch: PackedBatch) -> Outcomes:
    """Returns what followed the step before each step of its segment; zeros before the first."""
    ids = jnp.ones(batch.step.shape, jnp.int32) if batch.segment_ids is None else batch.segment_ids
    is_inside = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)))

    def shift(x: Float[Any, "B T ..."]) -> jax.Array:
        shifted = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
        return jnp.where(is_inside.reshape(is_inside.shape + (1,) * (x.ndim - 2)), shifted, 0)

    return Outcomes(shift(batch.action), shift(batch.reward), shift(batch.completion))


def action_loss(
    predicted: ActionDistribution,
    action: Float[Any, "B T A"],
    loss_mask: Float[Any, "B T"],
    distribution: str,
) -> Float[jax.Array, ""]:
    """Returns the loss averaged over action dimensions and over the steps that count.

    Mean squared error for `deterministic`; negative log-likelihood, up to its constant, for `gaussian`.
    """
    total, count = action_loss_sums(predicted, action, loss_mask, distribution)
    return total / jnp.maximum(count, 1)


def action_loss_sums(
    predicted: ActionDistribution,
    action: Float[Any, "B T A"],
    loss_mask: Float[Any, "B T"],
    distribution: str,
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """Returns the sum of the loss over the steps that count, and their number; see `action_loss`."""
    squared = jnp.square(predicted.mean - action)
    if distribution == "gaussian":
        squared = 0.5 * squared * jnp.exp(-2 * predicted.log_std) + predicted.log_std
    per_step = squared.mean(axis=-1)
    return jnp.sum(per_step * loss_mask), jnp.sum(loss_mask)
