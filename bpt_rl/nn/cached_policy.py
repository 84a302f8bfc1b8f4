"""A trajectory model acting in environments, one forward pass of one step's tokens a step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from bpt_rl.datasets.chains import completions
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import Step
from bpt_rl.nn.transformer import KeyValueCache
from bpt_rl.types import LAYOUTS


class CachedCarry(NamedTuple):
    """A chain so far, for B environments. `act` takes over the cache: use each carry once."""

    cache: KeyValueCache
    num_calls: int
    """Actions taken since the start; each draws its own noise."""
    num_steps: Int[np.ndarray, "B"]
    """Steps in the context."""
    is_cleared: Bool[np.ndarray, "B"]
    """Where the context is to be forgotten before the next action."""
    previous_action: Float[np.ndarray, "B A"]
    previous_reward: Float[np.ndarray, "B"]
    previous_completion: Float[np.ndarray, "B"]
    previous_step: Int[np.ndarray, "B"]
    previous_episode: Int[np.ndarray, "B"]
    step: Int[np.ndarray, "B"]
    episode: Int[np.ndarray, "B"]
    return_to_go: Float[np.ndarray, "B"]
    """Unscaled, as last given to `act`."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    graph: nnx.GraphDef[Any],
    params: Any,
    cache: KeyValueCache,
    is_cleared: jax.Array,
    inputs: Step,
    key: jax.Array | None,
) -> tuple[KeyValueCache, jax.Array]:
    model = nnx.merge(graph, params)
    cache = cache._replace(length=jnp.where(is_cleared, 0, cache.length))
    action, cache = model.decode(inputs, cache)
    if key is None:
        return cache, action.mean
    noise = jax.random.normal(key, action.mean.shape)
    return cache, jnp.clip(action.mean + jnp.exp(action.log_std) * noise, -1, 1)


@functools.partial(jax.jit, static_argnums=1)
def _longer(array: jax.Array, num_more: int) -> jax.Array:
    return jnp.pad(array, ((0, 0), (0, 0), (0, num_more), (0, 0)))


def _grow(cache: KeyValueCache, num_more: int) -> KeyValueCache:
    """Returns a cache with room for more tokens; the one given is gone, array by array: never two at once."""

    def moved(array: jax.Array) -> jax.Array:
        longer: jax.Array = jax.block_until_ready(_longer(array, num_more))
        array.delete()
        return longer

    return cache._replace(keys=tuple(map(moved, cache.keys)), values=tuple(map(moved, cache.values)))


