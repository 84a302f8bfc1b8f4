"""What a grid's numbers say in plain language, each claim decided by an interval or left undecided."""

import html
from collections.abc import Iterator, Sequence

from bpt_rl.run.ablation_contrast import contrast
from bpt_rl.run.ablation_groups import COUNT, TASK, Axis, CellGroup, families, words_of
from bpt_rl.run.report_numbers import ReportedNumber

MOST = 12
"""Sentences of a verdict; the rest is in the plots."""


def verdict(groups: Sequence[CellGroup], axes: Sequence[Axis]) -> str:
    """Returns the page's first paragraphs as HTML: the most trajectories against the fewest, then other axes.

    What misses a seed is compared with nothing: intervals over unequal samples do not say the same.
    """
    if not groups:
        return "<p>No cell of this grid is finished, so nothing can be said of it.</p>"
    whole = [group for group in groups if group.is_complete]
    left_out = _left_out(groups)
    sentences = [*(_of_count(family) for family in families(whole)), *_of_others(whole, axes)]
    if not sentences and left_out:
        return (
            f"<p>No two settings of this grid that could be compared have all their seeds yet.</p>{left_out}"
        )
    if not sentences:
        return "<p>This grid compares nothing: each of its axes has one value. The returns stand below.</p>"
    left = len(sentences) - MOST
    more = f" {left} more comparisons can be read from the plots." if left > 0 else ""
    note = (
        "Each interval is one of 95%: of twenty comparisons of things that do not differ, one is expected to say that "
        f"they do.{more}"
    )
    told = "".join(f"<p>{sentence}</p>" for sentence in sentences[:MOST])
    return f'{told}<p class="note">{note}</p>{left_out}'


def _left_out(groups: Sequence[CellGroup]) -> str:
    """Returns which finished cells the verdict does not speak of, as HTML; nothing if it speaks of all."""
    some = [
        f"{group.task}, {group.group.title} ({len(group.addresses)} of {group.num_cells} seeds)"
        for group in groups
        if not group.is_complete
    ]
    words = html.escape("; ".join(some))
    return f'<p class="note">Not compared, since seeds are missing: {words}.</p>' if some else ""


def _of_count(family: Sequence[CellGroup]) -> str:
    most, fewest = family[-1], family[0]
    found = contrast(most.group, fewest.group)
    of = f" ({html.escape(most.common)})" if most.common else ""
    lead = (
        f"On <strong>{html.escape(most.task)}</strong>, {html.escape(most.group.agent_title)}{of}, "
        f"{most.values[COUNT]} trajectories against {fewest.values[COUNT]}: {found.protocol} "
        f"{found.gain.render_inline()}"
    )
    if found.control is None or found.by_context is None:
        return (
            f"{lead}; {_help(found.gain)}. Without the memoryless control nothing can be said of the context."
        )
    return (
        f"{lead}; the memoryless control {found.control.render_inline()}; so the context accounts for "
        f"{found.by_context.render_inline()}. {_help(found.gain).capitalize()}, and {_share(found.by_context)}."
    )


def _help(gain: ReportedNumber) -> str:
    return {
        "up": "more trajectories help",
        "down": "more trajectories do harm",
        "": "there is no evidence that the number of trajectories matters",
    }[_direction(gain)]


def _share(by_context: ReportedNumber) -> str:
    return {
        "up": "having them in context is part of it: the same checkpoint gains less when its context is cleared",
        "down": "having them in context does harm: the same checkpoint gains more when its context is cleared",
        "": "there is no evidence that having them in context is what matters",
    }[_direction(by_context)]


def _of_others(groups: Sequence[CellGroup], axes: Sequence[Axis]) -> Iterator[str]:
    """Yields the last value of each other axis against the first, where all else agrees."""
    varying = {axis.name: axis.varies for axis in axes}
    for axis in axes:
        if axis.name in (COUNT, TASK) or not axis.varies:
            continue
        found: dict[str, list[CellGroup]] = {}
        for group in groups:
            if axis.name in group.values:
                rest = {name: value for name, value in group.values.items() if name != axis.name}
                found.setdefault(repr(rest), []).append(group)
        for some in found.values():
            first, last = some[0], some[-1]
            if first is last or not _is_largest_count(first, groups):
                continue
            difference = contrast(last.group, first.group)
            words = {"up": "more", "down": "less", "": "no telling which is more"}
            others = [
                f"{words_of(name)} {value}"
                for name, value in first.values.items()
                if name not in (axis.name, TASK) and varying.get(name, True)
            ]
            beside = f" ({html.escape(', '.join(others))})" if others else ""
            yield (
                f"On <strong>{html.escape(first.task)}</strong>{beside}, {html.escape(axis.title)} "
                f"{html.escape(str(last.values[axis.name]))} against {html.escape(str(first.values[axis.name]))}: "
                f"{difference.protocol} {difference.gain.render_inline()}, "
                f"{words[_direction(difference.gain)]}."
            )


def _is_largest_count(group: CellGroup, groups: Sequence[CellGroup]) -> bool:
    """Returns whether no group of the grid has more trajectories: one comparison of an axis says enough."""
    counts = [other.values[COUNT] for other in groups if COUNT in other.values]
    return COUNT not in group.values or group.values[COUNT] == max(counts)


def _direction(number: ReportedNumber) -> str:
    return "up" if number.low > 0 else "down" if number.high < 0 else ""
