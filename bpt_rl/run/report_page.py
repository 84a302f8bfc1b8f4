"""The report's HTML: one page, no script, nothing loaded from anywhere."""

import base64
import html
import shlex
import string
from collections.abc import Mapping, Sequence
from typing import Any

from bpt_rl import config_toml
from bpt_rl.run import report_verdict
from bpt_rl.run.report_groups import Group, Run
from bpt_rl.run.report_numbers import ReportedNumber, count
from bpt_rl.run.report_plots import Plot
from bpt_rl.run.report_style import STYLE
from bpt_rl.run.report_verdict import Check

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><p class="eyebrow">bpt_rl report</p><h1>$title</h1><p class="subtitle">$subtitle</p></header>
<main>
<div class="verdict">$lead</div>
$body</main>
</body>
</html>
""")
_COLUMNS = {
    "mean": ("Mean", "of the episodes in a context"),
    "first": ("First", "nothing in context yet"),
    "last": ("Last", "all others in context"),
    "improvement": ("Last less first", "gain within a context"),
    "max": ("Largest", "what papers report"),
    "null max": ("Null max", "largest by luck alone"),
}
_MARKS = {"undecided": "Cannot tell"}
_NO_GIF = (
    "No episode was rendered. Install Debian's libegl1 and libgl1-mesa-dri "
    "(apt-get install libegl1 libgl1-mesa-dri), set MUJOCO_GL=egl and evaluate again."
)


def page(title: str, subtitle: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """Returns the whole page.

    Args:
      title: Plain text.
      subtitle: Plain text.
      lead: HTML of the verdict.
      sections: Heading and HTML of each section; one whose HTML is empty is left out.
    """
    body = "".join(
        f"<section><h2>{html.escape(heading)}</h2>{content}</section>\n"
        for heading, content in sections
        if content
    )
    return _PAGE.substitute(
        title=html.escape(title), subtitle=html.escape(subtitle), style=STYLE, lead=lead, body=body
    )


def results(groups: Sequence[Group]) -> str:
    """Returns the table of returns: each group beside its control, then random actions and the data."""
    if not groups:
        return ""
    head = "".join(
        f'<th scope="col">{html.escape(name)}<small>{html.escape(what)}</small></th>'
        for name, what in _COLUMNS.values()
    )
    rows = "".join(_group_rows(group) for group in groups)
    reference = report_verdict.subject(groups)
    random = {name: report_verdict.number(reference, name, "random") for name in _COLUMNS}
    if any(random.values()):
        rows += f"<tbody>{_row('Random policy', 'uniform actions, no training', random)}</tbody>"
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
        rows += f"<tbody>{_row('Training data', note, data)}</tbody>"
    evaluation = reference.evaluation
    caption = (
        f"Undiscounted raw returns of an episode of {evaluation['task']}, action repeat "
        f"{evaluation['action_repeat']}. Brackets hold a 95% percentile bootstrap interval: chains are "
        "resampled, and training seeds before them where there are several; episodes for the null max. The "
        "memoryless control is the same checkpoint, its context cleared before each episode. The null max "
        "is the expected largest return of as many independent episodes of that control."
    )
    return (
        '<div class="scroll" role="region" aria-label="Results" tabindex="0"><table class="results">'
        f'<thead><tr><th scope="col">Policy</th>{head}</tr></thead>{rows}</table></div>'
        f'<p class="note">{html.escape(caption)}</p>'
    )


def _group_rows(group: Group) -> str:
    evaluation = group.evaluation
    steps = sorted({run.evaluation["step"] for run in group.runs if run.evaluation})
    note = (
        f"subset {evaluation['data']['subset']} · {count(evaluation['num_episodes'], 'episode')} × "  # noqa: RUF001
        f"{count(evaluation['num_chains'], 'chain')} · {count(len(group.runs), 'seed')} · "
        f"step {' to '.join(f'{step:,}' for step in dict.fromkeys((steps[0], steps[-1])))}"
    )
    if group.config.agent != "bc":
        note += f" · target {evaluation['target_return']:,.1f} ({evaluation['target_rule']})"
    kept = {name: report_verdict.number(group, name, "chain") for name in _COLUMNS if name != "null max"}
    kept["null max"] = report_verdict.number(group, "null max", "memoryless")
    control = {
        name: report_verdict.number(group, name, "memoryless") for name in _COLUMNS if name != "null max"
    }
    heading = (
        f'<tr class="group"><th scope="rowgroup" colspan="{len(_COLUMNS) + 1}">'
        f"<span>{html.escape(group.title)}<small>{html.escape(note)}</small></span></th></tr>"
    )
    rows = _row(group.chain_title, "", kept)
    rows += _row("Memoryless control", "", control) if control["mean"] else ""
    return f"<tbody>{heading}{rows}</tbody>"


def _row(title: str, note: str, numbers: Mapping[str, ReportedNumber | None]) -> str:
    cells = []
    for name in _COLUMNS:
        number = numbers.get(name)
        cells.append(f"<td>{number.render()}</td>" if number else '<td class="none">–</td>')  # noqa: RUF001
    small = f"<small>{html.escape(note)}</small>" if note else ""
    return f'<tr><th scope="row">{html.escape(title)}{small}</th>{"".join(cells)}</tr>'


def checks(groups: Sequence[Group]) -> str:
    """Returns every group's answers to the four questions, each with the margin that decided it."""
    if not groups:
        return ""
    answers = [report_verdict.checks(group) for group in groups]
    head = "".join(f'<th scope="col">{html.escape(check.question)}</th>' for check in answers[0])
    rows = "".join(
        f'<tr><th scope="row">{html.escape(group.agent_title)}'
        f"<small>{html.escape(group.subtitle)}</small></th>"
        f"{''.join(map(_answer, found))}</tr>"
        for group, found in zip(groups, answers, strict=True)
    )
    note = (
        "Below each answer stands the margin that decided it, with its 95% interval. An agent that keeps several "
        "episodes in context is judged by the last of them, any other by the mean of its episodes: less twice the "
        "random policy's mean, less the data's mean, less the memoryless control's; the largest return less the "
        "null max. Yes and no are said only where the interval lies on one side of zero."
    )
    return (
        '<div class="scroll" role="region" aria-label="Answers" tabindex="0"><table class="checks">'
        f'<thead><tr><th scope="col">Policy</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{html.escape(note)}</p>'
    )


