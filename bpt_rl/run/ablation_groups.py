"""The finished cells of a grid as its page sees them: seeds together, and numbers of trajectories in families."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bpt_rl.ablate_config import GridConfig
from bpt_rl.run.grid import Cell
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.report_groups import Group, Run

COUNT, SEED, TASK = "train.data.num_trajectories", "train.seed", "train.data.task"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellGroup:
    """Finished cells that differ in their seed alone."""

    values: Mapping[str, Any]
    """Of the axes but that of the seed, by the first setting of each."""
    group: Group
    """As a report sees it."""
    costs: Sequence[Mapping[str, Any]]
    """One a cell."""
    addresses: Sequence[str]

    @property
    def task(self) -> str:
        """Like walker_run."""
        return self.group.config.data.task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """What varies, a group of linked settings by its first."""

    name: str
    values: Sequence[Any]

    @property
    def title(self) -> str:
        """Its last word, in words."""
        return words_of(self.name)


def axes_of(config: GridConfig) -> dict[str, Axis]:
    """Returns the axes of a grid by name; those that hold count, seed or task have these names."""
    found = {}
    for axis in config.every_axis():
        name = next((name for name in (COUNT, SEED, TASK) if name in axis), next(iter(axis)))
        found[name] = Axis(name=name, values=axis[name])
    return found


def read_groups(config: GridConfig, cells: Sequence[Cell], folder: GridFolder) -> list[CellGroup]:
    """Returns the groups of the finished cells, in the order of the grid."""
    done, axes = folder.finished(), axes_of(config)
    members: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for cell in cells:
        if cell.address in done:
            key = tuple((name, repr(value)) for name, value in cell.values.items() if name != SEED)
            members.setdefault(key, []).append(cell)
    groups = []
    for some in members.values():
        values = {n: v for n, v in some[0].values.items() if n in axes and n != SEED}
        results = [folder.result(cell.address) for cell in some]
        runs = [_run(cell, result, folder) for cell, result in zip(some, results, strict=True)]
        groups.append(
            CellGroup(
                values=values,
                group=Group(runs, _note(values)),
                costs=[result["costs"] for result in results],
                addresses=[cell.address for cell in some],
            )
        )
    return groups


def families(groups: Sequence[CellGroup]) -> list[list[CellGroup]]:
    """Returns groups that differ by their number of trajectories alone, ascending, where there are two or more."""
    found: dict[str, list[CellGroup]] = {}
    for group in groups:
        if COUNT in group.values:
            rest = {name: value for name, value in group.values.items() if name != COUNT}
            found.setdefault(repr(rest), []).append(group)
    several = [sorted(family, key=lambda g: int(g.values[COUNT])) for family in found.values()]
    return [family for family in several if len(family) > 1]


def family_title(family: Sequence[CellGroup]) -> str:
    """Returns what a family's groups have in common, for a heading."""
    group = family[0].group
    return f"{group.agent_title}, {group.note}" if group.note else group.agent_title


def _run(cell: Cell, result: Mapping[str, Any], folder: GridFolder) -> Run:
    run_folder = folder.run_folder(cell.train.run)
    return Run(
        folder=run_folder,
        config=dataclasses.replace(cell.train, run=str(run_folder.path)),
        statistics=None,
        versions={},
        metrics=(),
        evaluation=result["record"],
    )


def _note(values: Mapping[str, Any]) -> str:
    told = {name: value for name, value in values.items() if name not in (COUNT, TASK, "train.agent")}
    return ", ".join(f"{words_of(name)} {value}" for name, value in told.items())


def words_of(name: str) -> str:
    """Returns a setting's last word, in words."""
    return "trajectories" if name == COUNT else name.rpartition(".")[2].replace("_", " ")
