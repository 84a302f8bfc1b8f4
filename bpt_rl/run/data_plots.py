"""A picture of a store: returns under every task, and the states visited."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bpt_rl.datasets.description import visited_features
from bpt_rl.datasets.store import Store

NUM_COLUMNS = 4
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dcdfe4",
    "figure.constrained_layout.use": True,
}


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
    num_rows = [-(-len(group) // NUM_COLUMNS) for group in (returns, features)]
    # Not pyplot: it would open a display where there is one.
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.2 * NUM_COLUMNS, 0.6 + 2.5 * sum(num_rows)))
        figure.suptitle(title)
        grid = figure.add_gridspec(sum(num_rows), NUM_COLUMNS)
        for i, (task, values) in enumerate(returns.items()):
            _draw_returns(figure.add_subplot(grid[divmod(i, NUM_COLUMNS)]), task, values)
        for i, (name, states) in enumerate(features.items(), num_rows[0] * NUM_COLUMNS):
            _draw_states(figure.add_subplot(grid[divmod(i, NUM_COLUMNS)]), name, states)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    return out


def _draw_returns(axes: Axes, task: str, values: Float[np.ndarray, "E"]) -> None:
    axes.hist(values, bins=min(50, max(10, len(values) // 20)), color="#0072b2")
    mean = float(values.mean(dtype=np.float64))
    axes.axvline(mean, color="#d55e00", label=f"mean {mean:.3g}, best {values.max():.4g}")
    axes.set(title=task, xlabel="return of an episode", ylabel="episodes")
    axes.legend(fontsize=8, frameon=False)


def _draw_states(axes: Axes, name: str, values: Float[np.ndarray, "_"]) -> None:
    axes.hist(values, bins=60, color="#6b7280", density=True)
    axes.set(title=name.replace("_", " "), xlabel="value at a visited state", ylabel="density")
    axes.set_yscale("log")
