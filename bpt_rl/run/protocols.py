"""Numbers read from episode logs, each with a 95% interval: `first, last, mean, max, curve` and two controls.

Intervals are percentile bootstraps with a fixed seed. Chains are the sample: episodes of one chain share a
context, so they are never resampled apart. Several training seeds are resampled first, then the chains of
each. A percentile interval over few samples is too short (of 16 normal chains it covers the truth about
92% of the time, of 4 about 80%): give enough chains.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from bpt_rl.types import EpisodeLog

NUM_RESAMPLES = 4000
BOOTSTRAP_SEED = 20_230_516
_BLOCK_DRAWS = 4_000_000
"""Episodes drawn at once: bounds the memory of a bootstrap to some 100 MB."""

_READ: dict[str, Callable[[Float[np.ndarray, "C n"]], Float[np.ndarray, "C"]]] = {
    "first": lambda returns: returns[:, 0],
    "last": lambda returns: returns[:, -1],
    "mean": lambda returns: returns.mean(axis=1),
    "max": lambda returns: returns.max(axis=1),
    "improvement": lambda returns: returns[:, -1] - returns[:, 0],
}
PROTOCOLS = tuple(_READ)
"""`improvement` is last less first, within the chain."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, its 95% interval and what it was read by."""

    value: float
    low: float
    high: float
    """NaN, like `low`, if there is one sample only: no interval can be had from it."""
    num_samples: int
    """Chains, over all seeds; episodes for `null_max`."""
    protocol: str

    def __float__(self) -> float:
        """The value without its interval."""
        return self.value

    @property
    def has_interval(self) -> bool:
        """Whether there was more than one sample."""
        return not math.isnan(self.low)


def per_chain(name: str, log: EpisodeLog) -> Float[np.ndarray, "C"]:
    """Returns the number that a protocol reads from each chain.

    Raises:
      ValueError: If there is no such protocol, or the log holds no episode.
    """
    if name not in _READ:
        raise ValueError(f"A protocol must be one of {', '.join(_READ)}; got {name!r}. Choose one of them.")
    if not log.returns.size:
        raise ValueError(
            f"A log must hold an episode; got shape {log.returns.shape}. Evaluate at least one chain."
        )
    return np.asarray(_READ[name](log.returns), np.float64)


def estimate(name: str, logs: Sequence[EpisodeLog]) -> Estimate:
    """Returns a protocol's mean over chains, and over seeds if there is a log for each of several seeds.

    Args:
      name: One of `PROTOCOLS`.
      logs: One log a training seed. Every seed weighs the same.
    """
    return _summary(name, [per_chain(name, log) for log in logs], _mean)


def first(log: EpisodeLog) -> Estimate:
    """Returns the return of a chain's first episode, before there is anything in context."""
    return estimate("first", [log])


def last(log: EpisodeLog) -> Estimate:
    """Returns the return of a chain's last episode, all the others in context."""
    return estimate("last", [log])


def mean(log: EpisodeLog) -> Estimate:
    """Returns the mean return of a chain's episodes."""
    return estimate("mean", [log])


def max(log: EpisodeLog) -> Estimate:  # the protocol's name in the papers
    """Returns the largest return of a chain, as the paper reports; it grows with n by luck: see `null_max`.

    Source: Liu and Abbeel 2023 (arXiv 2305.16554).
    """
    return estimate("max", [log])


def improvement(log: EpisodeLog) -> Estimate:
    """Returns a chain's last return less its first: what the policy gains within its context."""
    return estimate("improvement", [log])


def curve(log: EpisodeLog) -> tuple[Estimate, ...]:
    """Returns the mean return at each episode index of the chain, with pointwise intervals."""
    return curves([log])


def curves(logs: Sequence[EpisodeLog]) -> tuple[Estimate, ...]:
    """Returns `curve` over several training seeds, whose logs must hold equally many episodes."""
    num_episodes = logs[0].returns.shape[1]
    columns = [[np.asarray(log.returns[:, i], np.float64) for log in logs] for i in range(num_episodes)]
    return tuple(_summary(f"episode {i + 1}", groups, _mean) for i, groups in enumerate(columns))


def null_max(memoryless_log: EpisodeLog, num_episodes: int) -> Estimate:
    """Returns what largest-of-n gives a policy without memory: luck alone, nothing learnt in context.

    The expected maximum of n episodes drawn with replacement from the log, exact from its order statistics:
    the sum over i of x_(i) ((i/m)^n - ((i-1)/m)^n). The interval resamples episodes, here alike in law. A log
    of few episodes gives too little, since draws repeat: let m be many times n.

    Args:
      memoryless_log: Episodes played with an empty context.
      num_episodes: n, the episodes of the chain that the maximum is to be compared with.
    """
    return null_max_of([memoryless_log], num_episodes)


