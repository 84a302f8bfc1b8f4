"""Drawing batches of chains: batch k depends on the seed and on k alone."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from bpt_rl.config import DataConfig
from bpt_rl.datasets.chains import Chain, build_chain
from bpt_rl.datasets.packing import pack, steps_of
from bpt_rl.datasets.store import Store
from bpt_rl.types import LAYOUTS, PackedBatch, Trajectory

CACHE_BYTES = 2 << 30
"""Memory for episodes kept after their first reading."""


class ChainSampler:
    """Stateless source of packed batches from one store."""

    def __init__(self, store: Store, config: DataConfig, layout: str, seed: int) -> None:
        """Checks that the store can serve the configuration.

        Raises:
          ValueError: If the store lacks the task, has too few episodes, or episodes too short for the window.
        """
        self._store = store
        self._config = config
        self._layout = layout
        self._seed = seed
        returns = store.returns(config.task)
        ascending = np.argsort(returns, kind="stable")
        self._eligible = ascending[len(ascending) - max(1, round(config.top_fraction * len(ascending))) :]
        lengths = np.asarray(store.lengths)[self._eligible]
        self._check(lengths)
        self._chain_steps = config.num_trajectories * int(config.window or lengths.max())
        self.context_length = config.context_length or self._chain_steps * LAYOUTS[layout]
        chains_per_row = steps_of(self.context_length, layout) // self._chain_steps
        if not chains_per_row:
            raise ValueError(
                f"context_length must hold a whole chain; got {self.context_length} tokens for "
                f"{config.num_trajectories} trajectories of up to {self._chain_steps // config.num_trajectories} "
                f"steps. Use {self._chain_steps * LAYOUTS[layout]} tokens or fewer trajectories."
            )
        self.num_rows = -(-config.batch_size // chains_per_row)
        # Beside observation and action: discount, stored reward and the task's.
        episode_bytes = 4 * int(lengths.max() + 1) * (store.observation_dim + store.action_dim + 3)
        self._episode = functools.lru_cache(max(1, CACHE_BYTES // episode_bytes))(self._read)

    def _check(self, lengths: np.ndarray) -> None:
        config = self._config
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

    def _read(self, index: int) -> Trajectory:
        trajectory, task = self._store.episode(index), self._config.task
        # What no chain is made of would fill the cache: physics takes as much as all the rest.
        return dataclasses.replace(
            trajectory,
            physics=np.zeros((len(trajectory.physics), 0)),
            task_reward={task: trajectory.task_reward[task]},
        )

    def batch(self, index: int) -> PackedBatch:
        """Returns batch `index`: `batch_size` chains packed into `num_rows` rows."""
        generator = np.random.default_rng([self._seed, index])
        chains = [self._draw(generator) for _ in range(self._config.batch_size)]
        return pack(chains, self.context_length, layout=self._layout, num_rows=self.num_rows)

    def _draw(self, generator: np.random.Generator) -> Chain:
        config = self._config
        if config.draw == "uniform":
            picked = generator.choice(self._eligible, config.num_trajectories, replace=False)
        else:
            bands = np.array_split(self._eligible, config.num_trajectories)
            picked = np.array([generator.choice(band) for band in bands])
        trajectories = [self._episode(int(i)) for i in picked]
        windows = None
        if config.window:
            spare = [trajectory.num_steps - config.window for trajectory in trajectories]
            starts = [int(generator.integers(0, s, endpoint=True)) for s in spare]
            windows = [slice(start, start + config.window) for start in starts]
        return build_chain(
            trajectories,
            config.task,
            relabel=config.relabel,
            completion=config.completion,
            loss_on=config.loss_on,
            windows=windows,
        )


def batches(sampler: ChainSampler, start: int, stop: int) -> Iterator[PackedBatch]:
    """Yields batches `start` to `stop`, drawn ahead in a background thread."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    dataset = grain.MapDataset.range(start, stop).map(sampler.batch)
    yield from dataset.to_iter_dataset(options)
