"""The page of a grid: one HTML file that needs nothing else, no network and no script to be read."""

import dataclasses
import html
import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from bpt_rl import config_toml
from bpt_rl.ablate_config import GridConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.run import ablation_controls, ablation_plots, report_page, report_plots, report_tables
from bpt_rl.run.ablation_controls import beside, controlled
from bpt_rl.run.ablation_groups import (
    COUNT,
    SEED,
    TASK,
    CellGroup,
    axes_of,
    by_setting,
    families,
    family_title,
    read_groups,
    setting_title,
)
from bpt_rl.run.ablation_verdict import verdict
from bpt_rl.run.grid import Cell
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.records import write_atomically
from bpt_rl.run.report_numbers import count
from bpt_rl.run.report_svg import Plot

MOST_PLOTS = 16
"""Of a section and a task; of a grid with more, the first are drawn."""


def write_page(config: GridConfig, cells: Sequence[Cell], folder: GridFolder, *, command: str = "") -> None:
    """Writes the page of a grid's finished cells.

    Args:
      config: The grid.
      cells: Its cells.
      folder: Theirs.
      command: Command line that repeats it.
    """
    groups = beside(read_groups(config, cells, folder))
    axes = list(axes_of(config).values())
    tasks: dict[str, list[CellGroup]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    # Not asked of the folder again: another process may finish a cell between two looks.
    done = {address for group in groups for address in group.addresses}
    sections = [("Cells that are not finished", _unfinished(config, cells, folder, done))]
    number = 0
    for index, (task, some) in enumerate(tasks.items()):
        own = [
            (f"{heading}{f': {task}' if len(tasks) > 1 else ''}", content)
            for heading, content in (
                ("Returns", report_tables.results([g.group for g in some], first=number)),
                ("How many trajectories", _plots(_count_plots(some, f"t{index}"))),
                ("Controls", _controls(some, f"t{index}k")),
                ("Return within the context", _plots(_curves(some, f"t{index}"))),
                ("How the axes act together", _plots(ablation_plots.interactions(some, axes, f"t{index}i"))),
                ("What it took", _costs(some, f"t{index}c")),
            )
        ]
        sections += own
        number += len(some)
    runs = [run for group in groups for run in group.group.runs]
    sections += [
        ("Episodes that the simulator ended", report_tables.failures([g.group for g in groups])),
        ("Versions", _versions(groups)),
        ("To repeat it", _repeat(config, [group for some in tasks.values() for group in some], command)),
    ]
    varied = ", ".join(axis.title for axis in axes if axis.varies and axis.name not in (TASK, SEED))
    title = ": ".join(filter(None, (", ".join(tasks) or "A grid", varied)))
    subtitle = f"{len(runs)} of {count(len(cells), 'cell')} finished.{_partly(config, cells, groups)}"
    page = report_page.page(title, subtitle, verdict(groups, axes), sections)
    write_atomically(folder.page_path, page)


def _partly(config: GridConfig, cells: Sequence[Cell], groups: Sequence[CellGroup]) -> str:
    """Returns how many settings have all seeds, in a sentence; nothing if all have."""
    settings, whole = by_setting(config, cells), [group for group in groups if group.is_complete]
    if len(whole) == len(settings):
        return ""
    num_controls = sum(bool(some[0].change) for some in settings)
    controls = (
        f", {sum(bool(group.change) for group in whole)} of {count(num_controls, 'control')} among them"
    )
    return f" {len(whole)} of {count(len(settings), 'setting')} have all seeds{controls if num_controls else ''}."


def _plots(found: Iterator[Plot | None]) -> str:
    drawn = (plot for plot in found if plot is not None)
    shown = list(itertools.islice(drawn, MOST_PLOTS))
    more = next(drawn, None)
    note = '<p class="note">Only the first are drawn; the numbers of the others are in table.csv.</p>'
    return report_page.plots(shown) + (note if more else "")


def _count_plots(groups: Sequence[CellGroup], prefix: str) -> Iterator[Plot]:
    for index, family in enumerate(families(groups)):
        members = [(int(g.values[COUNT]), g.group) for g in family]
        for plot in report_plots.count_plots(members, f"{prefix}n{index}"):
            yield dataclasses.replace(plot, title=f"{plot.title}, {family_title(family)}")


def _controls(groups: Sequence[CellGroup], prefix: str) -> str:
    return ablation_controls.differences(groups) + _plots(ablation_controls.plots(groups, prefix))


def _curves(groups: Sequence[CellGroup], prefix: str) -> Iterator[Plot | None]:
    several = families(groups)
    for index, family in enumerate(several):
        yield ablation_plots.curves_by_count(family, f"{prefix}e{index}")
    drawn = {id(group) for family in several for group in family}
    drawn |= {id(group) for base, controls in controlled(groups) for group in (base, *controls)}
    alone = [group.group for group in groups if id(group) not in drawn]
    for index, group in enumerate(alone):
        yield report_plots.episode_curve(group, f"{prefix}{index}")


def _costs(groups: Sequence[CellGroup], prefix: str) -> str:
    head = [
        "Policy",
        *("Gradient steps", "Tokens", "Training, s", "Evaluation, s", "Peak memory, GiB", "Device"),
    ]
    rows = [report_tables.text_row(group.group.title, list(_cost_cells(group))) for group in groups]
    note = (
        "Means over seeds. Time of a training is that of the steps that count: what an interruption undid is left out, "
        "compilation is not; seeds trained together share theirs. Cells that ran on one device at once slowed each "
        "other. Memory is the largest that its process ever had, "
        "of the accelerator or of the host without one, and left out where an earlier cell of that process had more."
    )
    lines = {family_title(family): family for family in families(groups)}
    plot = ablation_plots.cost_plot(dict(list(lines.items())[:7]), prefix)
    table = report_tables.table("What it took", "plain", head, ["".join(rows)])
    return f'{table}<p class="note">{html.escape(note)}</p>{report_page.plots([plot])}'


def _cost_cells(group: CellGroup) -> Iterator[str]:
    for name, digits in (
        ("gradient_steps", ",.0f"),
        ("tokens", ",.0f"),
        ("training_seconds", ",.1f"),
        ("evaluation_seconds", ",.1f"),
    ):
        value = ablation_plots.mean_cost(group, name)
        yield "–" if value is None else format(value, digits)  # noqa: RUF001
    memory = ablation_plots.mean_cost(group, "peak_memory_bytes")
    yield "–" if memory is None else f"{memory / GIB:.2f}"  # noqa: RUF001
    yield ", ".join(dict.fromkeys(str(cost["device"]) for cost in group.costs))


def _unfinished(config: GridConfig, cells: Sequence[Cell], folder: GridFolder, done: Container[str]) -> str:
    rows = []
    for some in by_setting(config, cells):
        missing = [cell for cell in some if cell.address not in done]
        if missing:
            finished = f"{len(some) - len(missing)} of {len(some)}"
            why = "; ".join(dict.fromkeys(_why(cell, folder) for cell in missing))
            rows.append(report_tables.text_row(setting_title(config, some[0]), [finished, why]))
    if not rows:
        return ""
    left = sum(cell.address not in done for cell in cells)
    words = (
        f"{count(left, 'cell')} of {len(cells)} missing; <code>bpt-rl ablate</code> of this grid runs them."
    )
    head = ["Setting", "Seeds finished", "Why not the others"]
    return f"<p>{words}</p>{report_tables.table('Cells', 'plain', head, [''.join(rows)])}"


def _why(cell: Cell, folder: GridFolder) -> str:
    failure = folder.failure(cell.address)
    return f"failed {count(failure['tries'], 'time')}: {failure['error']}" if failure else "not run yet"


def _versions(groups: Sequence[CellGroup]) -> str:
    columns: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        for run in group.group.runs:
            versions = (run.evaluation or {}).get("versions", {})
            columns.setdefault(repr(versions), versions)
    flat = [
        {**v.get("packages", {}), **{k: x for k, x in v.items() if isinstance(x, str)}}
        for v in columns.values()
    ]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [report_tables.text_row(n.replace("_", " "), [str(v.get(n, "–")) for v in flat]) for n in names]  # noqa: RUF001
    head = ["Package", *(f"Set {i + 1}" if len(flat) > 1 else "All cells" for i in range(len(flat)))]
    return report_tables.table("Versions", "plain", head, ["".join(rows)]) if rows else ""


def _repeat(config: GridConfig, groups: Sequence[CellGroup], command: str) -> str:
    parts = [f"<pre>{html.escape(command)}</pre>"] if command else []
    parts.append(
        f"<details><summary>The grid</summary><pre>{html.escape(config_toml.to_toml(config))}</pre></details>"
    )
    for index, group in enumerate(groups):
        lines = "\n".join(
            f"{run.folder.path}  result {address}"
            for run, address in zip(group.group.runs, group.addresses, strict=True)
        )
        title = html.escape(f"{group.task}, {group.group.title}")
        parts.append(f'<h3 id="repeat-{index}">{title}</h3><pre>{html.escape(lines)}</pre>')
    return "".join(parts)
