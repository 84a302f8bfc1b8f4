"""The report's tables. Each is whole without the page's script, which lets readers sort it."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from bpt_rl.run import report_verdict
from bpt_rl.run.report_groups import Group, Run, settings
from bpt_rl.run.report_numbers import ReportedNumber, count
from bpt_rl.run.report_verdict import Check

NOTHING = '<td class="none">–</td>'  # noqa: RUF001
_COLUMNS = {
    "mean": ("Mean", "of the episodes in a context"),
    "first": ("First", "nothing of its own in context"),
    "last": ("Last", "all others in context"),
    "improvement": ("Last less first", "gain within a context"),
    "slope": ("Slope", "gain an episode"),
    "max": ("Largest", "what papers report"),
    "null max": ("Null max", "largest by luck alone"),
}
_MARKS = {"undecided": "Cannot tell"}


def table(label: str, style: str, head: Sequence[str], bodies: Sequence[str]) -> str:
    """Returns a table that can be sorted.

    Args:
      label: Plain text for readers who do not see it.
      style: Its class.
      head: HTML of each column's heading.
      bodies: HTML of the rows. Rows of one body stay together if there are several.
    """
    cells = "".join(f'<th scope="col">{text}</th>' for text in head)
    rows = "".join(f"<tbody>{body}</tbody>" for body in bodies)
    label = html.escape(label, quote=True)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table class="sortable {style}">'
        f"<thead><tr>{cells}</tr></thead>{rows}</table></div>"
    )


def row(title: str, cells: Sequence[str], note: str = "") -> str:
    """Returns a row; `title` and `note` are plain text, cells HTML with their tags."""
    small = f"<small>{html.escape(note)}</small>" if note else ""
    return f'<tr><th scope="row">{html.escape(title)}{small}</th>{"".join(cells)}</tr>'


def text_row(title: str, values: Sequence[str]) -> str:
    """Returns a row of plain text."""
    return row(title, [f"<td>{html.escape(value)}</td>" for value in values])


def number_cell(number: ReportedNumber | None, label: str = "") -> str:
    """Returns a cell with a number, or with a dash; `label` names it where a narrow page shows no headings."""
    return f'<td data-label="{html.escape(label, quote=True)}">{number.render()}</td>' if number else NOTHING


def results(groups: Sequence[Group], *, first: int = 0) -> str:
    """Returns the table of returns: each group beside its control, then random actions and the data.

    Args:
      groups: Of one task.
      first: Number of the first group's commands on the page.
    """
    if not groups:
        return ""
    head = [f"{name}<small>{what}</small>" for name, what in _COLUMNS.values()]
    bodies = [_group_rows(group, index) for index, group in enumerate(groups, first)]
    reference = report_verdict.subject(groups)
    random = {name: report_verdict.number(reference, name, "random") for name in _COLUMNS}
    if any(random.values()):
        bodies.append(_row("Random policy", random, "uniform actions, no training"))
    for group in {g.evaluation["data"]["digest"]: g for g in reversed(groups)}.values():
        data = {
            "mean": report_verdict.data_number(group, "mean"),
            "max": report_verdict.data_number(group, "best"),
        }
        values = group.evaluation["data"]
        note = (
            f"{values['source']}, subset {values['subset']} (digest {values['subset_digest'][:8]}), "
            f"{values['num_episodes']:,} episodes"
        )
        bodies.append(_row("Training data", data, note))
    evaluation = reference.evaluation
    caption = (
        f"Undiscounted raw returns of an episode of {evaluation['task']}, action repeat "
        f"{evaluation['action_repeat']}. Brackets hold a 95% t interval: over chains where there is one training "
        "seed, and it speaks of that checkpoint; over the means of the seeds where there are several, and it speaks "
        "of training. The memoryless control is the same checkpoint, its context cleared before each episode. The "
        "null max is the expected largest return of as many independent episodes of that control. Point at a "
        "number for its protocol, subset, chains and seeds."
    )
    if any(group.shares_start_states for group in groups):
        caption += (
            " Training seeds were played from the same start states: intervals over seeds speak of these alone, and "
            "are too narrow for others."
        )
    return (
        f'{table("Results", "results", ["Policy", *head], bodies)}<p class="note">{html.escape(caption)}</p>'
    )


def _group_rows(group: Group, index: int) -> str:
    evaluation = group.evaluation
    steps = sorted({run.evaluation["step"] for run in group.runs if run.evaluation})
    notes = [
        f"subset {evaluation['data']['subset']}",
        f"{count(evaluation['num_episodes'], 'episode')} × {count(evaluation['num_chains'], 'chain')}",  # noqa: RUF001
        count(len(group.runs), "seed"),
        f"step {' to '.join(f'{step:,}' for step in dict.fromkeys((steps[0], steps[-1])))}",
    ]
    if group.asks:
        notes.append(f"target {evaluation['target_return']:,.1f} ({evaluation['target_rule']})")
    if group.shown:
        notes.append(group.shown)
    kept = {name: report_verdict.number(group, name, "chain") for name in _COLUMNS if name != "null max"}
    kept["null max"] = report_verdict.number(group, "null max", "memoryless")
    control = {
        name: report_verdict.number(group, name, "memoryless") for name in _COLUMNS if name != "null max"
    }
    heading = (
        f'<tr class="group"><th scope="rowgroup" colspan="{len(_COLUMNS) + 1}"><span>{html.escape(group.title)}'
        f'<small>{html.escape(" · ".join(notes))} · <a href="#repeat-{index}">commands</a></small></span></th></tr>'
    )
    return (
        heading
        + _row(group.chain_title, kept)
        + (_row("Memoryless control", control) if control["mean"] else "")
    )


def _row(title: str, numbers: Mapping[str, ReportedNumber | None], note: str = "") -> str:
    return row(title, [number_cell(numbers.get(name), words[0]) for name, words in _COLUMNS.items()], note)


def checks(groups: Sequence[Group]) -> str:
    """Returns every group's answers to the four questions, each with the margin that decided it."""
    if not groups:
        return ""
    answers = [report_verdict.checks(group) for group in groups]
    head = ["Policy", *(html.escape(check.question) for check in answers[0])]
    rows = [
        row(group.agent_title, [_answer(check) for check in found], group.subtitle)
        for group, found in zip(groups, answers, strict=True)
    ]
    note = (
        "Below each answer stands the margin that decided it, with its 95% interval. An agent that keeps several "
        "episodes in context is judged by the last of them, any other by the mean of its episodes: less twice the "
        "random policy's mean, less the data's mean, less the memoryless control's; the largest return less the "
        "null max. Yes and no are said only where the interval lies on one side of zero. Each is asked at 95%: of "
        "twenty answers about nothing, one is expected to be wrong."
    )
    return f'{table("Answers", "checks", head, ["".join(rows)])}<p class="note">{html.escape(note)}</p>'


