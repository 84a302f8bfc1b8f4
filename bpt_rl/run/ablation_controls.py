"""Controls of a grid beside the cells that they are like: a table of differences, and plots."""

import html
from collections.abc import Iterator, Sequence

import numpy as np

from bpt_rl.run import protocols, report_tables
from bpt_rl.run.ablation_contrast import contrast
from bpt_rl.run.ablation_groups import COUNT, CellGroup, words_of
from bpt_rl.run.ablation_plots import curves, sample_words, words
from bpt_rl.run.report_plots import LOOKS, error_bars
from bpt_rl.run.report_svg import Plot, figure_axes, to_svg


def controlled(groups: Sequence[CellGroup]) -> list[tuple[CellGroup, list[CellGroup]]]:
    """Returns each group of the grid itself that has controls, with them, in the order of the grid."""
    found = [
        (base, [group for group in groups if group.change and group.values == base.values])
        for base in groups
        if not base.change
    ]
    return [(base, controls) for base, controls in found if controls]


def beside(groups: Sequence[CellGroup]) -> list[CellGroup]:
    """Returns groups with each control behind what it is like; a control of nothing that is finished stands last."""
    controls = {id(base): some for base, some in controlled(groups)}
    ordered = [g for base in groups if not base.change for g in (base, *controls.get(id(base), ()))]
    placed = {id(group) for group in ordered}
    return [*ordered, *(group for group in groups if id(group) not in placed)]


def change_title(control: CellGroup, base: CellGroup) -> str:
    """Returns what a control changes, and from what, like "order shuffled against ascending"."""
    told = []
    for name, value in control.change.items():
        before = base.cell.setting(name)
        against = "" if before is None else f" against {before}"
        told.append(f"{words_of(name)} {value}{against}")
    return ", ".join(told)


def plots(groups: Sequence[CellGroup], prefix: str) -> Iterator[Plot | None]:
    """Yields two plots of each group that has controls: returns, and return within the context.

    Args:
      groups: Of one task, also such as miss a seed.
      prefix: Of the figures' ids.
    """
    for index, (base, controls) in enumerate(controlled(groups)):
        yield _returns(base, controls, f"{prefix}{index}")
        members = [(_label(group, base), group) for group in (base, *controls)]
        yield curves(members, f"Within the context, {base.group.title}", f"{prefix}{index}e")


def differences(groups: Sequence[CellGroup]) -> str:
    """Returns a table of controls less what they are like as HTML, where all have their seeds; nothing without any."""
    rows = []
    for base, controls in controlled([group for group in groups if group.is_complete]):
        for control in controls:
            found = contrast(control.group, base.group)
            numbers = zip(_HEADS, (found.gain, found.control, found.by_context), strict=True)
            cells = [report_tables.number_cell(number, head) for head, number in numbers]
            title = f"{base.group.title}, {change_title(control, base)}"
            rows.append(report_tables.row(title, cells))
    if not rows:
        return ""
    note = (
        "A control less what it is like. It is read from the last episode of a context of several, else from the mean "
        "of the episodes; the context adds what keeping it brings the control, less what it brings the other."
    )
    table = report_tables.table("Controls", "plain", ["Control", *_HEADS], ["".join(rows)])
    return f'{table}<p class="note">{html.escape(note)}</p>'


_HEADS = ("Context kept", "Memoryless", "What the context adds")


def _label(group: CellGroup, base: CellGroup) -> str:
    if group.change:
        return ", ".join(f"{words_of(name)} {value}" for name, value in group.change.items())
    number = base.values.get(COUNT)
    return "the grid's" if number is None else f"{number} {'trajectory' if number == 1 else 'trajectories'}"


def _returns(base: CellGroup, controls: Sequence[CellGroup], prefix: str) -> Plot:
    """Returns the plot of a group's returns beside those of its controls."""
    members = [base, *controls]
    marks = [_label(group, base) for group in members]
    alt = []
    with figure_axes() as (figure, axes):
        for index, (look, name, context) in enumerate(_LOOKS):
            logs = [
                g.group.logs("chain") if context == "chain" else g.group.memoryless_logs() for g in members
            ]
            at = [i for i, some in enumerate(logs) if some]
            estimates = [protocols.estimate(name, logs[i]) for i in at]
            places = np.array(at) + 0.12 * (index - 1)
            # Nothing lies between two controls, so no line leads from one to the other.
            style = look.style | {"linestyle": "none"}
            error_bars(axes, places, estimates, **style)
            told = ", ".join(f"{words(e)} with {marks[i]}" for i, e in zip(at, estimates, strict=True))
            alt.append(f"{look.label}: {told}")
        axes.set_xticks(range(len(marks)), [mark.replace(" ", "\n", 1) for mark in marks])
        axes.set_xlim(-0.5, len(marks) - 0.5)
        axes.set(ylabel="return")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        svg = to_svg(figure, prefix)
    caption = f"Bars are 95% t intervals. {sample_words(members)}."
    alt_words = f"Returns of {base.group.title} and of its controls. {'; '.join(alt)}."
    return Plot(
        svg, f"Mean and last, {base.group.title}", alt_words, caption, [look for look, _, _ in _LOOKS]
    )


_LOOKS = (
    (LOOKS["mean"], "mean", "chain"),
    (LOOKS["last"], "last", "chain"),
    (LOOKS["memoryless"], "mean", "memoryless"),
)
