"""Plots of a report: loss, returns within the context, ablations, the data, calibration."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator, NullLocator

from bpt_rl.config import CHAIN_AGENTS
from bpt_rl.run import protocols, report_verdict
from bpt_rl.run.protocols import Estimate
from bpt_rl.run.report_groups import Group, Run, settings
from bpt_rl.run.report_numbers import ReportedNumber, count, format_return
from bpt_rl.run.report_svg import DASHES, SENTINEL, LegendEntry, Plot, figure_axes, series_entry, to_svg

_FOLLOWS_COUNT = (
    "data.num_trajectories",
    "evaluation.num_episodes",
    "evaluation.context.capacity",
    # A chain of more trajectories needs a longer context, and often fewer chains a batch.
    "data.context_length",
    "data.batch_size",
    "optimizer.accumulation",
)


def loss_curves(runs: Sequence[Run], groups: Sequence[Group]) -> Plot | None:
    """Returns training loss against gradient step, or None if no run logged any."""
    logged = [run for run in runs if any("loss" in line for line in run.metrics)]
    if not logged:
        return None
    looks = _looks(logged, groups)
    with figure_axes() as (figure, axes):
        lowest, highest = np.inf, -np.inf
        for run in logged:
            lines = [line for line in run.metrics if "loss" in line]
            step, loss = (np.array([line[key] for line in lines], np.float64) for key in ("step", "loss"))
            step, loss = _thin(step, loss)
            lowest, highest = min(lowest, np.nanmin(loss)), max(highest, np.nanmax(loss))
            style = looks[run.name].style | {"linewidth": 1.6, "markevery": max(1, len(step) // 6)}
            axes.plot(step, loss, **style)
        if lowest > 0 and highest > 10 * lowest:
            axes.set_yscale("log")
        axes.set(xlabel="gradient step", ylabel="training loss")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        svg = to_svg(figure, "loss")
    legend = list(dict.fromkeys(looks.values()))
    final = "Last logged values: " + ", ".join(f"{run.name} {_last_loss(run):.4g}" for run in logged)
    return Plot(
        svg,
        "Training loss",
        f"Training loss against gradient step. {final}.",
        "One line a run." if len(logged) > 4 else f"One line a run. {final}.",
        legend,
    )


def episode_curve(group: Group, index: int | str) -> Plot | None:
    """Returns return against episode index within the context, or None if a context holds one episode."""
    longest = group.evaluation["num_episodes"]
    if longest < 2:
        return None
    looks = {
        "chain": LegendEntry(group.chain_title.lower(), "chain", "solid", "o"),
        "memoryless": LegendEntry("memoryless control", "memoryless", "dashed", "s"),
    }
    legend, alt = [], []
    with figure_axes() as (figure, axes):
        for name, look in looks.items():
            if logs := group.logs(name):
                estimates = protocols.curves(logs)
                curve(axes, estimates, look, longest)
                legend.append(look)
                alt.append(f"{look.label} goes from {_words(estimates[0])} to {_words(estimates[-1])}")
        for number, look in _references(group):
            axes.axhline(
                number.value, color=SENTINEL[look.variable], linestyle=DASHES[look.dash], linewidth=1.8
            )
            legend.append(look)
            alt.append(look.label)
        episode_axis(axes, longest)
        svg = to_svg(figure, f"episodes{index}")
    return Plot(
        svg,
        group.title,
        f"Return at each episode of the context, {group.title}: {'; '.join(alt)}.",
        f"Mean over chains at each episode; bands are pointwise 95% t intervals. {_sample(group)}.",
        legend,
    )


MANY_EPISODES = 16
"""More of them are drawn over a logarithmic axis, marked at powers of two: short contexts stay apart beside them."""


def curve(axes: Any, estimates: Sequence[Estimate], look: LegendEntry, longest: int) -> None:
    """Draws the return at each episode of a context, with a band where there are intervals.

    Args:
      axes: Those of `episode_axis`.
      estimates: One an episode.
      look: Of the line.
      longest: Episodes of the longest context in the plot.
    """
    x = np.arange(1, len(estimates) + 1)
    if estimates[0].has_interval:
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(x, low, high, color=SENTINEL[look.variable], alpha=0.16, linewidth=0)
    marked = [i - 1 for i in _powers_of_two(len(x))] if longest > MANY_EPISODES else 1
    axes.plot(x, [e.value for e in estimates], **look.style, markevery=marked)


def episode_axis(axes: Any, longest: int) -> None:
    """Makes a plot one over the episodes of contexts, the longest of which has `longest`."""
    axes.set(xlabel="episode within the context", ylabel="return")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if longest > MANY_EPISODES:
        _logarithmic(axes, _powers_of_two(longest))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def _logarithmic(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _powers_of_two(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def ablations(groups: Sequence[Group]) -> list[Plot]:
    """Returns two plots over the number of trajectories for each of `families`."""
    found = []
    for index, family in enumerate(families(groups)):
        found += count_plots([(g.config.data.num_trajectories, g) for g in family], f"family{index}")
    return found


LOOKS = {
    "mean": LegendEntry("mean, context kept", "chain", "solid", "o"),
    "last": LegendEntry("last, context kept", "s5", "dashed", "s"),
    "memoryless": LegendEntry("mean, memoryless control", "memoryless", "dotted", "D"),
    "max": LegendEntry("largest of the context", "chain", "solid", "o"),
    "null": LegendEntry("null max: luck alone", "null", "dashed", "s"),
}
"""Of what is read of chains and of their memoryless controls."""


def error_bars(axes: Any, x: Float[np.ndarray, "N"], estimates: Sequence[Estimate], **style: Any) -> None:
    """Draws N values with their intervals; bare marks where there is none."""
    values = np.array([e.value for e in estimates])
    reach = np.abs(np.array([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]))
    axes.errorbar(x, values, np.nan_to_num(reach), elinewidth=1.4, **style)


def count_plots(family: Sequence[tuple[int, Group]], prefix: str) -> list[Plot]:
    """Returns mean and last, and the largest beside luck, over the number of trajectories.

    Args:
      family: Groups with their numbers of trajectories, alike in all else.
      prefix: Of the figures' ids.
    """
    lines: dict[str, list[tuple[int, Estimate]]] = {}
    samples = "; ".join(f"n={size}: {_sample(group)}" for size, group in family)
    for size, group in family:
        chain, control = group.logs("chain"), group.memoryless_logs()
        lines.setdefault("mean", []).append((size, protocols.estimate("mean", chain)))
        lines.setdefault("last", []).append((size, protocols.estimate("last", chain)))
        lines.setdefault("max", []).append((size, protocols.estimate("max", chain)))
        if control:
            lines.setdefault("memoryless", []).append((size, protocols.estimate("mean", control)))
            null = protocols.null_max_of(control, group.evaluation["num_episodes"])
            lines.setdefault("null", []).append((size, null))
    plots = []
    for names, title in (
        (("mean", "last", "memoryless"), "Mean and last"),
        (("max", "null"), "Largest and luck"),
    ):
        shown = {name: lines[name] for name in names if name in lines}
        plot = _ablation(shown, title, f"{prefix}-{names[0]}")
        plots.append(dataclasses.replace(plot, caption=f"Bars are 95% t intervals. {samples}."))
    return plots


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """Returns sets of groups of chains that differ by their trajectory count and what must follow it alone."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.config.agent in CHAIN_AGENTS:
            rest = {k: v for k, v in settings(group.runs[0]).items() if k not in _FOLLOWS_COUNT}
            found.setdefault(repr(rest), []).append(group)
    return [f for f in found.values() if len({g.config.data.num_trajectories for g in f}) >= 2]


