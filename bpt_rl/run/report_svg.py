"""Figures of a report as inline SVG in the page's colour variables: they follow its light or dark theme.

Every line of a figure has a dash and a marker of its own beside its colour, so that none is told by colour alone.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Matplotlib knows no CSS variables: each stands in the figure as a colour that nothing else has.
_ROLES = ("ink", "muted", "grid", "chain", "memoryless", "random", "data", "null")
NUM_SERIES = 7
SENTINEL = {name: f"#00a1{i:02x}" for i, name in enumerate((*_ROLES, *(f"s{i}" for i in range(NUM_SERIES))))}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 13,
    "axes.edgecolor": SENTINEL["grid"],
    "axes.labelcolor": SENTINEL["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SENTINEL["grid"],
    "ytick.color": SENTINEL["grid"],
    "xtick.labelcolor": SENTINEL["muted"],
    "ytick.labelcolor": SENTINEL["muted"],
    "grid.color": SENTINEL["grid"],
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}
DASHES = {"solid": "-", "dashed": (0, (5, 3)), "dotted": (0, (1.2, 2.2)), "dashdot": (0, (6, 2, 1.2, 2))}
MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖"}
"""Matplotlib's markers and the characters that stand for them in a legend."""


@dataclasses.dataclass(frozen=True)
class LegendEntry:
    """A line's name and look."""

    label: str
    variable: str
    """CSS variable of its colour, without the dashes."""
    dash: str = "solid"
    marker: str = ""
    """One of `MARKERS`, or none."""

    @property
    def style(self) -> dict[str, Any]:
        """Matplotlib's arguments for a line that looks like this."""
        found = {"color": SENTINEL[self.variable], "linestyle": DASHES[self.dash]}
        return found | ({"marker": self.marker, "markersize": 6} if self.marker else {})


@dataclasses.dataclass(frozen=True)
class Plot:
    """An SVG and the words that go with it."""

    svg: str
    title: str
    alt: str
    caption: str
    legend: Sequence[LegendEntry]


def series_entry(label: str, index: int) -> LegendEntry:
    """Returns the look of the line of one of several things alike, told from the others without colour too."""
    return LegendEntry(
        label,
        f"s{index % NUM_SERIES}",
        tuple(DASHES)[index % len(DASHES)],
        tuple(MARKERS)[index % len(MARKERS)],
    )


@contextlib.contextmanager
def figure_axes() -> Iterator[tuple[Figure, Any]]:
    """Yields a figure in the page's style and its axes."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.9))
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.tick_params(length=0)
        yield figure, axes


def to_svg(figure: Figure, prefix: str) -> str:
    """Returns a figure as SVG for a page; `prefix` tells its ids from those of other figures."""
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
    for name, colour in SENTINEL.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
