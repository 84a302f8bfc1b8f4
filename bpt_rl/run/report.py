"""Writes what run folders show as one HTML file that needs nothing else: no network, and no script to be read."""

import html
from collections.abc import Sequence
from pathlib import Path

from bpt_rl.run import report_page, report_plots, report_seeds, report_tables, report_verdict
from bpt_rl.run.records import write_atomically
from bpt_rl.run.report_groups import AGENT_TITLES, Group, Run, group_runs, read_runs
from bpt_rl.run.report_numbers import count


def write_report(run_folders: Sequence[Path], out: Path) -> Path:
    """Writes the report of some runs of one task and returns its path.

    The latest evaluation of each run counts. Runs that differ by their seed alone make one row of the tables.
    The same folders give the same bytes.

    Args:
      run_folders: Folders that `bpt-rl train` wrote. Runs not yet evaluated only show their training.
      out: HTML file to write, or a folder that receives `report.html`.

    Raises:
      FileNotFoundError: If a folder is missing or is no run folder.
      ValueError: If there is no folder, the tasks differ, or two runs have the same settings and seed.
    """
    runs = read_runs(run_folders)
    groups = group_runs(runs)
    path = out / "report.html" if out.is_dir() else out
    write_atomically(path, render(runs, groups))
    return path


def render(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """Returns the report as HTML."""
    task = groups[0].evaluation["task"] if groups else runs[0].config.data.task
    curves = [report_plots.episode_curve(group, index) for index, group in enumerate(groups)]
    training = [report_plots.histogram(runs, groups), report_plots.loss_curves(runs, groups)]
    asked = [report_plots.calibration(group, index) for index, group in enumerate(groups)]
    sections = [
        ("Returns", report_tables.results(groups)),
        ("Episodes that the simulator ended", report_tables.failures(groups)),
        ("What the numbers say", report_tables.checks(groups)),
        ("Seeds against seeds", report_seeds.seeds(groups)),
        ("Return within the context", report_page.plots(curves)),
        ("Return asked for, return obtained", report_page.plots(asked)),
        ("How many trajectories", report_page.plots(report_plots.ablations(groups))),
        ("Data and training", report_page.plots(training) + _not_evaluated(runs)),
        ("Episodes on film", report_page.films(groups)),
        ("What differs between the runs", report_tables.differences(runs)),
        ("Configuration", report_page.configurations(runs)),
        ("Versions", report_tables.versions(runs)),
        ("To repeat it", report_page.commands(runs, groups)),
    ]
    return report_page.page(
        f"{task}: offline RL in long contexts", _subtitle(runs), report_verdict.verdict(groups), sections
    )


def _subtitle(runs: Sequence[Run]) -> str:
    used = sorted(
        {run.config.agent for run in runs}, key=[*AGENT_TITLES, *(r.config.agent for r in runs)].index
    )
    agents = [AGENT_TITLES.get(agent, agent.upper()) for agent in used]
    return f"{', '.join(agents)}. {count(len(runs), 'training run')}."


def _not_evaluated(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs if run.evaluation is None]
    if not names:
        return ""
    return f'<p class="note">Not evaluated yet: {html.escape(", ".join(names))}.</p>'
