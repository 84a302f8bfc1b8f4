"""The tables of a grid as CSV: `table.csv` with its numbers, `costs.csv` with what they took."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpt_rl.run import protocols
from bpt_rl.run.grid import Cell
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.records import log_from_json, write_atomically
from bpt_rl.td_config import TD_AGENTS

COSTS = (
    "gradient_steps",
    "tokens",
    "training_seconds",
    "trained_together",
    "evaluation_seconds",
    "peak_memory_bytes",
    "device",
    "host",
)
"""Columns of costs.csv behind those that name the cell; empty where it is not known. Seconds of cells that were trained
together are of all of them."""


def write_tables(cells: Sequence[Cell], folder: GridFolder) -> None:
    """Writes both tables of the finished cells, in the order of the grid.

    `table.csv` has a row for each number: of a cell, what was rolled out (`chain`, `memoryless`, `random`), and the
    protocol that the number is read by, with its 95% interval over chains; the rows of protocol `episode` are the
    curve within the context. It has no times, so that it comes out the same however often a grid is interrupted.
    """
    done = folder.finished()
    results = [(cell, folder.result(cell.address)) for cell in cells if cell.address in done]
    names = list(dict.fromkeys(name for cell in cells for name in cell.values))
    changed = {name for cell in cells for name in cell.change}

    def values_of(cell: Cell) -> dict[str, Any]:
        # What a control changes, the others have too.
        return {name: cell.setting(name) for name in changed} | dict(cell.values)

    rows = [values_of(cell) | row for cell, result in results for row in _number_rows(cell, result)]
    _write(folder.table_path, [*names, *_COLUMNS], rows)
    costs = [
        {**values_of(cell), **_naming(cell), **{n: result["costs"][n] for n in COSTS}}
        for cell, result in results
    ]
    _write(folder.costs_path, [*names, *_NAMING, *COSTS], costs)


_NAMING = ("agent", "task", "num_trajectories", "seed", "run", "address")
_COLUMNS = (
    *_NAMING,
    "subset",
    "rolled_out",
    "protocol",
    "episode",
    "value",
    "low",
    "high",
    "num_chains",
    "num_episodes",
    "target_return",
)


def _naming(cell: Cell) -> dict[str, Any]:
    train = cell.train
    return {
        "agent": train.agent,
        "task": train.data.task,
        "num_trajectories": None if train.agent in TD_AGENTS else train.data.num_trajectories,
        "seed": train.seed,
        "run": train.run,
        "address": cell.address,
    }


def _number_rows(cell: Cell, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    record = result["record"]
    for context, estimates in record["estimates"].items():
        log = record["logs"][context]
        common = {
            **_naming(cell),
            "subset": record["data"]["subset"],
            "rolled_out": context,
            "num_chains": record["num_chains"],
            "num_episodes": record["num_episodes"],
            "target_return": log["target_return"],
        }
        for name in protocols.PROTOCOLS:
            yield {**common, "protocol": name, **estimates[name]}
        if context == "memoryless":
            null = protocols.null_max(log_from_json(log), record["num_episodes"])
            bounds = {"low": null.low, "high": null.high} if null.has_interval else {}
            yield {**common, "protocol": "null_max", "value": null.value, **bounds}
        for index, value in enumerate(estimates["curve"]):
            yield {**common, "protocol": "episode", "episode": index + 1, "value": value}


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
