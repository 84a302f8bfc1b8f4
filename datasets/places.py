"""Where episodes are kept while batches are made of them: three places behind one interface.

All three give the same batches, bit for bit: those of `chains.build_chain` and `packing.pack`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int

from bpt_rl.config import Place
from bpt_rl.datasets.batch_plan import BatchPlan, assemble, assemble_in_jit
from bpt_rl.datasets.chains import collected_returns
from bpt_rl.datasets.store import BLOCK_EPISODES, Store
from bpt_rl.types import PackedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Episodes of a store that a plan's `episode_index` counts, and the size of the batches made of them."""

    store: Store
    task: str
    """Whose reward counts."""
    episodes: Int[np.ndarray, "E"]
    """Their indices in the store, ascending."""
    num_rows: int
    """B."""
    steps_per_row: int
    """T."""
    expected_return: Path | None = None
    """npy file of returns-to-go, float32 [episodes of the store, T1], that stand in place of what was collected."""

    @functools.cached_property
    def _expected(self) -> Float32[np.ndarray, "store T1"] | None:
        return None if self.expected_return is None else np.load(self.expected_return, mmap_mode="r")

    @functools.cached_property
    def longest(self) -> int:
        """Rows of the longest episode, the dummy row included."""
        return int(self.store.lengths[self.episodes].max()) + 1

    @property
    def num_bytes(self) -> int:
        """Of all episodes, in memory."""
        # Reward, what it sums to, and perhaps what was expected.
        num_numbers = 2 + (self.expected_return is not None)
        floats_per_row = self.store.observation_dim + self.store.action_dim + num_numbers
        return 4 * len(self.episodes) * self.longest * floats_per_row

    def columns(self) -> Iterator[tuple[str, Float32[np.ndarray, "E T1 ..."]]]:
        """Yields name and array of each column, so that one at a time need be in memory."""
        yield "observation", self._load("observation", (self.store.observation_dim,))
        yield "action", self._load("action", (self.store.action_dim,))
        reward = self._load(f"reward/{self.task}", ())
        yield "reward", reward
        yield "collected", collected_returns(reward[:, 1:])
        if self._expected is not None:
            yield "expected", np.array(self._expected[self.episodes, : self.longest])

    def _load(self, name: str, inner: tuple[int, ...]) -> Float32[np.ndarray, "E T1 ..."]:
        loaded = np.empty((len(self.episodes), self.longest, *inner), np.float32)
        for start in range(0, self.store.num_episodes, BLOCK_EPISODES):
            stop = min(start + BLOCK_EPISODES, self.store.num_episodes)
            first, last = np.searchsorted(self.episodes, (start, stop))
            if last > first:
                block = self.store.block((name,), start, stop)[name]
                loaded[first:last] = block[self.episodes[first:last] - start, : self.longest]
        return loaded

    def read(self, index: int) -> dict[str, Float32[np.ndarray, "T1 ..."]]:
        """Returns the columns of one episode, from the file."""
        episode, reward = int(self.episodes[index]), f"reward/{self.task}"
        block = self.store.block(("observation", "action", reward), episode, episode + 1)
        columns = {
            "observation": block["observation"][0],
            "action": block["action"][0],
            "reward": block[reward][0],
            "collected": collected_returns(block[reward][0, 1:]),
        }
        if self._expected is not None:
            columns["expected"] = np.array(self._expected[episode])
        return columns


@runtime_checkable
class Gatherer(Protocol):
    """Makes batches."""

    def gather(self, plan: BatchPlan) -> PackedBatch:
        """Returns the batch of a plan."""


class Accelerator:
    """Episodes on the default device; a batch is made there and stays there."""

    def __init__(self, source: BatchSource) -> None:
        import jax

        self._columns = {name: jax.device_put(values) for name, values in source.columns()}
        self._size = (source.num_rows, source.steps_per_row)
        self._assemble = jax.jit(_assemble_packed, static_argnums=(2, 3))

    def gather(self, plan: BatchPlan) -> PackedBatch:
        """Returns the batch of a plan, as arrays on the device."""
        # In one array: each transfer to the device costs as much as the whole batch takes to gather there.
        packed = np.stack([values.view(np.int32) for values in plan])
        batch: PackedBatch = self._assemble(packed, self._columns, *self._size)
        return batch


def _assemble_packed(packed: Any, columns: dict[str, Any], num_rows: int, steps_per_row: int) -> PackedBatch:
    import jax
    import jax.numpy as jnp

    rows = dict(zip(BatchPlan._fields, packed, strict=True))
    for name in ("target", "threshold", "counts"):
        rows[name] = jax.lax.bitcast_convert_type(rows[name], jnp.float32)
    return assemble_in_jit(BatchPlan(**rows), columns, num_rows, steps_per_row)


class Host:
    """Episodes in the host's memory."""

    def __init__(self, source: BatchSource) -> None:
        self._columns = dict(source.columns())
        self._source = source

    def gather(self, plan: BatchPlan) -> PackedBatch:
        """Returns the batch of a plan, in new NumPy arrays."""
        return assemble(plan, self._columns, self._source.num_rows, self._source.steps_per_row)


class Stream:
    """Episodes in the file; those of a batch are read when it is made."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def gather(self, plan: BatchPlan) -> PackedBatch:
        """Returns the batch of a plan, in new NumPy arrays."""
        # Entries without steps name episodes that other processes need.
        used = np.where(plan.num_steps > 0, plan.episode_index, plan.episode_index[0])
        needed, index = np.unique(used, return_inverse=True)
        read = [self._source.read(i) for i in needed.tolist()]
        columns = {name: [episode[name] for episode in read] for name in read[0]}
        local = plan._replace(episode_index=index.astype(np.int32))
        return assemble(local, columns, self._source.num_rows, self._source.steps_per_row)


PLACES: dict[Place, Any] = {"accelerator": Accelerator, "host": Host, "stream": Stream}


def open_place(place: Place, source: BatchSource) -> Gatherer:
    """Returns the place of that name, holding the episodes that it keeps in memory.

    Raises:
      ValueError: If a reward is not finite.
    """
    gatherer: Gatherer = PLACES[place](source)
    return gatherer