class CachedPolicy:
    """Policy of a trajectory model; its actions are those of the full forward pass over the chain so far.

    Each step reads the whole cache, so the cache is not made as long as the chain: it starts small and doubles
    when the longest context fills it, up to the chain's length. A long chain so reads a third less, for one
    compilation a size; caches that always fit would save half, and compile at every step.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[Any],
        params: Any,
        normalizer: Normalizer,
        *,
        num_episodes: int,
        clear_context: bool,
        completion: str,
        sample_seed: int | None = None,
        first_capacity: int = 4096,
    ) -> None:
        """Binds parameters to a policy.

        Args:
          graph: Of a `TrajectoryModel`.
          params: Its parameters.
          normalizer: Of its training data.
          num_episodes: Episodes the context holds; one where it is cleared.
          clear_context: Forget everything at each episode's end.
          completion: `per_episode` or `per_step`, as in training.
          sample_seed: Draw actions from the Gaussian head; their mean if None.
          first_capacity: Tokens of the smallest cache, unless the whole context needs fewer.
        """
        self._key = None if sample_seed is None else jax.random.key(sample_seed)
        self._graph = graph
        self._params = params
        self._normalizer = normalizer
        self._clear_context = clear_context
        self._completion = completion
        self._model = nnx.merge(graph, params)
        self._tokens_per_step = LAYOUTS[self._model.config.layout]
        self._num_steps: int = (1 if clear_context else num_episodes) * self._model.episode_steps
        self._first_steps = -(-first_capacity // self._tokens_per_step)

    def _capacity(self, num_steps: int) -> int:
        """Returns the steps of the smallest cache that holds so many."""
        capacity = self._first_steps
        while capacity < num_steps:
            capacity *= 2
        return min(capacity, self._num_steps)

    def _with_room(self, cache: KeyValueCache, num_steps: int) -> KeyValueCache:
        num_more = self._capacity(num_steps) * self._tokens_per_step - cache.keys[0].shape[2]
        return _grow(cache, num_more) if num_more > 0 else cache

    def start(self, num_environments: int) -> CachedCarry:
        """Returns the carry of empty contexts."""
        zeros = np.zeros(num_environments, np.float32)
        indices = np.zeros(num_environments, np.int32)
        return CachedCarry(
            cache=self._model.init_cache(num_environments, self._capacity(1)),
            num_calls=0,
            num_steps=indices,
            is_cleared=np.zeros(num_environments, bool),
            previous_action=np.zeros((num_environments, self._model.action_dim), np.float32),
            previous_reward=zeros,
            previous_completion=zeros,
            previous_step=indices,
            previous_episode=indices,
            step=indices,
            episode=indices,
            return_to_go=np.zeros(num_environments),
        )

    def act(
        self, carry: CachedCarry, observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[CachedCarry, Float[np.ndarray, "B A"]]:
        """Returns the next carry and the action: mean or sample.

        Raises:
          ValueError: If a context is full, since nothing is ever dropped from it, or an episode is longer than any
            of the data.
        """
        num_steps = np.where(carry.is_cleared, 0, carry.num_steps) + 1
        if num_steps.max() > self._num_steps:
            raise ValueError(
                f"The context must hold every step of its chain; it holds {self._num_steps} and step "
                f"{num_steps.max()} came. Make the policy with a larger num_episodes."
            )
        self._model.check_steps(carry.step)
        normalizer = self._normalizer
        asked = np.asarray(return_to_go, np.float64)
        inputs = Step(
            previous_action=carry.previous_action,
            previous_reward=carry.previous_reward / np.float32(normalizer.reward_scale),
            previous_completion=carry.previous_completion,
            previous_step=carry.previous_step,
            previous_episode=carry.previous_episode,
            return_to_go=(asked / normalizer.return_scale).astype(np.float32),
            observation=(observation - normalizer.observation_mean) / normalizer.observation_std,
            step=carry.step,
            episode=carry.episode,
        )
        key = None if self._key is None else jax.random.fold_in(self._key, carry.num_calls)
        cache = self._with_room(carry.cache, int(num_steps.max()))
        cache, drawn = _decode(self._graph, self._params, cache, carry.is_cleared, inputs, key)
        action = np.asarray(drawn)
        carry = carry._replace(
            cache=cache,
            num_calls=carry.num_calls + 1,
            num_steps=num_steps,
            is_cleared=np.zeros_like(carry.is_cleared),
            previous_action=action,
            return_to_go=asked,
        )
        return carry, action

    def observe(
        self, carry: CachedCarry, reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]
    ) -> CachedCarry:
        """Returns the carry after a step's reward."""
        reached = completions(
            carry.return_to_go,
            reward,
            done,
            scale=self._normalizer.return_scale,
            completion=self._completion,
        )
        carry = carry._replace(
            previous_reward=reward.astype(np.float32),
            previous_completion=reached.astype(np.float32),
            previous_step=carry.step,
            previous_episode=carry.episode,
            step=np.where(done, 0, carry.step + 1).astype(np.int32),
            episode=(carry.episode + done).astype(np.int32),
        )
        return self._forget(carry, done) if self._clear_context else carry

    def _forget(self, carry: CachedCarry, done: Bool[np.ndarray, "B"]) -> CachedCarry:
        def clear(x: np.ndarray) -> np.ndarray:
            return np.where(done.reshape(done.shape + (1,) * (x.ndim - 1)), 0, x).astype(x.dtype)

        return carry._replace(
            is_cleared=done.copy(),
            previous_action=clear(carry.previous_action),
            previous_reward=clear(carry.previous_reward),
            previous_completion=clear(carry.previous_completion),
            previous_step=clear(carry.previous_step),
            previous_episode=clear(carry.previous_episode),
            episode=clear(carry.episode),
        )
