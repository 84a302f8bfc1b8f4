"""Drawing the episodes of chains, and which of their steps: what a batch's number and a seed make of a store."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bpt_rl.config import DataConfig


class Chains(NamedTuple):
    """C chains of N trajectories each, in the order of the chains."""

    picked: Int[np.ndarray, "C N"]
    """Episodes of the store."""
    start: Int[np.ndarray, "C N"]
    """First step of each."""
    num_steps: Int[np.ndarray, "C N"]

    @property
    def episode(self) -> Int[np.ndarray, "C N"]:
        """Position in the chain, from 0."""
        return np.zeros_like(self.picked) + np.arange(self.picked.shape[1])


class Drawing:
    """Stateless source of chains."""

    def __init__(
        self,
        config: DataConfig,
        returns: Float[np.ndarray, "E"],
        lengths: Int[np.ndarray, "E"],
        names: Sequence[str],
    ) -> None:
        """Finds the episodes that may be drawn.

        Args:
          config: What to draw.
          returns: Of every episode of the store.
          lengths: Their steps.
          names: Their names, source first, like "walker/rnd/episode_000017_1000.npz".

        Raises:
          ValueError: If a collector is unknown, or the episodes are too few or too short.
        """
        self._config, self._returns, self._lengths = config, returns, lengths
        sources = [name.rpartition("/")[0] for name in names]
        known = list(dict.fromkeys(sources))
        unknown = [name for name in config.collectors if name not in known]
        if unknown:
            raise ValueError(
                f"data.collectors must name sources of the store's episodes, {', '.join(known)}; got {unknown[0]!r}. "
                "Leave it out to draw from all."
            )
        self._history = np.array([known.index(source) for source in sources])
        """Which source each episode is of."""
        is_drawn = np.isin(self._history, [known.index(name) for name in config.collectors or known])
        ascending = np.argsort(returns, kind="stable")
        ascending = ascending[is_drawn[ascending]]
        self.eligible = ascending[len(ascending) - max(1, round(config.top_fraction * len(ascending))) :]
        """Episodes that may be drawn, ascending by return."""
        self._epoch: tuple[int, int, Int[np.ndarray, "_"]] = (-1, -1, self.eligible)
        self._starts_by_size: dict[int, Int[np.ndarray, "_"]] = {}
        self._check()

    def _check(self) -> None:
        config, lengths = self._config, self._lengths[self.eligible]
        if config.num_trajectories > len(lengths):
            raise ValueError(
                f"A chain draws distinct episodes, so num_trajectories must not exceed those that may be drawn; "
                f"got {config.num_trajectories} and {len(lengths)}. Use fewer trajectories or a larger top_fraction."
            )
        if config.window_start == "inside" and config.window > lengths.min():
            raise ValueError(
                f"window must not exceed the shortest episode; got {config.window} and {lengths.min()} steps. "
                "Use a shorter window, or window_start anywhere."
            )
        if config.draw == "consecutive" and not len(self._starts(config.num_trajectories)):
            raise ValueError(
                "A stretch of consecutive episodes must lie within one collector's; got num_trajectories "
                f"{config.num_trajectories} and stride {config.stride}, and no collector has so many that may be "
                "drawn. Use fewer trajectories or a smaller stride."
            )

    @property
    def longest(self) -> int:
        """Steps of the longest trajectory that may be drawn."""
        longest = int(self._lengths[self.eligible].max())
        return min(self._config.window, longest) if self._config.window else longest

    @property
    def shortest(self) -> int:
        """Steps of the shortest trajectory that may be drawn."""
        config = self._config
        if config.window and config.window_start == "anywhere":
            return 1
        return config.window or int(self._lengths[self.eligible].min())

    def chains(
        self, generator: np.random.Generator, seed: int, *, first: int, num_chains: int, size: int
    ) -> Chains:
        """Returns chains of `size` trajectories each, in the order of the chains.

        Args:
          generator: Draws them.
          seed: Of the run: orders the episodes that are drawn without replacement.
          first: Chains of the run before these.
          num_chains: C.
          size: N.
        """
        drawn = np.array([self._chain(generator, seed, first + i, size) for i in range(num_chains)])
        chain = np.arange(num_chains)[:, None]
        order = self._order(generator, drawn[:, 0])
        picked, start = drawn[chain, 0, order], drawn[chain, 1, order]
        num_steps = self._lengths[picked] - start
        return Chains(picked, start, np.minimum(num_steps, self._config.window or num_steps))

    def _order(
        self, generator: np.random.Generator, picked: Int[np.ndarray, "C N"]
    ) -> Int[np.ndarray, "C N"]:
        if self._config.order == "shuffled":
            return generator.permuted(np.zeros_like(picked) + np.arange(picked.shape[1]), axis=1)
        ranked = picked if self._config.order == "collected" else self._returns[picked]
        return ranked.argsort(axis=1, kind="stable")

    def _chain(
        self, generator: np.random.Generator, seed: int, number: int, size: int
    ) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """Returns the episodes of a chain in the order drawn, and the first step of each."""
        config = self._config
        picked = self._episodes(generator, seed, number, size)
        if not config.window:
            return picked, np.zeros_like(picked)
        kept = config.window if config.window_start == "inside" else 1
        spare = (self._lengths[picked] - kept).tolist()
        return picked, np.array([int(generator.integers(0, steps, endpoint=True)) for steps in spare])

    def _episodes(
        self, generator: np.random.Generator, seed: int, number: int, size: int
    ) -> Int[np.ndarray, "N"]:
        draw, eligible = self._config.draw, self.eligible
        if draw == "return_stratified":
            bands = np.array_split(eligible, size)
            return np.array([generator.choice(band) for band in bands])
        if draw == "without_replacement":
            epoch, place = divmod(number, len(eligible) // size)
            return self._shuffled(seed, epoch)[place * size : (place + 1) * size]
        if draw == "consecutive":
            starts, stride = self._starts(size), self._config.stride
            start = int(starts[generator.integers(len(starts))])
            return self._collected[start : start + (size - 1) * stride + 1 : stride]
        if draw == "by_length":
            return self._by_length(generator, size)
        picked: Int[np.ndarray, "N"] = generator.choice(eligible, size, replace=False)
        return picked

    def _by_length(self, generator: np.random.Generator, size: int) -> Int[np.ndarray, "N"]:
        """Returns the episodes of steps drawn all alike; an episode drawn again does not count."""
        picked: dict[int, None] = {}
        while len(picked) < size:
            step = generator.integers(self._ends[-1])
            picked[int(self.eligible[self._ends.searchsorted(step, side="right")])] = None
        return np.array(list(picked))

    @functools.cached_property
    def _ends(self) -> Int[np.ndarray, "_"]:
        """Where each of the episodes that may be drawn would end if they lay one behind another."""
        return np.cumsum(self._lengths[self.eligible])

    @functools.cached_property
    def _collected(self) -> Int[np.ndarray, "_"]:
        """Episodes that may be drawn, in the order of collection."""
        return np.sort(self.eligible)

    def _shuffled(self, seed: int, epoch: int) -> Int[np.ndarray, "_"]:
        """Returns the order of an epoch; that of the last one asked for is kept."""
        held = (
            self._epoch
        )  # Read once: samplers of several seeds share it, and may draw in threads of their own.
        if held[:2] != (seed, epoch):
            # A third word keeps this stream apart from those of batches, which have two.
            order = np.random.default_rng([seed, epoch, 1]).permutation(self.eligible)
            held = self._epoch = (seed, epoch, order)
        return held[2]

    def _starts(self, size: int) -> Int[np.ndarray, "_"]:
        """Returns where, in the order of collection, a stretch of so many episodes of one collector can begin."""
        if size not in self._starts_by_size:
            history, reach = self._history[self._collected], (size - 1) * self._config.stride
            starts = np.flatnonzero(history[: len(history) - reach] == history[reach:])
            self._starts_by_size[size] = starts
        return self._starts_by_size[size]
