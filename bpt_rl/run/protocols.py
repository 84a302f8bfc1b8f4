"""Numbers read from episode logs, each with a 95% interval: `first, last, mean, max, curve` and two controls.

Chains are the sample: episodes of one chain share a context, so they are never taken apart. With one training seed
an interval speaks of that checkpoint: Student's t over its chains. With several it speaks of training itself: t
over the means of the seeds, which needs no word on how much seeds differ, and is wide for two or three of them.
Of 8 to 32 chains and 1 to 5 seeds, zero is covered in 93.8% to 100% of the studies of a policy that does not
improve, by `improvement` and `slope` alike, whatever the shape of its returns (`benchmarks/protocol_power.py`). The
level of skewed returns is covered less often: where one episode in 12 succeeds and 8 chains are played, `last` is so
in half of the studies, because in the other half none succeeds.
"""

import builtins
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import special

from bpt_rl.run import statistics
from bpt_rl.run.statistics import Moment
from bpt_rl.types import EpisodeLog

Basis = Literal["chains", "seeds", "episodes"]
"""What an interval takes as its sample."""


def _slope(returns: Float[np.ndarray, "C n"]) -> Float[np.ndarray, "C"]:
    centred = np.arange(returns.shape[1]) - (returns.shape[1] - 1) / 2
    return np.asarray(returns @ centred / (centred @ centred or 1.0))


_READ: dict[str, Callable[[Float[np.ndarray, "C n"]], Float[np.ndarray, "C"]]] = {
    "first": lambda returns: returns[:, 0],
    "last": lambda returns: returns[:, -1],
    "mean": lambda returns: returns.mean(axis=1),
    "max": lambda returns: returns.max(axis=1),
    "improvement": lambda returns: returns[:, -1] - returns[:, 0],
    "slope": _slope,
}
PROTOCOLS = tuple(_READ)
"""`improvement` is last less first, `slope` the least-squares return per episode, both within the chain."""


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
    basis: Basis = "chains"

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
    return _summary(name, [per_chain(name, log) for log in logs])


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


def slope(log: EpisodeLog) -> Estimate:
    """Returns the least-squares slope of a chain's returns, in return per episode; 0 for a single episode."""
    return estimate("slope", [log])


def curve(log: EpisodeLog) -> tuple[Estimate, ...]:
    """Returns the mean return at each episode index of the chain, with pointwise intervals."""
    return curves([log])


def curves(logs: Sequence[EpisodeLog]) -> tuple[Estimate, ...]:
    """Returns `curve` over several training seeds, whose logs must hold equally many episodes."""
    num_episodes = logs[0].returns.shape[1]
    columns = [[np.asarray(log.returns[:, i], np.float64) for log in logs] for i in range(num_episodes)]
    return tuple(_summary(f"episode {i + 1}", groups) for i, groups in enumerate(columns))


def null_max(memoryless_log: EpisodeLog, num_episodes: int) -> Estimate:
    """Returns what largest-of-n gives a policy without memory: luck alone, nothing learnt in context.

    The mean, over every way to choose n episodes of the log, of the largest: unbiased, and exact from the sorted
    returns x_(i) as the sum of x_(i) binom(i-1, n-1) / binom(m, n). The interval takes episodes, here alike in
    law, as the sample (jackknife). Where one episode in thousands is a great one, no interval can know of it.

    Args:
      memoryless_log: At least n episodes played with an empty context.
      num_episodes: n, the episodes of the chain that the maximum is to be compared with.

    Raises:
      ValueError: If n is not positive, or the log holds fewer episodes.
    """
    return null_max_of([memoryless_log], num_episodes)


def null_max_of(memoryless_logs: Sequence[EpisodeLog], num_episodes: int) -> Estimate:
    """Returns `null_max` averaged over several training seeds."""
    groups = [np.asarray(log.returns, np.float64).ravel() for log in memoryless_logs]
    moments = [_expected_max(returns, num_episodes) for returns in groups]
    count = sum(map(len, groups))
    if len(moments) == 1:
        return _estimate("null max", moments[0], count, "episodes")
    return _estimate("null max", _over_seeds([m.value for m in moments]), count, "seeds")


