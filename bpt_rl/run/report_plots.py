"""Plots of a report as inline SVG in the page's colour variables: they follow its light or dark theme."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from bpt_rl.run import protocols, report_verdict
from bpt_rl.run.protocols import Estimate
from bpt_rl.run.report_groups import Group, Run, settings
from bpt_rl.run.report_numbers import ReportedNumber, count, format_return

# Matplotlib knows no CSS variables: each stands in the figure as a colour that nothing else has.
_ROLES = ("ink", "muted", "grid", "chain", "memoryless", "random", "data", "null")
NUM_SERIES = 7
_SENTINEL = {name: f"#00a1{i:02x}" for i, name in enumerate((*_ROLES, *(f"s{i}" for i in range(NUM_SERIES))))}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "axes.edgecolor": _SENTINEL["grid"],
    "axes.labelcolor": _SENTINEL["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _SENTINEL["grid"],
    "ytick.color": _SENTINEL["grid"],
    "xtick.labelcolor": _SENTINEL["muted"],
    "ytick.labelcolor": _SENTINEL["muted"],
    "grid.color": _SENTINEL["grid"],
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}
_DASHES = {"solid": "-", "dashed": (0, (5, 3)), "dotted": (0, (1.2, 2.2))}
_MARKERS = "osD^vPX"
_FOLLOWS_COUNT = (
    "data.num_trajectories",
    "evaluation.num_episodes",
    # A chain of more trajectories needs a longer context, and often fewer chains a batch.
    "data.context_length",
    "data.batch_size",
    "optimizer.accumulation",
)


@dataclasses.dataclass(frozen=True)
class LegendEntry:
    """A line's name and look."""

    label: str
    variable: str
    """CSS variable of its colour, without the dashes."""
    dash: str = "solid"


@dataclasses.dataclass(frozen=True)
class Plot:
    """An SVG and the words that go with it."""

    svg: str
    title: str
    alt: str
    caption: str
    legend: Sequence[LegendEntry]


def loss_curves(runs: Sequence[Run], groups: Sequence[Group]) -> Plot | None:
    """Returns training loss against gradient step, or None if no run logged any."""
    logged = [run for run in runs if any("loss" in line for line in run.metrics)]
    if not logged:
        return None
    colours = _colours(logged, groups)
    with _figure() as (figure, axes):
        lowest, highest = np.inf, -np.inf
        for run in logged:
            lines = [line for line in run.metrics if "loss" in line]
            step, loss = (np.array([line[key] for line in lines], np.float64) for key in ("step", "loss"))
            step, loss = _thin(step, loss)
            lowest, highest = min(lowest, np.nanmin(loss)), max(highest, np.nanmax(loss))
            axes.plot(step, loss, color=_SENTINEL[colours[run.name][1]], linewidth=1.6, alpha=0.9)
        if lowest > 0 and highest > 10 * lowest:
            axes.set_yscale("log")
        axes.set(xlabel="gradient step", ylabel="training loss")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        svg = _svg(figure, "loss")
    used = {colours[run.name] for run in logged}
    legend = [LegendEntry(*colour) for colour in dict.fromkeys(colours.values()) if colour in used]
    final = "Last logged values: " + ", ".join(f"{run.name} {_last_loss(run):.4g}" for run in logged)
    return Plot(
        svg,
        "Training loss",
        f"Training loss against gradient step. {final}.",
        "One line a run." if len(logged) > 4 else f"One line a run. {final}.",
        legend,
    )


