"""Groups of a grid against each other: how much better, and how much of that the context accounts for."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from bpt_rl.run import protocols, statistics
from bpt_rl.run.protocols import Basis, Estimate
from bpt_rl.run.report_groups import Group
from bpt_rl.run.report_numbers import ReportedNumber, reported
from bpt_rl.run.report_verdict import judged
from bpt_rl.run.statistics import Moment
from bpt_rl.types import EpisodeLog


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """A group less a base, by the last episode if one of them keeps several in context, else by their mean."""

    protocol: str
    gain: ReportedNumber
    """Context kept."""
    control: ReportedNumber | None
    """The memoryless controls of both; None if one was not rolled out."""
    by_context: ReportedNumber | None
    """What keeping the context brings the group, less what it brings the base: the gain less the control's."""


def contrast(group: Group, base: Group) -> Contrast:
    """Returns how a group differs from a base, with 95% intervals, paired by seed where both have the same."""
    titles = (
        f"{group.short_title} less {base.short_title}",
        "memoryless controls' difference",
        "difference less that of the memoryless controls",
    )
    return _compared([group, base], np.array([1.0, -1.0]), titles)


def per_doubling(groups: Sequence[Group], counts: Sequence[int]) -> Contrast:
    """Returns what each doubling of the trajectories brings, by least squares over all counts, with 95% intervals.

    Where every group has the same number of seeds, two at least, a seed gives one slope and slopes are the sample; else
    the groups count as independent.

    Args:
      groups: Of the same settings but for their number of trajectories; two at least.
      counts: That number of each.
    """
    place = np.log2(np.asarray(counts, np.float64))
    place -= place.mean()
    titles = (
        "a doubling",
        "memoryless controls' doubling",
        "a doubling less that of the memoryless controls",
    )
    return _compared(groups, place / (place @ place), titles)


def _compared(
    groups: Sequence[Group], weights: Float[np.ndarray, "groups"], titles: tuple[str, str, str]
) -> Contrast:
    """Returns a weighted sum over groups: context kept, memoryless controls, and the one less the other."""
    name = judged(next((group for group in groups if group.has_memory), groups[0]))
    kept = [group.logs("chain") for group in groups]
    cleared = [group.memoryless_logs() for group in groups]
    if not all(kept):
        raise ValueError("A contrast needs the log `chain` of every group; one has none. Evaluate it again.")
    count = sum(log.returns.shape[0] for log in kept[0])
    basis: Basis = "chains" if len(kept[0]) == 1 else "seeds"

    def shown(found: Moment, title: str) -> ReportedNumber:
        estimate = Estimate(found.value, *statistics.t_interval(found), count, name, basis)
        return _reported(groups, estimate, f"{name}, {title}")

    gain, control, by_context = titles
    has_control = all(cleared)
    return Contrast(
        protocol=name,
        gain=shown(_weighted(name, weights, kept), gain),
        control=shown(_weighted(name, weights, cleared), control) if has_control else None,
        by_context=shown(_weighted_context(name, weights, groups), by_context) if has_control else None,
    )


def _weighted(
    name: str, weights: Float[np.ndarray, "groups"], logs: Sequence[Sequence[EpisodeLog]]
) -> Moment:
    if _is_paired(logs):
        return statistics.moment(weights @ _levels(name, logs))
    return statistics.weighted([_moment(name, some) for some in logs], weights.tolist())


def _weighted_context(name: str, weights: Float[np.ndarray, "groups"], groups: Sequence[Group]) -> Moment:
    kept, cleared = ([group.logs("chain") for group in groups], [group.memoryless_logs() for group in groups])
    if _is_paired([*kept, *cleared]):
        return statistics.moment(weights @ (_levels(name, kept) - _levels(name, cleared)))
    # An agent without memory is its own control: there is no difference, and nothing to be uncertain of.
    parts = [
        statistics.less(_moment(name, ours), _moment(name, theirs))
        if group.has_memory
        else Moment(0.0, 0.0, math.inf)
        for group, ours, theirs in zip(groups, kept, cleared, strict=True)
    ]
    return statistics.weighted(parts, weights.tolist())


def _is_paired(logs: Sequence[Sequence[EpisodeLog]]) -> bool:
    """Returns whether there are several seeds, and of each group equally many."""
    return len({len(some) for some in logs}) == 1 and len(logs[0]) > 1


def _levels(name: str, logs: Sequence[Sequence[EpisodeLog]]) -> Float[np.ndarray, "groups seeds"]:
    return np.array([[_level(name, log) for log in some] for some in logs])


def _level(name: str, log: EpisodeLog) -> float:
    return float(protocols.per_chain(name, log).mean())


def _moment(name: str, logs: Sequence[EpisodeLog]) -> Moment:
    if len(logs) == 1:
        return statistics.moment(protocols.per_chain(name, logs[0]))
    return statistics.moment(np.array([_level(name, log) for log in logs]))


def _reported(groups: Sequence[Group], estimate: Estimate, title: str) -> ReportedNumber:
    """Returns an estimate with its label; of evaluations that differ, the first one's size."""
    subsets = dict.fromkeys(str(group.evaluation["data"]["subset"]) for group in groups)
    return reported(
        estimate,
        subset=" and ".join(subsets),
        num_seeds=min(len(group.runs) for group in groups),
        num_chains=groups[0].evaluation["num_chains"],
        num_episodes=groups[0].evaluation["num_episodes"],
        protocol=title,
        num_failures=sum(len(group.failures(name)) for group in groups for name in ("chain", "memoryless")),
        signed=True,
    )


def scores(group: Group) -> dict[int, Float[np.ndarray, "C"]]:
    """Returns what the protocol that a group is judged by reads from each chain, by training seed."""
    name = judged(group)
    logs = group.logs("chain")
    return {
        run.config.seed: protocols.per_chain(name, log) for run, log in zip(group.runs, logs, strict=True)
    }
