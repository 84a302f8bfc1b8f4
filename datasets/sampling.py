"""Drawing batches of chains: batch k depends on the seed and on k alone."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from bpt_rl.config import DataConfig
from bpt_rl.datasets import capacity
from bpt_rl.datasets.batch_plan import BatchPlan, fill_rows, place_chains, targets_of
from bpt_rl.datasets.drawing import Chains, Drawing
from bpt_rl.datasets.packing import steps_of
from bpt_rl.datasets.places import BatchSource, Gatherer, open_place
from bpt_rl.datasets.store import Store
from bpt_rl.types import LAYOUTS, PackedBatch

Entries = tuple[Int[np.ndarray, "8 *slots"], Float32[np.ndarray, "3 *slots"]]
"""Of a batch's trajectories, the whole numbers and the real ones of a `BatchPlan`."""


class ChainSampler:
    """Stateless source of packed batches from one store."""

    def __init__(
        self,
        store: Store,
        config: DataConfig,
        layout: str,
        seed: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        expected_return: Path | None = None,
    ) -> None:
        """Checks that the store can serve the configuration; episodes are read at the first batch.

        Args:
          store: To stay open as long as batches are made.
          config: What to draw, and where to keep it.
          layout: Token layout, a key of `LAYOUTS`.
          seed: Of the drawing.
          process_index: Which share of every batch's rows this process makes.
          num_processes: Shares that there are; all processes' batches, one below the other, are the batch of one.
          expected_return: npy file of what was to be expected of each step, where chains are relabelled by it:
            float32 [episodes of the store, T1], t = 0 the first step. It need not be there before the first batch.

        Raises:
          ValueError: If the store lacks the task, has too few episodes, or episodes too short for the window; if
            rows cannot be shared equally; or if the place asked for has no room.
        """
        self._config = config
        self.seed = seed
        """Of the drawing."""
        if (expected_return is not None) != (config.relabel == "expected_return"):
            raise ValueError(
                "Returns are expected just where chains are relabelled by them; got relabel "
                f"{config.relabel!r} and expected_return {expected_return}. Give both or neither."
            )
        self._returns = store.returns(config.task)
        self._lengths = np.asarray(store.lengths)
        self._drawing = Drawing(config, self._returns, self._lengths, store.episode_names)
        longest = self._drawing.longest
        self.context_length = config.context_length or config.num_trajectories * longest * LAYOUTS[layout]
        self._steps_per_row = steps_of(self.context_length, layout)
        chains_per_row = self._steps_per_row // (config.num_trajectories * longest)
        if not chains_per_row:
            raise ValueError(
                f"context_length must hold a whole chain; got {self.context_length} tokens for "
                f"{config.num_trajectories} trajectories of up to {longest} steps. Use "
                f"{config.num_trajectories * longest * LAYOUTS[layout]} tokens or fewer trajectories."
            )
        self._num_rows_in_all = -(-config.batch_size // chains_per_row)
        self.num_rows = _share(self._num_rows_in_all, num_processes)
        """Rows of the batches of this process."""
        # Rows of a mixture get as many chains as are sure to fit, others as many as happen to.
        fewest = min(config.mixture, default=config.num_trajectories)
        shortest = longest if config.mixture else self._drawing.shortest
        self.is_one_chain_a_row = 2 * fewest * shortest > self._steps_per_row
        """Whether no row can ever hold two chains, so that a causal model needs no segment ids."""
        self._first_row = process_index * self.num_rows
        self._source = BatchSource(
            store=store,
            task=config.task,
            episodes=np.sort(self._drawing.eligible),
            num_rows=self.num_rows,
            steps_per_row=self._steps_per_row,
            expected_return=expected_return,
        )
        self.choice = capacity.choose(config.place, self._source.num_bytes, capacity.measure())
        """Where the episodes are kept."""

    def with_seed(self, seed: int) -> "ChainSampler":
        """Returns the sampler that draws with another seed, from the same episodes in the same memory."""
        other = copy.copy(self)
        other.seed, other._place = seed, self._place
        return other

    @functools.cached_property
    def _place(self) -> Gatherer:
        return open_place(self.choice.place, self._source)

    def batch(self, index: int) -> PackedBatch:
        """Returns this process's rows of batch `index`: `batch_size` chains packed into all rows together."""
        return self.gather(self.plan(index))

    def gather(self, plan: BatchPlan) -> PackedBatch:
        """Returns the batch of a plan: on the device if the episodes are kept there, else in the host's memory."""
        return self._place.gather(plan)

    def plan(self, index: int) -> BatchPlan:
        """Returns what this process's rows of batch `index` are made of."""
        config, generator = self._config, np.random.default_rng([self.seed, index])
        if config.mixture:
            whole, real = self._mixed(generator, index)
        else:
            size, num_chains = config.num_trajectories, config.batch_size
            chains = self._draw(generator, index, num_chains, size)
            whole, real = self._entries(chains, place_chains(chains.num_steps, self._steps_per_row))
        return BatchPlan.of_rows(whole, real, first_row=self._first_row, num_rows=self.num_rows)

    def _mixed(self, generator: np.random.Generator, index: int) -> Entries:
        """Returns rows each full of chains of one size; as many entries in every batch."""
        longest, mixture = self._drawing.longest, sorted(set(self._config.mixture))
        per_row = {size: self._steps_per_row // (size * longest) for size in mixture}
        sizes = generator.choice(mixture, self._num_rows_in_all)
        num_entries = self._num_rows_in_all * max(size * num_chains for size, num_chains in per_row.items())
        whole, real = np.zeros((8, num_entries), np.int64), np.zeros((3, num_entries), np.float32)
        whole[0], end = -1, 0
        for size in np.unique(sizes).tolist():
            rows = np.flatnonzero(sizes == size)
            chains = self._draw(generator, index, len(rows) * per_row[size], size)
            entries = self._entries(chains, fill_rows(chains.num_steps, rows))
            begin, end = end, end + chains.picked.size
            whole[:, begin:end], real[:, begin:end] = (values.reshape(len(values), -1) for values in entries)
        return whole, real

    def _draw(self, generator: np.random.Generator, index: int, num_chains: int, size: int) -> Chains:
        first = index * num_chains
        return self._drawing.chains(generator, self.seed, first=first, num_chains=num_chains, size=size)

    def _entries(self, chains: Chains, placed: Int[np.ndarray, "3 C N"]) -> Entries:
        """Returns what a plan holds of each trajectory, whole numbers and real ones."""
        config, picked = self._config, chains.picked
        target, threshold = targets_of(self._returns[picked], own=config.relabel != "chain_maximum")
        counts = (chains.episode == picked.shape[1] - 1) | (config.loss_on == "all")
        place = np.searchsorted(self._source.episodes, picked)
        last = self._lengths[picked] - 1
        flag_from = last if config.completion == "per_episode" else np.zeros_like(last)
        steps = (place, chains.start, chains.num_steps, flag_from)
        whole = np.array([*placed, chains.episode, *steps])
        return whole, np.array([target, threshold, counts], np.float32)


def _share(num_rows: int, num_processes: int) -> int:
    share, rest = divmod(num_rows, num_processes)
    if rest:
        raise ValueError(
            f"Processes must get equally many rows of a batch; got {num_rows} rows for {num_processes} processes. "
            "Use a batch_size that fills a multiple of so many rows."
        )
    return share


def batches(
    sampler: ChainSampler,
    start: int,
    stop: int,
    *,
    put: Callable[[PackedBatch], PackedBatch] | None = None,
    is_put_ahead: bool = True,
) -> Iterator[PackedBatch]:
    """Yields batches `start` to `stop`, made ahead in a thread.

    Args:
      sampler: Makes them.
      start: Index of the first.
      stop: Index behind the last.
      put: Puts one where it is used; on the default device if None.
      is_put_ahead: Whether the thread puts them too, while others are in use. Else only what the host makes is made
        ahead, and each takes memory of the device when it is asked for and no sooner.
    """
    import grain
    import jax

    put = put or jax.device_put
    indices = grain.MapDataset.range(start, stop)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    if is_put_ahead:
        yield from indices.map(sampler.batch).map(put).to_iter_dataset(options)
    elif sampler.choice.place == "accelerator":
        plans = indices.map(sampler.plan).to_iter_dataset(options)
        yield from (put(sampler.gather(plan)) for plan in plans)
    else:
        yield from map(put, indices.map(sampler.batch).to_iter_dataset(options))