def episode_curve(group: Group, index: int) -> Plot | None:
    """Returns return against episode index within the context, or None if a context holds one episode."""
    if group.evaluation["num_episodes"] < 2:
        return None
    curves = {name: protocols.curves(logs) for name in ("chain", "memoryless") if (logs := group.logs(name))}
    legend, alt = [], []
    with _figure() as (figure, axes):
        for name, marker in (("chain", "o"), ("memoryless", "s")):
            if name not in curves:
                continue
            _band(axes, curves[name], name, marker)
            label = "memoryless control" if name == "memoryless" else group.chain_title.lower()
            legend.append(LegendEntry(label, name))
            alt.append(f"{label} goes from {_words(curves[name][0])} to {_words(curves[name][-1])}")
        for number, label, variable, dash in _references(group):
            axes.axhline(number.value, color=_SENTINEL[variable], linestyle=_DASHES[dash], linewidth=1.8)
            legend.append(LegendEntry(f"{label} {number.text}", variable, dash))
            alt.append(f"{label} is {number.text}")
        axes.set(xlabel="episode within the context", ylabel="return")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        svg = _svg(figure, f"episodes{index}")
    return Plot(
        svg,
        group.title,
        f"Return at each episode of the context, {group.title}: {'; '.join(alt)}.",
        f"Mean over chains at each episode; bands are pointwise 95% bootstrap intervals. {_sample(group)}.",
        legend,
    )


