"""What a grid's numbers say in plain language, each claim decided by an interval or left undecided."""

import dataclasses
import html
from collections.abc import Iterator, Sequence

from bpt_rl.run.ablation_contrast import Contrast, contrast, per_doubling
from bpt_rl.run.ablation_controls import change_title, controlled
from bpt_rl.run.ablation_groups import COUNT, TASK, Axis, CellGroup, families, words_of
from bpt_rl.run.report_numbers import ReportedNumber

MOST = 12
"""Comparisons that a verdict tells of; the rest is in the plots."""
Told = tuple[str, Sequence[Contrast]]
"""A comparison in words, as HTML, and what its numbers are."""


def verdict(groups: Sequence[CellGroup], axes: Sequence[Axis]) -> str:
    """Returns the page's first paragraphs as HTML: the most trajectories against the fewest, controls, other axes.

    What misses a seed is compared with nothing: intervals over unequal samples do not say the same.
    """
    if not groups:
        return "<p>No cell of this grid is finished, so nothing can be said of it.</p>"
    whole = [group for group in groups if group.is_complete]
    left_out = _left_out(groups)
    tasks = dict.fromkeys(group.task for group in whole)
    by_task = [[group for group in whole if group.task == task] for task in tasks]
    told = [one for some in by_task for one in (*_of_counts(some), *_of_controls(some))]
    told += _of_others([group for group in whole if not group.change], axes)
    if not told and left_out:
        return (
            f"<p>No two settings of this grid that could be compared have all their seeds yet.</p>{left_out}"
        )
    if not told:
        return "<p>This grid compares nothing: each of its axes has one value. The returns stand below.</p>"
    left = len(told) - MOST
    more = f" {left} more comparisons can be read from the plots." if left > 0 else ""
    sentences = "".join(f"<p>{sentence}</p>" for sentence, _ in told[:MOST])
    return f'{sentences}<p class="note">{_by_chance(told[:MOST])}{more}</p>{left_out}'


def _by_chance(told: Sequence[Told]) -> str:
    """Returns how many intervals leave zero out, and how many would if nothing differed."""
    numbers = [
        number
        for _, contrasts in told
        for found in contrasts
        for number in (found.gain, found.control, found.by_context)
        if number is not None and number.low < number.high
    ]
    if len(numbers) < 2:
        return "An interval is one of 95%: one in twenty leaves zero out where nothing differs."
    decided = sum(bool(_direction(number)) for number in numbers)
    by_chance = f"{len(numbers) / 20:.1f} of them would be expected to leave zero out"
    return f"Each of the {len(numbers)} intervals above is one of 95%: if nothing differed, {by_chance}; {decided} do."


def _left_out(groups: Sequence[CellGroup]) -> str:
    """Returns which finished cells the verdict does not speak of, as HTML; nothing if it speaks of all."""
    some = [
        f"{group.task}, {group.group.title} ({len(group.addresses)} of {group.num_cells} seeds)"
        for group in groups
        if not group.is_complete
    ]
    words = html.escape("; ".join(some))
    return f'<p class="note">Not compared, since seeds are missing: {words}.</p>' if some else ""


def _of_counts(groups: Sequence[CellGroup]) -> Iterator[Told]:
    """Yields the most trajectories against the fewest, and what a doubling brings where there are more counts."""
    for family in families(groups):
        most, fewest = family[-1], family[0]
        found = contrast(most.group, fewest.group)
        of = f" ({html.escape(most.common)})" if most.common else ""
        told = (
            f"On <strong>{html.escape(most.task)}</strong>, {html.escape(most.group.agent_title)}{of}, "
            f"{most.values[COUNT]} trajectories against {fewest.values[COUNT]}: {_measured(found)}"
        )
        if len(family) == 2:
            yield f"{told} {_capital(_count_words(found))}", [found]
            continue
        trend = per_doubling([one.group for one in family], [int(one.values[COUNT]) for one in family])
        by_all = f"By least squares over all {len(family)} counts, each doubling brings {_measured(trend)}"
        told = (
            f"{told} Going by these two, {_count_words(found)} {by_all} Going by all, {_count_words(trend)}"
        )
        yield told, [found, trend]


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _of_controls(groups: Sequence[CellGroup]) -> Iterator[Told]:
    """Yields each control against what it is like."""
    for base, controls in controlled(groups):
        for control in controls:
            found = contrast(control.group, base.group)
            told = (
                f"On <strong>{html.escape(base.task)}</strong>, control: {html.escape(base.group.title)}, "
                f"{html.escape(change_title(control, base))}: {_measured(found)} {_control_words(found)}"
            )
            yield told, [found]


def _measured(found: Contrast) -> str:
    gain = f"{found.protocol} {found.gain.render_inline()}"
    if found.control is None or found.by_context is None:
        return f"{gain}."
    return (
        f"{gain}; the memoryless control {found.control.render_inline()}; so keeping the context adds "
        f"{found.by_context.render_inline()} more."
    )


_UNTOLD = "Without the memoryless control nothing can be said of the context."


def _count_words(found: Contrast) -> str:
    gain = {
        "up": "more trajectories help",
        "down": "more trajectories do harm",
        "": "there is no evidence that the number of trajectories matters",
    }[_direction(found.gain)]
    if found.by_context is None:
        return f"{gain}. {_UNTOLD}"
    # What contexts do may go against what all does together.
    context = {
        ("up", "up"): "and having them in context is part of it: cleared contexts gain less",
        ("up", "down"): "although having them in context does harm: cleared contexts gain more",
        ("down", "up"): "although having them in context helps: cleared contexts lose more",
        ("down", "down"): "and having them in context is part of it: cleared contexts lose less",
        ("", "up"): "but having them in context helps: cleared contexts gain less",
        ("", "down"): "but having them in context does harm: cleared contexts gain more",
    }.get(
        (_direction(found.gain), _direction(found.by_context)),
        "and there is no evidence that having them in context is what matters",
    )
    return f"{gain}, {context}."


def _control_words(found: Contrast) -> str:
    gain = {
        "up": "The control returns more",
        "down": "The control returns less",
        "": "There is no telling which returns more",
    }[_direction(found.gain)]
    if found.by_context is None:
        return f"{gain}. {_UNTOLD}"
    context = {
        "up": "its context adds more",
        "down": "its context adds less",
        "": "there is no telling whose context adds more",
    }[_direction(found.by_context)]
    return f"{gain}; {context}."


def _of_others(groups: Sequence[CellGroup], axes: Sequence[Axis]) -> Iterator[Told]:
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
            told = (
                f"On <strong>{html.escape(first.task)}</strong>{beside}, {html.escape(axis.title)} "
                f"{html.escape(str(last.values[axis.name]))} against {html.escape(str(first.values[axis.name]))}: "
                f"{difference.protocol} {difference.gain.render_inline()}, "
                f"{words[_direction(difference.gain)]}."
            )
            # Of the context nothing is told here.
            yield told, [dataclasses.replace(difference, control=None, by_context=None)]


def _is_largest_count(group: CellGroup, groups: Sequence[CellGroup]) -> bool:
    """Returns whether no group of the grid has more trajectories: one comparison of an axis says enough."""
    counts = [other.values[COUNT] for other in groups if COUNT in other.values]
    return COUNT not in group.values or group.values[COUNT] == max(counts)


def _direction(number: ReportedNumber) -> str:
    return "up" if number.low > 0 else "down" if number.high < 0 else ""
