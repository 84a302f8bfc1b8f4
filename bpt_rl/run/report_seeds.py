"""What seeds say of one agent against another: interquartile means and probabilities of improvement."""

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from bpt_rl.run import protocols, report_verdict, statistics
from bpt_rl.run.report_groups import Group
from bpt_rl.run.report_numbers import Interval, ReportedNumber, count
from bpt_rl.run.report_tables import NOTHING, number_cell, row, table

MIN_SEEDS = 3
"""Fewer say nothing of the spread between them that could be trusted."""


def seeds(groups: Sequence[Group]) -> str:
    """Returns the table of the groups that have at least three seeds, or nothing if there are not two of them."""
    shown = [group for group in groups if len(group.runs) >= MIN_SEEDS]
    if len(shown) < 2:
        return ""
    # One scale for all, that of the group which the verdict is about.
    references = _references(report_verdict.subject(shown))
    rows = [_row(group, shown, references) for group in shown]
    head = [
        "Policy",
        "Interquartile mean",
        "Normalised",
        *(html.escape(f"Above {g.short_title}") for g in shown),
    ]
    scale = f"Normalised: {references.label}. " if references else ""
    fewest = min(len(group.runs) for group in shown)
    note = (
        "The score of a seed is its mean over chains, of the last episode where a context holds several and of all "
        "episodes elsewhere. Interquartile mean: of the middle half of the seeds; of three, their mean. "
        f"{scale}Above: how often a seed of the row scores above one of the column, a tie counting half. With "
        f"{count(fewest, 'seed')} the bootstrap interval of the interquartile mean is too short: on one task it "
        "covers the truth about 75% of the time with 3 seeds, 90% with 5, 94% with 10. Trust the t interval of the "
        "table of returns before it."
    )
    return f'{table("Seeds", "plain seeds", head, ["".join(rows)])}<p class="note">{html.escape(note)}</p>'


def scores(group: Group) -> Float[np.ndarray, "seeds 1"]:
    """Returns each seed's score: its mean over chains of the protocol that the group is judged by."""
    name = report_verdict.judged(group)
    return np.array([[protocols.per_chain(name, log).mean()] for log in group.logs("chain")])


def _row(group: Group, everyone: Sequence[Group], references: statistics.References | None) -> str:
    normalised = _normalised(group, references) if references else None
    cells = [number_cell(_middle(group), "Interquartile mean"), number_cell(normalised, "Normalised")]
    for other in everyone:
        label = f"Above {other.short_title}"
        cells.append(NOTHING if other is group else number_cell(_above(group, other), label))
    return row(group.title, cells, count(len(group.runs), "seed"))


def _middle(group: Group) -> ReportedNumber:
    found = scores(group)
    bounds = statistics.stratified_interval(statistics.interquartile_mean, found)
    protocol = f"interquartile mean over seeds of {report_verdict.judged(group)}"
    value = float(statistics.interquartile_mean(found))
    return _number(group, protocol, value, bounds, "resampled seeds")


def _normalised(group: Group, references: statistics.References) -> ReportedNumber:
    found = statistics.NormalizedScores(raw=scores(group), references=[references]).scores
    bounds = statistics.stratified_interval(statistics.interquartile_mean, found)
    protocol = (
        f"interquartile mean over seeds of {report_verdict.judged(group)}, normalised ({references.label})"
    )
    value = float(statistics.interquartile_mean(found))
    return _number(group, protocol, value, bounds, "resampled seeds")


def _references(group: Group) -> statistics.References | None:
    random = report_verdict.number(group, "mean", "random")
    best = report_verdict.data_number(group, "best")
    if random is None or not random.value < best.value:
        return None
    return statistics.References(
        zero=random.value,
        zero_name="mean of uniform-random actions",
        one=best.value,
        one_name=f"best episode of subset {best.subset}",
    )


def _above(group: Group, other: Group) -> ReportedNumber:
    value, bounds = statistics.probability_of_improvement(scores(group), scores(other))
    protocol = (
        f"probability of improvement, {report_verdict.judged(group)}, over {other.short_title} "
        f"({report_verdict.judged(other)}, {count(len(other.runs), 'seed')})"
    )
    return _number(group, protocol, value, bounds, "pairs of seeds", other)


def _number(
    group: Group,
    protocol: str,
    value: float,
    bounds: statistics.Interval,
    interval: Interval,
    other: Group | None = None,
) -> ReportedNumber:
    concerned = [group, other] if other else [group]
    subsets = dict.fromkeys(str(g.evaluation["data"]["subset"]) for g in concerned)
    return ReportedNumber(
        value=value,
        low=bounds[0],
        high=bounds[1],
        protocol=protocol,
        subset=" and ".join(subsets),
        num_seeds=len(group.runs),
        num_chains=group.evaluation["num_chains"],
        num_episodes=group.evaluation["num_episodes"],
        interval=interval,
        num_failures=sum(len(g.failures("chain")) for g in concerned),
    )
