"""Drawing batches of chains: batch k depends on the seed and on k alone."""

import copy
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from bpt_rl.config import DataConfig
from bpt_rl.datasets import capacity
from bpt_rl.datasets.batch_plan import BatchPlan, place_chains, targets_of
from bpt_rl.datasets.packing import steps_of
from bpt_rl.datasets.places import BatchSource, Gatherer, open_place
from bpt_rl.datasets.store import Store
from bpt_rl.types import LAYOUTS, PackedBatch


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
    ) -> None:
        """Checks that the store can serve the configuration; episodes are read at the first batch.

        Args:
          store: To stay open as long as batches are made.
          config: What to draw, and where to keep it.
          layout: Token layout, a key of `LAYOUTS`.
          seed: Of the drawing.
          process_index: Which share of every batch's rows this process makes.
          num_processes: Shares that there are; all processes' batches, one below the other, are the batch of one.

        Raises:
          ValueError: If the store lacks the task, has too few episodes, or episodes too short for the window; if
            rows cannot be shared equally; or if the place asked for has no room.
        """
        self._config = config
        self.seed = seed
        """Of the drawing."""
        self._returns = store.returns(config.task)
        self._lengths = np.asarray(store.lengths)
        ascending = np.argsort(self._returns, kind="stable")
        self._eligible = ascending[len(ascending) - max(1, round(config.top_fraction * len(ascending))) :]
        self._check()
        longest = int(config.window or self._lengths[self._eligible].max())
        self.context_length = config.context_length or config.num_trajectories * longest * LAYOUTS[layout]
        self._steps_per_row = steps_of(self.context_length, layout)
        chains_per_row = self._steps_per_row // (config.num_trajectories * longest)
        if not chains_per_row:
            raise ValueError(
                f"context_length must hold a whole chain; got {self.context_length} tokens for "
                f"{config.num_trajectories} trajectories of up to {longest} steps. Use "
                f"{config.num_trajectories * longest * LAYOUTS[layout]} tokens or fewer trajectories."
            )
        self.num_rows = _share(-(-config.batch_size // chains_per_row), num_processes)
        """Rows of the batches of this process."""
        shortest = int(config.window or self._lengths[self._eligible].min())
        self.is_one_chain_a_row = 2 * config.num_trajectories * shortest > self._steps_per_row
        """Whether no row can ever hold two chains, so that a causal model needs no segment ids."""
        self._first_row = process_index * self.num_rows
        self._source = BatchSource(
            store=store,
            task=config.task,
            episodes=np.sort(self._eligible),
            num_rows=self.num_rows,
            steps_per_row=self._steps_per_row,
        )
        self.choice = capacity.choose(config.place, self._source.num_bytes, capacity.measure())
        """Where the episodes are kept."""

    def _check(self) -> None:
        config, lengths = self._config, self._lengths[self._eligible]
        if config.num_trajectories > len(lengths):
            raise ValueError(
                f"A chain draws distinct episodes, so num_trajectories must not exceed those that may be drawn; "
                f"got {config.num_trajectories} and {len(lengths)}. Use fewer trajectories or a larger top_fraction."
            )
        if config.window > lengths.min():
            raise ValueError(
                f"window must not exceed the shortest episode; got {config.window} and {lengths.min()} steps. "
                "Use a shorter window."
            )

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
        return self._place.gather(self.plan(index))

    def plan(self, index: int) -> BatchPlan:
        """Returns what this process's rows of batch `index` are made of."""
        config, generator = self._config, np.random.default_rng([self.seed, index])
        drawn = np.array([self._draw(generator) for _ in range(config.batch_size)])
        order = self._returns[drawn[:, 0]].argsort(axis=1, kind="stable")
        chain = np.arange(config.batch_size)[:, None]
        picked, start = drawn[chain, 0, order], drawn[chain, 1, order]
        lengths = self._lengths[picked]
        num_steps = np.full_like(lengths, config.window) if config.window else lengths
        row, offset, segment_id = place_chains(num_steps, self._steps_per_row)
        target, threshold = targets_of(self._returns[picked], own=config.relabel == "own_return")
        episode = np.zeros_like(picked) + np.arange(config.num_trajectories)
        counts = (episode == config.num_trajectories - 1) | (config.loss_on == "all")
        place = np.searchsorted(self._source.episodes, picked)
        flag_from = lengths - 1 if config.completion == "per_episode" else np.zeros_like(lengths)
        return BatchPlan.of_rows(
            np.array([row, offset, segment_id, episode, place, start, num_steps, flag_from]),
            np.array([target, threshold, counts], np.float32),
            first_row=self._first_row,
            num_rows=self.num_rows,
        )

    def _draw(self, generator: np.random.Generator) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """Returns the episodes of a chain in the order drawn, and the first step of each."""
        config = self._config
        if config.draw == "uniform":
            picked = generator.choice(self._eligible, config.num_trajectories, replace=False)
        else:
            bands = np.array_split(self._eligible, config.num_trajectories)
            picked = np.array([generator.choice(band) for band in bands])
        if not config.window:
            return picked, np.zeros_like(picked)
        spare = (self._lengths[picked] - config.window).tolist()
        return picked, np.array([int(generator.integers(0, steps, endpoint=True)) for steps in spare])


def _share(num_rows: int, num_processes: int) -> int:
    share, rest = divmod(num_rows, num_processes)
    if rest:
        raise ValueError(
            f"Processes must get equally many rows of a batch; got {num_rows} rows for {num_processes} processes. "
            "Use a batch_size that fills a multiple of so many rows."
        )
    return share


def batches(sampler: ChainSampler, start: int, stop: int) -> Iterator[PackedBatch]:
    """Yields batches `start` to `stop` on the default device, made and copied there ahead in a background thread."""
    import grain
    import jax

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    dataset = grain.MapDataset.range(start, stop).map(sampler.batch).map(jax.device_put)
    yield from dataset.to_iter_dataset(options)
