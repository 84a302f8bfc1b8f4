"""A trajectory model acting in environments, one forward pass of one step's tokens a step."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from bpt_rl.config import FullContext
from bpt_rl.datasets.chains import Chain, completions
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.chain_cache import CACHE_SPEC, CacheDevices, decode, grow, prefill
from bpt_rl.nn.context_steps import ChainEnd, empty_steps, end_of, forget_oldest, write_chains
from bpt_rl.nn.hashed_graph import flat_module
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.step_packing import pack
from bpt_rl.nn.trajectory_model import Step
from bpt_rl.nn.transformer import KeyValueCache
from bpt_rl.types import PackedBatch


class CachedCarry(NamedTuple):
    """A chain so far, for B environments. `act` takes over the cache and the record: use each carry once."""

    cache: KeyValueCache
    end: ChainEnd
    origin: ChainEnd
    """The end of what the context began with: where a cleared one goes back to."""
    capacity: int
    """Most steps of a context."""
    record: PackedBatch | None
    """Every step of the contexts in raw units, where some may have to be forgotten."""
    return_to_go: Float[np.ndarray, "B"]
    """Unscaled, as last given to `act`."""
    num_calls: int
    """Actions taken since the start; each draws its own noise."""


class CachedPolicy:
    """Policy of a trajectory model; its actions are those of the full forward pass over the context so far.

    The context may begin with trajectories of a dataset: these are put into the cache by one forward pass.

    Each step reads the whole cache, so the cache is not made as long as the chain: it starts small and doubles
    when the longest context fills it, up to the chain's length. A long chain so reads a third less, for one
    compilation a size; caches that always fit would save half, and compile at every step.

    A context that is full is refused, or its oldest trajectories are forgotten, whole, before an episode that might
    not fit. What is left is then put into the cache anew. To move the cache up would be cheaper and another thing:
    keys and values of the layers above the first would still know of what was forgotten.

    Several devices may share the chains, and each chain's cache: see `bpt_rl.nn.chain_cache`.
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
        full_context: FullContext = "refuse",
        sample_seed: int | None = None,
        first_capacity: int = 4096,
        mesh: MeshConfig | None = None,
    ) -> None:
        """Binds parameters to a policy.

        Args:
          graph: Of a `TrajectoryModel`.
          params: Its parameters.
          normalizer: Of its training data.
          num_episodes: Episodes the context holds beside the trajectories it starts with; one where it is cleared.
          clear_context: Forget, at each episode's end, everything but the trajectories it started with.
          completion: `per_episode` or `per_step`, as in training.
          full_context: `refuse` a step that does not fit, or `drop_oldest` trajectories, played or given.
          sample_seed: Draw actions from the Gaussian head; their mean if None.
          first_capacity: Tokens of the smallest cache, unless the whole context needs fewer.
          mesh: Devices that share chains and caches; one if None.

        Raises:
          ValueError: If the mesh has more devices than there are, or splits parameters.
        """
        self._normalizer = normalizer
        self._clear_context = clear_context
        self._completion = completion
        self._model = nnx.merge(graph, params)
        self._place = CacheDevices(mesh=mesh or MeshConfig(), model=self._model.config)
        everywhere = self._place.sharding(PartitionSpec())
        self._graph, self._params = flat_module(graph, params, everywhere)
        self._key = None if sample_seed is None else jax.device_put(jax.random.key(sample_seed), everywhere)
        self._tokens_per_step: int = self._model.tokens_per_step
        self._num_episodes = 1 if clear_context else num_episodes
        self._drops = full_context == "drop_oldest" and not clear_context
        self._first_steps = -(-first_capacity // self._tokens_per_step)

    def start(self, num_environments: int, context: Sequence[Chain] | None = None) -> CachedCarry:
        """Returns the carry of contexts that hold the given trajectories, or nothing.

        Args:
          num_environments: B.
          context: A chain for each environment, all of equally many whole trajectories.

        Raises:
          ValueError: If chains are too few or too many, differ in their number of trajectories, or hold an episode
            longer than any of the training data, or chains do not divide among the devices.
        """
        self._place.check_rows(num_environments)
        chains = () if context is None else tuple(context)
        if context is not None:
            self._check(chains, num_environments)
        num_trajectories = len(chains[0].returns) if chains else 0
        capacity = (num_trajectories + self._num_episodes) * self._model.episode_steps
        longest = max([1, *(chain.num_steps for chain in chains)])
        record = empty_steps(
            num_environments,
            capacity if self._drops else longest,
            observation_dim=len(self._normalizer.observation_mean),
            action_dim=self._model.action_dim,
        )
        num_steps = write_chains(record, chains) if chains else np.zeros(num_environments, np.int32)
        end = end_of(record, num_steps)
        num_held = self._capacity(int(num_steps.max(initial=0)) + 1, capacity)
        cache = self._model.init_cache(num_environments, num_held, self._place.sharding(CACHE_SPEC))
        return CachedCarry(
            cache=self._filled(cache, record, np.arange(len(chains)), num_steps),
            end=end,
            origin=end,
            capacity=capacity,
            record=record if self._drops else None,
            return_to_go=np.zeros(num_environments),
            num_calls=0,
        )

    def _check(self, chains: Sequence[Chain], num_environments: int) -> None:
        counts = sorted({len(chain.returns) for chain in chains})
        if len(chains) != num_environments or len(counts) != 1:
            raise ValueError(
                "A context must be one chain an environment, all of equally many trajectories; got "
                f"{len(chains)} chains of {counts} trajectories for {num_environments} environments. Draw one for each."
            )
        for chain in chains:
            self._model.check_steps(chain.step)

    def _filled(
        self,
        cache: KeyValueCache,
        record: PackedBatch,
        rows: Int[np.ndarray, "contexts"],
        num_steps: Int[np.ndarray, "B"],
    ) -> KeyValueCache:
        """Returns the cache with the recorded steps of some rows, and of the others what it held."""
        if not rows.size:
            return cache
        # Whole episodes, so that few lengths are ever compiled.
        episode_steps = self._model.episode_steps
        length = -(-int(num_steps[rows].max()) // episode_steps) * episode_steps
        widths = ((0, 0), (0, max(0, length - record.step.shape[1])))
        source, places = self._place.dealt_rows(rows, len(num_steps))

        def part(values: np.ndarray) -> np.ndarray:
            return np.pad(values[source, :length], widths + ((0, 0),) * (values.ndim - 2))

        batch = self._normalizer(PackedBatch(*map(part, record)))
        batch = batch._replace(segment_ids=None)
        filled: KeyValueCache = prefill(
            self._graph, self._place, self._params, cache, batch, places, num_steps[source]
        )
        return filled

    def _capacity(self, num_steps: int, most: int) -> int:
        """Returns the steps of the smallest cache that holds so many, equally many on each device."""
        num_devices, capacity = self._place.mesh.context, int(self._first_steps)
        # Devices that share a cache need a turn of their own behind the last step: see `Stripes`.
        spare = num_devices - 1
        while capacity < num_steps + spare:
            capacity *= 2
        return -(-min(capacity, most + spare) // num_devices) * num_devices

    def _with_room(self, cache: KeyValueCache, num_steps: int, most: int) -> KeyValueCache:
        num_more = self._capacity(num_steps, most) * self._tokens_per_step - cache.keys[0].shape[2]
        return grow(cache, num_more, self._place) if num_more > 0 else cache

    def _with_space(self, carry: CachedCarry) -> CachedCarry:
        """Returns the carry without the oldest trajectories where an episode begins that might not fit."""
        end, record, most = carry.end, carry.record, carry.capacity - self._model.episode_steps
        is_full = (end.step == 0) & (end.num_steps > most)
        if record is None or not is_full.any():
            return carry
        num_steps = end.num_steps.copy()
        for row in np.flatnonzero(is_full).tolist():
            num_steps[row] = forget_oldest(record, row, int(num_steps[row]), most)
        rows = np.flatnonzero(is_full & (num_steps > 0))
        return carry._replace(
            cache=self._filled(carry.cache, record, rows, num_steps),
            end=_where(is_full, end_of(record, num_steps), end),
        )

    def act(
        self, carry: CachedCarry, observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[CachedCarry, Float[jax.Array, "B A"]]:
        """Returns the next carry and the action, mean or sample, which the device may still be at work on.

        Raises:
          ValueError: If a context is full and nothing may be dropped from it, or an episode is longer than any of
            the data.
        """
        self._model.check_steps(carry.end.step)
        carry = self._with_space(carry)
        end = carry.end
        num_steps = end.num_steps + 1
        if num_steps.max() > carry.capacity:
            raise ValueError(
                f"The context must hold every step of its chain; it holds {carry.capacity} and step "
                f"{num_steps.max()} came. Make the policy with a larger num_episodes, or let it drop_oldest."
            )
        asked = np.asarray(return_to_go, np.float64)
        length = end.num_steps * np.int32(self._tokens_per_step)
        packed = pack(self._inputs(end, observation, asked), length, carry.num_calls)
        cache = self._with_room(carry.cache, int(num_steps.max()), carry.capacity)
        cache, action = decode(self._graph, self._place, self._params, cache, packed, self._key)
        action.copy_to_host_async()
        now = {"observation": observation, "return_to_go": asked}
        _write(carry.record, end.num_steps, now | {"step": end.step, "episode": end.episode})
        carry = carry._replace(
            cache=cache,
            end=end._replace(num_steps=num_steps, previous_action=action),
            return_to_go=asked,
            num_calls=carry.num_calls + 1,
        )
        return carry, action

    def _inputs(
        self, end: ChainEnd, observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> Step:
        normalizer = self._normalizer
        return Step(
            previous_action=end.previous_action,
            previous_reward=end.previous_reward / np.float32(normalizer.reward_scale),
            previous_completion=end.previous_completion,
            previous_step=end.previous_step,
            previous_episode=end.previous_episode,
            return_to_go=(return_to_go / normalizer.return_scale).astype(np.float32),
            observation=(observation - normalizer.observation_mean) / normalizer.observation_std,
            step=end.step,
            episode=end.episode,
        )

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
        end = carry.end
        # By now an environment has had it.
        action = np.asarray(end.previous_action)
        outcome = {"action": action, "reward": reward, "completion": reached}
        _write(carry.record, end.num_steps - 1, outcome)
        end = end._replace(
            previous_action=action,
            previous_reward=reward.astype(np.float32),
            previous_completion=reached.astype(np.float32),
            previous_step=end.step,
            previous_episode=end.episode,
            step=np.where(done, 0, end.step + 1).astype(np.int32),
            episode=(end.episode + done).astype(np.int32),
        )
        return carry._replace(end=_where(done, carry.origin, end) if self._clear_context else end)


def _write(record: PackedBatch | None, place: Int[np.ndarray, "B"], values: Mapping[str, np.ndarray]) -> None:
    if record is not None:
        for name, value in values.items():
            getattr(record, name)[np.arange(len(place)), place] = value


def _where(is_first: Bool[np.ndarray, "B"], first: ChainEnd, second: ChainEnd) -> ChainEnd:
    def choose(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.where(is_first.reshape(is_first.shape + (1,) * (one.ndim - 1)), one, other)

    return ChainEnd(*map(choose, first, second))
