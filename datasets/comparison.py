"""Datasets of one domain side by side: how far they cover its states, and what their episodes earn under every task."""

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bpt_rl.datasets import coverage
from bpt_rl.datasets.description import describe_survey
from bpt_rl.datasets.survey import Dataset, Survey

_STATISTICS = {"mean": "mean", "quantile_95": "95%", "max": "best"}


def check_comparable(datasets: Sequence[Dataset], against: str = "random") -> None:
    """Refuses datasets that cannot stand side by side, before their episodes are read.

    Args:
      datasets: From `survey.identify`.
      against: Label of the one that others are measured by; "random" may be missing, another may not.

    Raises:
      ValueError: If they are of several domains, one is named twice, or none is labelled `against`.
    """
    domains: dict[str, str] = {}
    for dataset in datasets:
        domains.setdefault(dataset.domain, dataset.path)
    if len(domains) > 1:
        named = ", ".join(f"{name} ({path})" for name, path in domains.items())
        raise ValueError(
            f"Datasets must be of one domain to be compared; got {named}. Compare those of one at a time."
        )
    places = [Path(dataset.path).resolve() for dataset in datasets]
    twice = [dataset.path for dataset, place in zip(datasets, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ValueError(f"Each dataset must be named once; got {' and '.join(twice)}. Leave one out.")
    known = labels(datasets)
    if against not in ["random", *known]:
        raise ValueError(
            f"against must be one of the datasets, {', '.join(known)}; got {against!r}. Name one of them."
        )


def labels(datasets: Sequence[Dataset]) -> list[str]:
    """Returns a short name for each: its collector, or where collectors are alike what its path has of its own."""
    algorithms = [dataset.algorithm for dataset in datasets]
    alike = [dataset.path for dataset in datasets if algorithms.count(dataset.algorithm) > 1]
    shared = os.path.commonpath([Path(path).absolute() for path in alike]) if alike else ""
    return [
        os.path.relpath(dataset.path, shared) if dataset.path in alike else dataset.algorithm
        for dataset in datasets
    ]


def compare(surveys: Sequence[Survey], against: str = "random") -> dict[str, Any]:
    """Returns datasets side by side as plain values.

    The coverage of all is measured with as many states as the smallest has: the estimate depends on their number.

    Args:
      surveys: Of datasets that `check_comparable` passes.
      against: Label of the dataset that `comparison_text` subtracts.
    """
    num_states = min(len(survey.states) for survey in surveys)
    datasets = {
        label: describe_survey(survey, num_states)
        for label, survey in zip(labels([survey.dataset for survey in surveys]), surveys, strict=True)
    }
    return {
        "domain": surveys[0].dataset.domain,
        "against": against if against in datasets else None,
        "datasets": datasets,
    }


def comparison_text(compared: Mapping[str, Any], width: int | None = None) -> str:
    """Returns `compare`'s values as two tables, with differences in brackets.

    Args:
      compared: From `compare`.
      width: Characters a line; the terminal's if None, or 80 where there is none.
    """
    console = Console(file=io.StringIO(), width=width or shutil.get_terminal_size().columns)
    with console.capture() as captured:
        console.print(_sizes(compared))
        console.print(_returns(compared))
        console.print(_notes(compared), highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)


def _sizes(compared: Mapping[str, Any]) -> Table:
    table = _table(f"{compared['domain']}: states covered")
    table.add_column("dataset", overflow="fold")
    table.add_column("subset", overflow="fold")
    for name in ("episodes", "steps", "coverage (nats)"):
        table.add_column(name, justify="right", no_wrap=True)
    base = compared["datasets"].get(compared["against"])
    for label, dataset in compared["datasets"].items():
        table.add_row(
            label,
            dataset["subset"],
            f"{dataset['num_episodes']:,}",
            f"{dataset['num_steps']:,}",
            _nats(dataset, base),
        )
    return table


def _nats(dataset: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    found, other = dataset["coverage"], base["coverage"] if base else None
    if not found:
        return "-"
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.2f}"
    difference = _difference(found["nats"], other["nats"] if other else None, ".2f", base is dataset)
    return f"{found['nats']:.2f}{error}{difference}"


def _difference(value: float, base: float | None, form: str, is_base: bool) -> str:
    return "" if base is None or is_base else f" ({value - base:+{form}})"


def _returns(compared: Mapping[str, Any]) -> Table:
    table = _table("Return of an episode")
    table.add_column("task, dataset", overflow="fold")
    for title in _STATISTICS.values():
        table.add_column(title, justify="right", no_wrap=True)
    datasets = compared["datasets"]
    base = datasets.get(compared["against"])
    for task in dict.fromkeys(task for dataset in datasets.values() for task in dataset["returns"]):
        table.add_section()
        table.add_row(task)
        for label, dataset in datasets.items():
            found = dataset["returns"].get(task)
            other = base["returns"].get(task) if base else None
            cells = [
                f"{found[name]:.1f}{_difference(found[name], other and other[name], '.1f', base is dataset)}"
                if found
                else "-"
                for name in _STATISTICS
            ]
            table.add_row(f"  {label}", *cells)
    return table


def _notes(compared: Mapping[str, Any]) -> str:
    measured = [dataset["coverage"] for dataset in compared["datasets"].values() if dataset["coverage"]]
    lines = []
    if measured:
        scales = ", ".join(f"{name} / {scale:g}" for name, scale in measured[0]["scales"].items())
        lines.append(
            f"Coverage: entropy of {scales}, from the {coverage.NUM_NEIGHBOURS} nearest neighbours of "
            f"{measured[0]['num_states']:,} states, ± the standard error over episodes. Compare datasets of as many "
            "steps."
        )
    if compared["against"]:
        lines.append(f"In brackets: less that of {compared['against']}.")
    return "\n".join(lines)
