"""Plots of a grid: curves within the context for each number of trajectories, interactions of axes, costs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bpt_rl.run import protocols, statistics
from bpt_rl.run.ablation_contrast import scores
from bpt_rl.run.ablation_groups import COUNT, TASK, Axis, CellGroup, family_title
from bpt_rl.run.protocols import Estimate
from bpt_rl.run.report_numbers import count, format_return
from bpt_rl.run.report_plots import curve, episode_axis, error_bars
from bpt_rl.run.report_svg import Plot, figure_axes, series_entry, to_svg
from bpt_rl.run.report_verdict import judged


def curves_by_count(family: Sequence[CellGroup], prefix: str) -> Plot | None:
    """Returns return against episode within the context, a line a number of trajectories; None if none has two."""
    members = [(f"{member.values[COUNT]} trajectories", member) for member in family]
    return curves(members, family_title(family), prefix)


def curves(members: Sequence[tuple[str, CellGroup]], title: str, prefix: str) -> Plot | None:
    """Returns return against episode within the context, a line a group; None if none has two episodes.

    Args:
      members: Groups, each with its name in the legend.
      title: Of what they have in common.
      prefix: Of the figure's ids.
    """
    shown = [(name, group) for name, group in members if group.group.evaluation["num_episodes"] > 1]
    if not shown:
        return None
    longest = max(group.group.evaluation["num_episodes"] for _, group in shown)
    legend, alt = [], []
    with figure_axes() as (figure, axes):
        for index, (name, member) in enumerate(shown):
            look = series_entry(name, index)
            estimates = protocols.curves(member.group.logs("chain"))
            curve(axes, estimates, look, longest)
            legend.append(look)
            alt.append(f"{look.label} from {words(estimates[0])} to {words(estimates[-1])}")
        episode_axis(axes, longest)
        svg = to_svg(figure, prefix)
    alt_words = f"Return at each episode of the context, {title}: {'; '.join(alt)}."
    sample = sample_words([group for _, group in shown])
    return Plot(
        svg, title, alt_words, f"Context kept; bands are pointwise 95% t intervals. {sample}.", legend
    )


def interactions(groups: Sequence[CellGroup], axes: Sequence[Axis], prefix: str) -> Iterator[Plot | None]:
    """Yields a plot for each pair of axes that both vary; with the number of trajectories if that varies.

    Args:
      groups: Of one task; controls do not count.
      axes: Of the grid; those of task and seed do not count.
      prefix: Of the figures' ids.
    """
    groups = [group for group in groups if not group.change]
    varying = [
        axis
        for axis in axes
        if axis.name != TASK and len({repr(g.values[axis.name]) for g in groups if axis.name in g.values}) > 1
    ]
    counts = [axis for axis in varying if axis.name == COUNT]
    others = [axis for axis in varying if axis.name != COUNT]
    pairs = [(counts[0], other) for other in others] if counts else itertools.combinations(others, 2)
    for index, (x, lines) in enumerate(pairs):
        yield _interaction(groups, x, lines, f"{prefix}{index}")


def _interaction(groups: Sequence[CellGroup], x: Axis, lines: Axis, prefix: str) -> Plot | None:
    names = (x.name, lines.name)
    both = [group for group in groups if all(name in group.values for name in names)]
    # Of each point of the plot, its groups by the values of all other axes.
    points: dict[tuple[str, str], dict[str, CellGroup]] = {}
    for group in both:
        rest = repr({name: value for name, value in group.values.items() if name not in names})
        key = (str(group.values[x.name]), str(group.values[lines.name]))
        points.setdefault(key, {})[rest] = group
    if not points:
        return None
    # Means over different sets of settings could not be compared.
    shared = set.intersection(*(set(point) for point in points.values()))
    marks, series = (list(dict.fromkeys(key[i] for key in points)) for i in (0, 1))
    if not shared or len(marks) < 2 or len(series) < 2:
        return None
    legend, alt = [], []
    with figure_axes() as (figure, axes):
        for index, line in enumerate(series):
            look = series_entry(f"{lines.title} {line}", index)
            at = [i for i, mark in enumerate(marks) if (mark, line) in points]
            estimates = [_mean([points[marks[i], line][rest] for rest in sorted(shared)]) for i in at]
            # Neighbouring lines are set apart, else their error bars hide each other.
            places = np.array(at) + 0.06 * (index - (len(series) - 1) / 2)
            error_bars(axes, places, estimates, **look.style)
            legend.append(look)
            told = ", ".join(f"{words(e)} at {marks[i]}" for i, e in zip(at, estimates, strict=True))
            alt.append(f"{look.label}: {told}")
        axes.set_xticks(range(len(marks)), marks)
        axes.set(xlabel=x.title, ylabel="return")
        svg = to_svg(figure, prefix)
    title = f"{x.title[0].upper()}{x.title[1:]} and {lines.title}"
    caption = f"Last episode of a context of several, else the mean of the episodes. {sample_words(both)}."
    if len(shared) > 1:
        caption += f" Each point is the mean over {len(shared)} settings of the other axes."
    return Plot(svg, title, f"Return against {x.title}. {'; '.join(alt)}.", caption, legend)


def _mean(groups: Sequence[CellGroup]) -> Estimate:
    """Returns the mean over groups of the protocol they are judged by; over seeds if they share several."""
    name = judged(groups[0].group)
    found = [scores(member.group) for member in groups]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found)))
    if len(seeds) > 1:
        per_seed = [np.mean([by_seed[seed].mean() for by_seed in found]) for seed in seeds]
        moment = statistics.moment(np.array(per_seed))
        return Estimate(moment.value, *statistics.t_interval(moment), len(seeds), name, "seeds")
    if len(groups) == 1:
        return protocols.estimate(name, groups[0].group.logs("chain"))
    value = float(np.mean([np.mean([c.mean() for c in by_seed.values()]) for by_seed in found]))
    return Estimate(value, *statistics.NO_INTERVAL, len(groups), name)


def cost_plot(members: Mapping[str, Sequence[CellGroup]], prefix: str) -> Plot | None:
    """Returns the time of a training against the number of trajectories, a line a family; None without families."""
    if not members:
        return None
    legend, alt = [], []
    with figure_axes() as (figure, axes):
        marks = sorted({int(g.values[COUNT]) for family in members.values() for g in family})
        for index, (title, family) in enumerate(members.items()):
            look = series_entry(title, index)
            values = [mean_cost(group, "training_seconds") or 0.0 for group in family]
            axes.plot([marks.index(int(g.values[COUNT])) for g in family], values, **look.style)
            legend.append(look)
            told = ", ".join(
                f"{value:.3g} s at {g.values[COUNT]}" for g, value in zip(family, values, strict=True)
            )
            alt.append(f"{look.label}: {told}")
        axes.set_xticks(range(len(marks)), [str(mark) for mark in marks])
        axes.set_ylim(bottom=0.0)
        axes.set(xlabel="trajectories in context", ylabel="seconds of a training")
        svg = to_svg(figure, prefix)
    alt_words = f"Seconds of a training against trajectories in context. {'; '.join(alt)}."
    return Plot(svg, "Time of a training", alt_words, "Mean over seeds, compilation included.", legend)


def mean_cost(group: CellGroup, name: str) -> float | None:
    """Returns the mean over cells of what is known of a cost; None if nothing is. Shared time is divided."""
    known: list[Any] = [cost for cost in group.costs if cost[name] is not None]
    if not known:
        return None
    shared = [cost["trained_together"] if name == "training_seconds" else 1 for cost in known]
    return float(np.mean([cost[name] / number for cost, number in zip(known, shared, strict=True)]))


def words(estimate: Estimate) -> str:
    """Returns a value with its interval."""
    if not estimate.has_interval:
        return f"{format_return(estimate.value)} (no interval)"
    return f"{format_return(estimate.value)} [{format_return(estimate.low)}, {format_return(estimate.high)}]"


def sample_words(groups: Sequence[CellGroup]) -> str:
    """Returns the chains, seeds and subsets of several groups."""
    seeds = sorted({len(group.group.runs) for group in groups})
    chains = sorted({group.group.evaluation["num_chains"] for group in groups})
    subsets = dict.fromkeys(str(group.group.evaluation["data"]["subset"]) for group in groups)
    numbers = f"{_span(chains, 'chain')}, {_span(seeds, 'seed')}"
    return f"{numbers}, subset {' and '.join(subsets)}"


def _span(numbers: Sequence[int], noun: str) -> str:
    if numbers[0] == numbers[-1]:
        return count(numbers[0], noun)
    return f"{numbers[0]} to {count(numbers[-1], noun)}"
