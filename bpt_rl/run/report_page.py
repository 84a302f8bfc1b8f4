"""The report's HTML: one page that loads nothing from anywhere."""

import base64
import html
import shlex
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpt_rl import config_toml
from bpt_rl.run.report_groups import Group, Run
from bpt_rl.run.report_script import POLICY, SCRIPT
from bpt_rl.run.report_style import STYLE
from bpt_rl.run.report_svg import MARKERS, LegendEntry, Plot

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
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
<script>$script</script>
</body>
</html>
""")
_FILM_TYPES = {".gif": "image/gif", ".mp4": "video/mp4"}
_NO_FILM = (
    "No episode was drawn. bpt-rl render RUN --format gif --out RUN/evaluations draws the first and the last of a "
    "chain. Without a display it needs Debian's libegl1 and libgl1-mesa-dri (apt-get install libegl1 "
    "libgl1-mesa-dri) and MUJOCO_GL=egl."
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
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        policy=POLICY,
        style=STYLE,
        lead=lead,
        body=body,
        script=SCRIPT,
    )


def plots(found: Sequence[Plot | None]) -> str:
    """Returns figures side by side where there is room."""
    shown = "".join(_figure(plot) for plot in found if plot is not None)
    return f'<div class="plots">{shown}</div>' if shown else ""


def _figure(plot: Plot) -> str:
    alt = html.escape(plot.alt, quote=True)
    svg = plot.svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    return (
        f'<figure><h3>{html.escape(plot.title)}</h3><ul class="legend">{"".join(map(_key, plot.legend))}</ul>{svg}'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
    )


def _key(entry: LegendEntry) -> str:
    marker = f"<b>{MARKERS[entry.marker]}</b>" if entry.marker else ""
    return (
        f'<li><span class="key" style="--c: var(--{entry.variable})" aria-hidden="true"><i class="{entry.dash}"></i>'
        f"{marker}</span>{html.escape(entry.label)}</li>"
    )


def films(groups: Sequence[Group]) -> str:
    """Returns the films of one run of each group, first and last episode side by side, or says how to get one."""
    filmed = [[pairs for run in group.runs if (pairs := "".join(_pairs(run)))] for group in groups]
    shown = "".join(pairs[0] for pairs in filmed if pairs)
    if shown:
        return f'<div class="films">{shown}</div>'
    reasons = [run.folder.evaluations_path / "rendering.txt" for group in groups for run in group.runs]
    sentences = [reason.read_text().strip() for reason in reasons if reason.is_file()]
    return "".join(f"<p>{html.escape(text)}</p>" for text in dict.fromkeys(sentences or [_NO_FILM]))


def _pairs(run: Run) -> Iterator[str]:
    pairs: dict[str, list[tuple[Path, str]]] = {}
    latest = [path.stem for path in run.folder.evaluation_files()][-1:]
    for path in sorted(run.folder.evaluations_path.glob("*.*")):
        if path.suffix in _FILM_TYPES:
            stem, _, which = path.stem.rpartition("_")
            if which in ("first", "last"):
                # Films of an earlier evaluation would stand beside the numbers of this one.
                if stem in latest:
                    pairs.setdefault(stem, []).append((path, f"{which} episode of a chain"))
            else:
                pairs.setdefault(path.name, []).append((path, "an episode"))
    for films_of_chain in pairs.values():
        shown = "".join(_film(path, f"{words}, played by {run.name}") for path, words in films_of_chain)
        yield f'<div class="pair">{shown}</div>'


def _film(path: Path, words: str) -> str:
    words = html.escape(words[0].upper() + words[1:], quote=True)
    source = f"data:{_FILM_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    shown = f'<img alt="{words}" src="{source}">'
    if path.suffix == ".mp4":
        shown = f'<video aria-label="{words}" src="{source}" controls muted loop playsinline></video>'
    return f'<figure class="film">{shown}<figcaption>{words} ({html.escape(path.name)})</figcaption></figure>'


def configurations(runs: Sequence[Run]) -> str:
    """Returns each run's configuration, folded."""
    return "".join(
        f"<details><summary>{html.escape(run.name)}</summary>"
        f"<pre>{html.escape(config_toml.to_toml(run.config))}</pre></details>"
        for run in runs
    )


def commands(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """Returns the commands that repeat each group's numbers, then those of other runs and of the report."""
    parts = [
        f'<h3 id="repeat-{index}">{html.escape(group.title)}</h3>{_lines(group.runs)}'
        for index, group in enumerate(groups)
    ]
    grouped = {run.name for group in groups for run in group.runs}
    if alone := [run for run in runs if run.name not in grouped]:
        parts.append(f"<h3>Not evaluated</h3>{_lines(alone)}")
    report = f"bpt-rl report {shlex.join(str(run.folder.path) for run in runs)}"
    return "".join(parts) + f"<h3>This page</h3><pre>{html.escape(report)}</pre>"


def _lines(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        config = shlex.quote(str(run.folder.config_path))
        lines.append(_command(run.versions) or f"bpt-rl train {config}")
        if run.evaluation is not None:
            lines.append(_command(run.evaluation) or f"bpt-rl evaluate {shlex.quote(str(run.folder.path))}")
    return f"<pre>{html.escape(chr(10).join(dict.fromkeys(lines)))}</pre>"


def _command(values: Mapping[str, Any]) -> str:
    command = values.get("command", "")
    return command if isinstance(command, str) else shlex.join(command)