def _answer(check: Check) -> str:
    words = _MARKS.get(check.answer, check.answer.capitalize())
    mark = f'<span class="answer {check.answer.replace(" ", "-")}">{words}</span>'
    detail = f'<small class="margin">{check.margin.render_inline()}</small>' if check.margin else ""
    return f"<td>{mark}{detail}</td>"


def plots(found: Sequence[Plot | None]) -> str:
    """Returns figures side by side where there is room."""
    shown = "".join(_figure(plot) for plot in found if plot is not None)
    return f'<div class="plots">{shown}</div>' if shown else ""


def _figure(plot: Plot) -> str:
    legend = "".join(
        f'<li><i class="{entry.dash}" style="--c: var(--{entry.variable})"></i>'
        f"{html.escape(entry.label)}</li>"
        for entry in plot.legend
    )
    alt = html.escape(plot.alt, quote=True)
    svg = plot.svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    return (
        f'<figure><h3>{html.escape(plot.title)}</h3><ul class="legend">{legend}</ul>{svg}'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
    )


def renders(runs: Sequence[Run]) -> str:
    """Returns the GIFs beside the evaluations, or a sentence that says how to get one."""
    figures, sentences = [], []
    for run in runs:
        folder = run.folder.evaluations_path
        for path in sorted(folder.glob("*.gif")):
            data = base64.b64encode(path.read_bytes()).decode()
            words = html.escape(f"{run.config.data.task}: an episode played by {run.name}", quote=True)
            figures.append(
                f'<figure class="gif"><img alt="{words}" src="data:image/gif;base64,{data}">'
                f"<figcaption>{words} ({html.escape(path.name)})</figcaption></figure>"
            )
        reason = folder / "rendering.txt"
        if reason.is_file():
            sentences.append(reason.read_text().strip())
    if figures:
        return f'<div class="gifs">{"".join(figures)}</div>'
    return "".join(f"<p>{html.escape(text)}</p>" for text in dict.fromkeys(sentences or [_NO_GIF]))


def configurations(runs: Sequence[Run]) -> str:
    """Returns each run's configuration, folded."""
    return "".join(
        f"<details><summary>{html.escape(run.name)}</summary>"
        f"<pre>{html.escape(config_toml.to_toml(run.config))}</pre></details>"
        for run in runs
    )


def versions(runs: Sequence[Run]) -> str:
    """Returns what was installed where, one column for each set of versions that occurs."""
    columns: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        for verb, values in (
            ("trained", run.versions),
            ("evaluated", (run.evaluation or {}).get("versions", {})),
        ):
            if flat := _flat_versions(values):
                columns.setdefault(tuple(flat.items()), []).append(f"{run.name} {verb}")
    if not columns:
        return ""
    names = list(dict.fromkeys(name for column in columns for name, _ in column))
    heads = [", ".join(users) if len(columns) > 1 else "all runs" for users in columns.values()]
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(dict(column).get(name, '–'))}</td>" for column in columns)  # noqa: RUF001
        + "</tr>"
        for name in names
    )
    return (
        '<div class="scroll" role="region" aria-label="Versions" tabindex="0"><table class="versions">'
        f'<thead><tr><th scope="col">Package</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _flat_versions(values: Mapping[str, Any]) -> dict[str, str]:
    packages = values.get("packages", {})
    rest = {k.replace("_", " "): v for k, v in values.items() if k not in ("packages", "command")}
    return {str(name): str(value) for name, value in {**packages, **rest}.items()}


def commands(runs: Sequence[Run]) -> str:
    """Returns the commands that repeat the report's runs."""
    lines = []
    for run in runs:
        config = shlex.quote(str(run.folder.config_path))
        lines.append(_command(run.versions) or f"bpt-rl train {config}")
        if run.evaluation is not None:
            lines.append(_command(run.evaluation) or f"bpt-rl evaluate {shlex.quote(str(run.folder.path))}")
    lines.append(f"bpt-rl report {shlex.join(str(run.folder.path) for run in runs)}")
    return f"<pre>{html.escape(chr(10).join(dict.fromkeys(lines)))}</pre>"


def _command(values: Mapping[str, Any]) -> str:
    command = values.get("command", "")
    return command if isinstance(command, str) else shlex.join(command)
