"""Pictures of datasets: returns under every task, and the states visited."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bpt_rl.datasets import comparison
from bpt_rl.datasets.description import visited_features
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.survey import Survey
from bpt_rl.run.picture_style import PICTURE_STYLE

NUM_COLUMNS = 4
_NUM_BINS = 60
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6b7280")
_DASHES = ("-", "--", ":")


def plot_store(path: Path, out: Path) -> Path:
    """Returns `out`, a PNG with a histogram of the returns of each task and of each physical feature.

    Raises:
      ValueError: If `path` is no store.
      OSError: If the picture cannot be written.
    """
    with Store.open(path) as store:
        returns = {task: store.returns(task) for task in store.tasks}
        features = visited_features(store)
        title = f"{store.source}, subset {store.subset}: {store.num_episodes:,} episodes"
    return _plot_histograms(title, returns, features, out)


def plot_surveys(surveys: Sequence[Survey], out: Path) -> Path:
    """Returns `out`, a PNG of `draw_surveys`.

    Raises:
      OSError: If the picture cannot be written.
    """
    with mpl.rc_context(dict(PICTURE_STYLE)):
        _save(draw_surveys(surveys), out)
    return out


def draw_surveys(surveys: Sequence[Survey]) -> Figure:
    """Returns a figure of one dataset, or of several of one domain side by side.

    A panel a task shows the share of each dataset's episodes that earn a return or more; below, a panel a dataset
    shows where its states lie, two physical features at a time and all on one scale.

    Args:
      surveys: Of datasets that `comparison.check_comparable` passes.
    """
    labels = comparison.labels([survey.dataset for survey in surveys])
    pairs = _pairs(len(surveys[0].feature_names))
    task_names = list(dict.fromkeys(task for survey in surveys for task in survey.returns))
    num_rows = -(-len(task_names) // NUM_COLUMNS)
    # Of one dataset, pairs lie beside each other.
    num_map_rows = len(pairs) if len(surveys) > 1 else min(1, len(pairs))
    width = 3.2 * max(NUM_COLUMNS, len(surveys))
    # Not pyplot: it would open a display where there is one.
    figure = Figure(figsize=(width, 0.8 + 2.7 * (num_rows + num_map_rows)))
    figure.suptitle(f"{surveys[0].dataset.domain}: returns of episodes, and states visited")
    heights = [rows for rows in (num_rows, num_map_rows) if rows]
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = parts[0].subplots(num_rows, NUM_COLUMNS, squeeze=False).flat
    for axes, task in itertools.zip_longest(panels, task_names):
        if task is None:
            axes.remove()
        else:
            _draw_shares(axes, task, surveys)
    lines = parts[0].axes[0].get_lines()[::2]
    parts[0].legend(lines, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    if pairs:
        _draw_maps(parts[1], surveys, pairs, labels)
    return figure


def _pairs(num_features: int) -> list[tuple[int, int]]:
    """Returns neighbouring features; the last pair of an odd number shares one with the pair before it."""
    firsts = {*range(0, num_features - 1, 2), *([num_features - 2] if num_features > 1 else [])}
    return [(first, first + 1) for first in sorted(firsts)]


def _plot_histograms(
    title: str,
    returns: Mapping[str, Float[np.ndarray, "E"]],
    features: Mapping[str, Float[np.ndarray, "_"]],
    out: Path,
) -> Path:
    num_rows = [-(-len(group) // NUM_COLUMNS) for group in (returns, features)]
    # Not pyplot: it would open a display where there is one.
    with mpl.rc_context(dict(PICTURE_STYLE)):
        figure = Figure(figsize=(3.2 * NUM_COLUMNS, 0.6 + 2.5 * sum(num_rows)))
        figure.suptitle(title)
        grid = figure.add_gridspec(sum(num_rows), NUM_COLUMNS)
        for i, (task, values) in enumerate(returns.items()):
            _draw_returns(figure.add_subplot(grid[divmod(i, NUM_COLUMNS)]), task, values)
        for i, (name, states) in enumerate(features.items(), num_rows[0] * NUM_COLUMNS):
            _draw_states(figure.add_subplot(grid[divmod(i, NUM_COLUMNS)]), name, states)
        _save(figure, out)
    return out


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _draw_returns(axes: Axes, task: str, values: Float[np.ndarray, "E"]) -> None:
    axes.hist(values, bins=min(50, max(10, len(values) // 20)), color="#0072b2")
    mean = float(values.mean(dtype=np.float64))
    axes.axvline(mean, color="#d55e00", label=f"mean {mean:.3g}, best {values.max():.4g}")
    axes.set(title=task, xlabel="return of an episode", ylabel="episodes")
    axes.legend(fontsize=8, frameon=False)


def _draw_states(axes: Axes, name: str, values: Float[np.ndarray, "_"]) -> None:
    axes.hist(values, bins=_NUM_BINS, color="#6b7280", density=True)
    axes.set(title=name.replace("_", " "), xlabel="value at a visited state", ylabel="density")
    axes.set_yscale("log")


def _draw_shares(axes: Axes, task: str, surveys: Sequence[Survey]) -> None:
    for i, survey in enumerate(surveys):
        # A dataset without the task keeps its place in the legend.
        values = np.sort(survey.returns.get(task, np.zeros(0, np.float32)))
        shares = 1 - np.arange(len(values)) / max(1, len(values))
        colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)]
        axes.plot(values, shares, drawstyle="steps-pre", color=colour, linestyle=dash, linewidth=1.8)
        axes.plot(values[-1:], shares[-1:], marker="o", markersize=4, color=colour)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set(title=task, xlabel="return", ylabel="episodes with it or more")


def _draw_maps(
    figure: Any, surveys: Sequence[Survey], pairs: Sequence[tuple[int, int]], labels: Sequence[str]
) -> None:
    """Draws a row of panels a pair of features, one panel a dataset, all of a row alike in axes and colours."""
    if len(surveys) > 1:
        panels = figure.subplots(len(pairs), len(surveys), squeeze=False, sharex="row", sharey="row")
    else:
        panels = figure.subplots(1, len(pairs), squeeze=False).T
    for row, pair in zip(panels, pairs, strict=True):
        together = np.concatenate([survey.states[:, pair] for survey in surveys])
        edges = [np.histogram_bin_edges(column, _NUM_BINS) for column in together.T]
        for axes, survey, label in zip(row, surveys, labels, strict=True):
            x, y = survey.states[:, pair].T
            weights = np.full(len(x), 1 / len(x))
            mesh = axes.hist2d(x, y, edges, weights=weights, cmin=1e-12, norm=LogNorm(1e-5, 1e-1))[3]
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set(xlabel=survey.feature_names[pair[0]].replace("_", " "), title=label)
        row[0].set_ylabel(surveys[0].feature_names[pair[1]].replace("_", " "))
        figure.colorbar(mesh, ax=list(row), label="share of states", extend="both")