def calibration(group: Group, index: int) -> Plot | None:
    """Returns the mean return obtained against the return asked for, or None if no other target was tried."""
    sweep = group.sweep
    if not sweep:
        return None
    targets = np.array([target for target, _ in sweep])
    estimates = [protocols.estimate("mean", logs) for _, logs in sweep]
    look = LegendEntry("mean return obtained", "chain", "solid", "o")
    ideal = LegendEntry("obtained equals asked", "muted", "dashed")
    legend = [look, ideal]
    with figure_axes() as (figure, axes):
        if statistics := group.runs[0].statistics:
            low, high = min(statistics.returns), max(statistics.returns)
            axes.axvspan(low, high, color=SENTINEL["data"], alpha=0.12, linewidth=0)
            span = f"returns of the data, {format_return(low)} to {format_return(high)}"
            legend.append(LegendEntry(span, "data", "box"))
        ends = np.array([min(0.0, targets.min()), targets.max()])
        axes.plot(ends, ends, **ideal.style)
        error_bars(axes, targets, estimates, capsize=3, **look.style)
        axes.set(xlabel="return asked for", ylabel="return obtained")
        svg = to_svg(figure, f"calibration{index}")
    words = "; ".join(
        f"asked {format_return(target)}, got {_words(e)}"
        for target, e in zip(targets, estimates, strict=True)
    )
    log = sweep[0][1][0]
    sizes = f"{count(log.returns.shape[1], 'episode')} a chain, {count(len(log.returns), 'chain')}"
    subset = f"{count(len(group.runs), 'seed')}, subset {group.evaluation['data']['subset']}"
    subset += _failed(len(group.sweep_failures()))
    return Plot(
        svg,
        group.title,
        f"Return asked for and mean return obtained, {group.title}: {words}.",
        f"Mean return of the episodes that asked for each target; bars are 95% t intervals. {sizes}, {subset}.",
        legend,
    )