def _answer(check: Check) -> str:
    words = _MARKS.get(check.answer, check.answer.capitalize())
    mark = f'<span class="answer {check.answer.replace(" ", "-")}">{words}</span>'
    detail = f'<small class="margin">{check.margin.render_inline()}</small>' if check.margin else ""
    return f'<td data-label="{html.escape(check.question, quote=True)}">{mark}{detail}</td>'


def failures(groups: Sequence[Group]) -> str:
    """Returns the episodes that a simulator ended, or nothing if none did."""
    found = [
        (run.name, context, failure)
        for group in groups
        for context in ("chain", "memoryless", "random")
        for run, failure in group.failures(context)
    ]
    found += [
        (run.name, f"target {target:,.1f}", failure)
        for group in groups
        for run, target, failure in group.sweep_failures()
    ]
    if not found:
        return ""
    rows = [
        text_row(name, [context, *(f"{n:,}" for n in (f.chain + 1, f.episode + 1, f.step)), f.reason])
        for name, context, f in found
    ]
    head = ["Run", "Rolled out", "Chain", "Episode", "Step", "Reason"]
    note = (
        f"{count(len(found), 'episode')} did not reach the end: the simulator's state was no longer usable. Each "
        "counts with the return that it had collected, and the numbers that hold it say so."
    )
    return f"<p>{html.escape(note)}</p>{table('Episodes ended', 'plain', head, [''.join(rows)])}"


def differences(runs: Sequence[Run]) -> str:
    """Returns the settings in which the runs differ, or nothing if there is one run."""
    if len(runs) < 2:
        return ""
    found = [settings(run) | {"seed": str(run.config.seed)} for run in runs]
    names = dict.fromkeys(name for values in found for name in values)
    differing = [name for name in names if len({values.get(name) for values in found}) > 1]
    if not differing:
        return "<p>The runs share every setting.</p>"
    absent = "–"  # noqa: RUF001
    rows = [text_row(name, [values.get(name, absent) for values in found]) for name in differing]
    head = ["Setting", *(html.escape(run.name) for run in runs)]
    note = f"{count(len(differing), 'setting')} of {len(names)} differ; all others are the same in every run."
    return f'<p class="lead">{note}</p>{table("Differences", "plain differences", head, ["".join(rows)])}'


def versions(runs: Sequence[Run]) -> str:
    """Returns what was installed where, one column for each set of versions that occurs."""
    columns: dict[tuple[tuple[str, str], ...], dict[str, list[str]]] = {}
    for run in runs:
        for verb, values in (
            ("trained", run.versions),
            ("evaluated", (run.evaluation or {}).get("versions", {})),
        ):
            if flat := _flat_versions(values):
                columns.setdefault(tuple(flat.items()), {}).setdefault(verb, []).append(run.name)
    if not columns:
        return ""
    names = list(dict.fromkeys(name for column in columns for name, _ in column))
    heads = [
        "; ".join(
            f"{verb}: {', '.join(users) if len(users) < len(runs) else 'all runs'}"
            for verb, users in by.items()
        )
        for by in columns.values()
    ]
    rows = [text_row(name, [dict(column).get(name, "–") for column in columns]) for name in names]  # noqa: RUF001
    return table("Versions", "plain", ["Package", *map(html.escape, heads)], ["".join(rows)])


def _flat_versions(values: Mapping[str, Any]) -> dict[str, str]:
    packages = values.get("packages", {})
    # What a run decided, like where its data lies, stands there too, and differs from run to run.
    rest = {k.replace("_", " "): v for k, v in values.items() if isinstance(v, str) and k != "command"}
    return {str(name): str(value) for name, value in {**packages, **rest}.items()}