def ablations(groups: Sequence[Group]) -> list[Plot]:
    """Returns two plots over the number of trajectories for each of `families`."""
    plots = []
    for index, family in enumerate(families(groups)):
        lines: dict[str, list[tuple[int, Estimate]]] = {}
        samples = "; ".join(f"n={g.config.data.num_trajectories}: {_sample(g)}" for g in family)
        for group in family:
            size = group.config.data.num_trajectories
            chain, control = group.logs("chain"), group.memoryless_logs()
            lines.setdefault("mean", []).append((size, protocols.estimate("mean", chain)))
            lines.setdefault("last", []).append((size, protocols.estimate("last", chain)))
            lines.setdefault("max", []).append((size, protocols.estimate("max", chain)))
            if control:
                lines.setdefault("memoryless", []).append((size, protocols.estimate("mean", control)))
                null = protocols.null_max_of(control, group.evaluation["num_episodes"])
                lines.setdefault("null", []).append((size, null))
        looks = {
            "mean": LegendEntry("mean, context kept", "chain"),
            "last": LegendEntry("last, context kept", "s5", "dashed"),
            "memoryless": LegendEntry("mean, memoryless control", "memoryless", "dotted"),
            "max": LegendEntry("largest of the context", "chain"),
            "null": LegendEntry("null max: luck alone", "null", "dashed"),
        }
        for names, title in (
            (("mean", "last", "memoryless"), "Mean and last"),
            (("max", "null"), "Largest and luck"),
        ):
            shown = {name: lines[name] for name in names if name in lines}
            caption = f"Bars are 95% bootstrap intervals. {samples}."
            plot = _ablation(shown, looks, title, f"family{index}-{names[0]}")
            plots.append(dataclasses.replace(plot, caption=caption))
    return plots


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """Returns sets of AT groups that differ by their trajectory count and what must follow it alone."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.config.agent == "at":
            rest = {k: v for k, v in settings(group.runs[0]).items() if k not in _FOLLOWS_COUNT}
            found.setdefault(repr(rest), []).append(group)
    return [f for f in found.values() if len({g.config.data.num_trajectories for g in f}) >= 2]


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
    with _figure() as (figure, axes):
        bins = np.histogram_bin_edges(returns, bins=min(50, max(10, int(np.sqrt(len(returns))))))
        axes.hist(returns, bins=bins, color=_SENTINEL["muted"], alpha=0.4)
        if random:
            axes.axvline(random.value, color=_SENTINEL["random"], linestyle=_DASHES["dashed"])
            legend.append(LegendEntry(f"random policy {random.text}", "random", "dashed"))
        for index, (title, number) in enumerate(means.items()):
            variable, dash = f"s{index % NUM_SERIES}", tuple(_DASHES)[index % len(_DASHES)]
            axes.axvline(number.value, color=_SENTINEL[variable], linestyle=_DASHES[dash])
            legend.append(LegendEntry(f"{title} {number.text}", variable, dash))
        axes.set(xlabel="return of an episode", ylabel="episodes of the data")
        axes.grid(axis="x", visible=False)
        svg = _svg(figure, "histogram")
    reached = ", ".join(f"{title} {number.text}" for title, number in means.items())
    spread = f"from {format_return(returns.min())} to {format_return(returns.max())}"
    return Plot(
        svg,
        "Returns of the data",
        f"Returns of {len(returns)} episodes of data, {spread}. Agents: {reached or 'none evaluated'}.",
        f"Bars: episodes of the training data. Lines: mean returns, with 95% intervals. {samples}.",
        legend,
    )


def _references(group: Group) -> list[tuple[ReportedNumber, str, str, str]]:
    found = [(report_verdict.data_number(group, "mean"), "data mean", "data", "dotted")]
    if random := report_verdict.number(group, "mean", "random"):
        found.append((random, "random policy", "random", "dashed"))
    return found


def _words(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return f"{format_return(estimate.value)} (one sample, no interval)"
    return f"{format_return(estimate.value)} [{format_return(estimate.low)}, {format_return(estimate.high)}]"


def _sample(group: Group) -> str:
    evaluation = group.evaluation
    sizes = f"{count(evaluation['num_chains'], 'chain')}, {count(len(group.runs), 'seed')}"
    return f"{sizes}, subset {evaluation['data']['subset']}"


def _colours(runs: Sequence[Run], groups: Sequence[Group]) -> Mapping[str, tuple[str, str]]:
    # Runs of a group share its colour; a run without an evaluation has one of its own.
    found = {run.name: (g.short_title, f"s{i % NUM_SERIES}") for i, g in enumerate(groups) for run in g.runs}
    alone = [run for run in runs if run.name not in found]
    return found | {run.name: (run.name, f"s{(len(groups) + i) % NUM_SERIES}") for i, run in enumerate(alone)}


def _last_loss(run: Run) -> float:
    return next(line["loss"] for line in reversed(run.metrics) if "loss" in line)


def _thin(
    step: Float[np.ndarray, "n"], loss: Float[np.ndarray, "n"], most: int = 400
) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    if len(step) <= most:
        return step, loss
    parts = np.array_split(np.arange(len(step)), most)
    return np.array([step[p].mean() for p in parts]), np.array([loss[p].mean() for p in parts])


def _band(axes: Any, estimates: Sequence[Estimate], variable: str, marker: str) -> None:
    x = np.arange(1, len(estimates) + 1)
    colour = _SENTINEL[variable]
    if estimates[0].has_interval:
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, [e.value for e in estimates], color=colour, marker=marker, markersize=5)


def _ablation(
    lines: Mapping[str, Sequence[tuple[int, Estimate]]],
    looks: Mapping[str, LegendEntry],
    title: str,
    prefix: str,
) -> Plot:
    alt = []
    with _figure() as (figure, axes):
        for position, (name, points) in enumerate(lines.items()):
            look = looks[name]
            # Neighbouring lines are set apart by a few percent, else their error bars hide each other.
            x = np.array([size for size, _ in points]) * (1 + 0.03 * (position - (len(lines) - 1) / 2))
            y = np.array([e.value for _, e in points])
            errors = np.abs(
                np.array([[e.value - e.low for _, e in points], [e.high - e.value for _, e in points]])
            )
            style = {"linestyle": _DASHES[look.dash], "marker": _MARKERS[position], "markersize": 6}
            axes.errorbar(
                x, y, np.nan_to_num(errors), color=_SENTINEL[look.variable], elinewidth=1.4, **style
            )
            values = ", ".join(f"{_words(e)} at {size}" for size, e in points)
            alt.append(f"{look.label}: {values}")
        counts = sorted({size for points in lines.values() for size, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(size) for size in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="trajectories in context", ylabel="return")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        svg = _svg(figure, prefix)
    words = f"Return against trajectories in context. {'; '.join(alt)}."
    return Plot(svg, title, words, "", [looks[name] for name in lines])


@contextlib.contextmanager
def _figure() -> Iterator[tuple[Figure, Any]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.9))
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.tick_params(length=0)
        yield figure, axes


def _svg(figure: Figure, prefix: str) -> str:
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    if box is None:
        raise ValueError(f"An SVG figure must have a viewBox; got {svg[:200]!r}. Use another matplotlib.")
    # Namespaces are implied within HTML, and a style sheet in a figure would reach the whole page.
    svg = re.sub(r"^.*?<svg[^>]*>", f"<svg {box.group()}>", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # One page holds many figures, and an id may stand in it once.
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for name, colour in _SENTINEL.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