def histogram(runs: Sequence[Run], groups: Sequence[Group]) -> Plot | None:
    """Returns the distribution of the data's returns with the agents' means, or None without statistics."""
    statistics = next((run.statistics for run in runs if run.statistics), None)
    if statistics is None:
        return None
    returns = np.asarray(statistics.returns, np.float64)
    means = {g.short_title: n for g in groups if (n := report_verdict.number(g, "mean", "chain"))}
    random = report_verdict.number(groups[0], "mean", "random") if groups else None
    legend = [LegendEntry(f"data, {len(returns):,} episodes", "muted", "box")]
    samples = f"Subset {groups[0].evaluation['data']['subset']}" if groups else "Not evaluated"
    with figure_axes() as (figure, axes):
        bins = np.histogram_bin_edges(returns, bins=min(50, max(10, int(np.sqrt(len(returns))))))
        axes.hist(returns, bins=bins, color=SENTINEL["muted"], alpha=0.4)
        if random:
            axes.axvline(random.value, color=SENTINEL["random"], linestyle=DASHES["dashed"])
            legend.append(LegendEntry(f"random policy {random.text}", "random", "dashed"))
        top = axes.get_ylim()[1]
        for index, (title, number) in enumerate(means.items()):
            look = series_entry(f"{title} {number.text}", index)
            style = look.style | {"markevery": [1]}
            axes.plot([number.value, number.value], [0, top * (1 - 0.06 * (index % 5))], **style)
            legend.append(look)
        axes.set(xlabel="return of an episode", ylabel="episodes of the data")
        axes.grid(axis="x", visible=False)
        svg = to_svg(figure, "histogram")
    reached = ", ".join(f"{title} {number.text}" for title, number in means.items())
    spread = f"from {format_return(returns.min())} to {format_return(returns.max())}"
    return Plot(
        svg,
        "Returns of the data",
        f"Returns of {len(returns)} episodes of data, {spread}. Agents: {reached or 'none evaluated'}.",
        f"Bars: episodes of the training data. Lines: mean returns, with 95% intervals. {samples}.",
        legend,
    )


def _references(group: Group) -> list[tuple[ReportedNumber, LegendEntry]]:
    data = report_verdict.data_number(group, "mean")
    found = [(data, LegendEntry(f"data mean {data.text}", "data", "dotted"))]
    if random := report_verdict.number(group, "mean", "random"):
        found.append((random, LegendEntry(f"random policy {random.text}", "random", "dashdot")))
    return found


def _words(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return f"{format_return(estimate.value)} (one sample, no interval)"
    return f"{format_return(estimate.value)} [{format_return(estimate.low)}, {format_return(estimate.high)}]"


def _sample(group: Group) -> str:
    evaluation = group.evaluation
    sizes = f"{count(evaluation['num_chains'], 'chain')}, {count(len(group.runs), 'seed')}"
    num_failures = len(group.failures("chain")) + len(group.failures("memoryless"))
    return f"{sizes}, subset {evaluation['data']['subset']}{_failed(num_failures)}"


def _failed(number: int) -> str:
    return f"; {count(number, 'episode')} ended by the simulator" if number else ""


def _looks(runs: Sequence[Run], groups: Sequence[Group]) -> Mapping[str, LegendEntry]:
    # Runs of a group share its look; a run without an evaluation has one of its own.
    found = {run.name: series_entry(g.short_title, i) for i, g in enumerate(groups) for run in g.runs}
    alone = [run for run in runs if run.name not in found]
    found |= {run.name: series_entry(run.name, len(groups) + i) for i, run in enumerate(alone)}
    return {run.name: found[run.name] for run in runs}


def _last_loss(run: Run) -> float:
    return next(line["loss"] for line in reversed(run.metrics) if "loss" in line)


def _thin(
    step: Float[np.ndarray, "n"], loss: Float[np.ndarray, "n"], most: int = 400
) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    if len(step) <= most:
        return step, loss
    parts = np.array_split(np.arange(len(step)), most)
    return np.array([step[p].mean() for p in parts]), np.array([loss[p].mean() for p in parts])


def _ablation(lines: Mapping[str, Sequence[tuple[int, Estimate]]], title: str, prefix: str) -> Plot:
    alt = []
    with figure_axes() as (figure, axes):
        for position, (name, points) in enumerate(lines.items()):
            look = LOOKS[name]
            # Neighbouring lines are set apart by a few percent, else their error bars hide each other.
            x = np.array([size for size, _ in points]) * (1 + 0.03 * (position - (len(lines) - 1) / 2))
            error_bars(axes, x, [e for _, e in points], **look.style)
            values = ", ".join(f"{_words(e)} at {size}" for size, e in points)
            alt.append(f"{look.label}: {values}")
        counts = sorted({size for points in lines.values() for size, _ in points})
        _logarithmic(axes, counts)
        axes.set(xlabel="trajectories in context", ylabel="return")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        svg = to_svg(figure, prefix)
    words = f"Return against trajectories in context. {'; '.join(alt)}."
    return Plot(svg, title, words, "", [LOOKS[name] for name in lines])