def null_max_of(memoryless_logs: Sequence[EpisodeLog], num_episodes: int) -> Estimate:
    """Returns `null_max` averaged over several training seeds."""
    if num_episodes < 1:
        raise ValueError(f"num_episodes must be positive; got {num_episodes}. Use the episodes of a chain.")
    groups = [np.asarray(log.returns, np.float64).ravel() for log in memoryless_logs]
    return _summary("null max", groups, lambda returns: _expected_max(returns, num_episodes))


def difference(
    name: str,
    logs: Sequence[EpisodeLog],
    control: Sequence[EpisodeLog],
    *,
    control_name: str = "",
    factor: float = 1.0,
) -> Estimate:
    """Returns a protocol's estimate less `factor` times the control's, read by `control_name` or the same one.

    Chains of the two are resampled apart, which is right for unrelated environments and cautious for equal
    start states. Seeds are resampled together if both have as many logs, as an agent and its control do.
    """
    ours = [per_chain(name, log) for log in logs]
    theirs = [factor * per_chain(control_name or name, log) for log in control]
    return _margin(name, (ours, _mean), (theirs, _mean))


def beyond_luck(logs: Sequence[EpisodeLog], memoryless_logs: Sequence[EpisodeLog]) -> Estimate:
    """Returns the largest return of a chain less `null_max` of as many episodes, drawn as in `difference`.

    With 8 to 16 chains without any memory, 3% to 6% of the intervals lie above zero, not 2.5%: see `null_max`.
    """
    num_episodes = logs[0].returns.shape[1]
    ours = [per_chain("max", log) for log in logs]
    theirs = [np.asarray(log.returns, np.float64).ravel() for log in memoryless_logs]
    return _margin("max", (ours, _mean), (theirs, lambda returns: _expected_max(returns, num_episodes)))


_Statistic = Callable[[Float[np.ndarray, "... m"]], Float[np.ndarray, "..."]]
_Sample = tuple[Sequence[Float[np.ndarray, "_"]], _Statistic]
"""One array a training seed, and what is read from each resample of it."""


def _mean(samples: Float[np.ndarray, "... m"]) -> Float[np.ndarray, "..."]:
    return np.asarray(samples.mean(axis=-1))


def _expected_max(returns: Float[np.ndarray, "... m"], num_episodes: int) -> Float[np.ndarray, "..."]:
    rank = np.arange(returns.shape[-1] + 1) / returns.shape[-1]
    return np.asarray(np.sort(returns, axis=-1) @ np.diff(rank**num_episodes))


def _summary(protocol: str, groups: Sequence[Float[np.ndarray, "_"]], statistic: _Statistic) -> Estimate:
    value = _average(groups, statistic)
    count = sum(map(len, groups))
    if _single(groups):
        return Estimate(value, math.nan, math.nan, count, protocol)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    samples = _resample(groups, _draw_seeds(len(groups), generator), statistic, generator)
    return Estimate(value, *_percentiles(samples), count, protocol)


def _margin(protocol: str, ours: _Sample, theirs: _Sample) -> Estimate:
    value = _average(*ours) - _average(*theirs)
    count = sum(map(len, ours[0]))
    if _single(ours[0]) or _single(theirs[0]):
        return Estimate(value, math.nan, math.nan, count, protocol)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    seeds = _draw_seeds(len(ours[0]), generator)
    their_seeds = seeds if len(theirs[0]) == len(ours[0]) else _draw_seeds(len(theirs[0]), generator)
    samples = _resample(ours[0], seeds, ours[1], generator)
    samples -= _resample(theirs[0], their_seeds, theirs[1], generator)
    return Estimate(value, *_percentiles(samples), count, protocol)


def _average(groups: Sequence[Float[np.ndarray, "_"]], statistic: _Statistic) -> float:
    return float(np.mean([statistic(group) for group in groups]))


def _single(groups: Sequence[Float[np.ndarray, "_"]]) -> bool:
    return len(groups) == 1 and len(groups[0]) == 1


def _draw_seeds(num_seeds: int, generator: np.random.Generator) -> Int[np.ndarray, "resamples seeds"]:
    return generator.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))


def _resample(
    groups: Sequence[Float[np.ndarray, "_"]],
    seeds: Int[np.ndarray, "resamples seeds"],
    statistic: _Statistic,
    generator: np.random.Generator,
) -> Float[np.ndarray, "resamples"]:
    values = np.empty(seeds.shape)
    for index, group in enumerate(groups):
        rows, columns = np.nonzero(seeds == index)
        block = -(-_BLOCK_DRAWS // len(group))
        for start in range(0, len(rows), block):
            where = rows[start : start + block], columns[start : start + block]
            values[where] = statistic(group[generator.integers(len(group), size=(len(where[0]), len(group)))])
    return np.asarray(values.mean(axis=1))


def _percentiles(samples: Float[np.ndarray, "resamples"]) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