def difference(
    name: str,
    logs: Sequence[EpisodeLog],
    control: Sequence[EpisodeLog],
    *,
    control_name: str = "",
    factor: float = 1.0,
) -> Estimate:
    """Returns a protocol's estimate less `factor` times the control's, read by `control_name` or the same one.

    Chains of the two count as independent, which is right for unrelated environments and cautious for equal
    start states. Several seeds are paired if both have as many logs, as an agent and its control do.
    """
    ours = [per_chain(name, log) for log in logs]
    theirs = [factor * per_chain(control_name or name, log) for log in control]
    count = sum(map(len, ours))
    if len(ours) == len(theirs) > 1:
        margins = [float(a.mean() - b.mean()) for a, b in zip(ours, theirs, strict=True)]
        return _estimate(name, _over_seeds(margins), count, "seeds")
    margin = statistics.less(_moment(ours), _moment(theirs))
    return _estimate(name, margin, count, "chains" if len(ours) == 1 else "seeds")


def beyond_luck(logs: Sequence[EpisodeLog], memoryless_logs: Sequence[EpisodeLog]) -> Estimate:
    """Returns the largest return of a chain less `null_max` of as many episodes, drawn as in `difference`.

    With one seed the largest returns count as at least as variable as luck makes them: few chains may happen to
    agree where the next would not. Of 8 to 32 chains without memory at most 3.5% give an interval above zero.
    """
    num_episodes = logs[0].returns.shape[1]
    ours = [per_chain("max", log) for log in logs]
    theirs = [np.asarray(log.returns, np.float64).ravel() for log in memoryless_logs]
    luck = [_expected_max(returns, num_episodes) for returns in theirs]
    count = sum(map(len, ours))
    if len(ours) == len(luck) > 1:
        margins = [float(a.mean()) - b.value for a, b in zip(ours, luck, strict=True)]
        return _estimate("max", _over_seeds(margins), count, "seeds")
    own, null = _moment(ours), luck[0] if len(luck) == 1 else _over_seeds([m.value for m in luck])
    if len(ours) == 1 and own.degrees > 0:
        spread = np.mean([_variance_of_max(returns, num_episodes) for returns in theirs])
        own = dataclasses.replace(own, variance=builtins.max(own.variance, float(spread) / len(ours[0])))
    return _estimate("max", statistics.less(own, null), count, "chains" if len(ours) == 1 else "seeds")


def _summary(protocol: str, groups: Sequence[Float[np.ndarray, "_"]]) -> Estimate:
    basis: Basis = "chains" if len(groups) == 1 else "seeds"
    return _estimate(protocol, _moment(groups), sum(map(len, groups)), basis)


def _estimate(protocol: str, found: Moment, count: int, basis: Basis) -> Estimate:
    return Estimate(found.value, *statistics.t_interval(found), count, protocol, basis)


def _moment(groups: Sequence[Float[np.ndarray, "_"]]) -> Moment:
    """Of the chains of one seed, or of the means of several."""
    if len(groups) == 1:
        return statistics.moment(groups[0])
    return _over_seeds([float(group.mean()) for group in groups])


def _over_seeds(values: Sequence[float]) -> Moment:
    return statistics.moment(np.asarray(values, np.float64))


def _expected_max(returns: Float[np.ndarray, "m"], num_episodes: int) -> Moment:
    size = len(returns)
    if not 1 <= num_episodes <= size:
        raise ValueError(
            f"num_episodes must be positive and no more than the control's episodes; got {num_episodes} of {size}. "
            "Use the episodes of a chain, and as many chains of the control as of the agent."
        )
    ordered = np.sort(returns)
    value = float(ordered @ _max_weights(size, num_episodes))
    if num_episodes == size:
        return Moment(value, math.nan, 0)
    # Without the k-th, those below it keep their rank, and those above move down by one.
    weights = _max_weights(size - 1, num_episodes)
    below = np.concatenate([[0.0], np.cumsum(ordered[:-1] * weights)])
    above = np.concatenate([[0.0], np.cumsum((ordered[1:] * weights)[::-1])])[::-1]
    return Moment(value, float((below + above).var()) * (size - 1), size - 1)


def _variance_of_max(returns: Float[np.ndarray, "m"], num_episodes: int) -> float:
    weights = _max_weights(len(returns), num_episodes)
    ordered = np.sort(returns)
    return float(weights @ (ordered - ordered @ weights) ** 2)


def _max_weights(size: int, num_episodes: int) -> Float[np.ndarray, "m"]:
    """The chance that each of the sorted returns is the largest of n drawn without replacement."""
    rank = np.arange(num_episodes, size + 1)
    ways = special.gammaln(rank) - special.gammaln(rank - num_episodes + 1) - special.gammaln(num_episodes)
    every = (
        special.gammaln(size + 1)
        - special.gammaln(size - num_episodes + 1)
        - special.gammaln(num_episodes + 1)
    )
    return np.concatenate([np.zeros(num_episodes - 1), np.exp(ways - every)])
