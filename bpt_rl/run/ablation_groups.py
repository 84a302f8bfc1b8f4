"""The finished cells of a grid as its page sees them: seeds together, and numbers of trajectories in families."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bpt_rl.ablate_config import GridConfig
from bpt_rl.config import CHAIN_AGENTS
from bpt_rl.run.grid import Cell
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.report_groups import Group, Run
from bpt_rl.run.report_numbers import count

SEED, TASK = "train.seed", "train.data.task"
COUNT = "trajectories"
"""The axis of their number: of those trained on, else, as for agents trained on a mixture, of the episodes played."""
_COUNTS = ("train.data.num_trajectories", "evaluate.num_episodes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellGroup:
    """Finished cells that differ in their seed alone."""

    values: Mapping[str, Any]
    """Of the axes but that of the seed, by their names."""
    cell: Cell
    """The first."""
    common: str
    """What sets the group apart but for its number of trajectories and its task."""
    group: Group
    """As a report sees it."""
    costs: Sequence[Mapping[str, Any]]
    """One a cell."""
    addresses: Sequence[str]
    num_cells: int
    """Of the grid, those that are not finished counted."""

    @property
    def is_complete(self) -> bool:
        """Whether no seed is missing."""
        return len(self.addresses) == self.num_cells

    @property
    def change(self) -> Mapping[str, Any]:
        """What makes the group a control, by dotted name of the setting; empty for one of the grid itself."""
        return self.cell.change

    @property
    def task(self) -> str:
        """Like walker_run."""
        return self.group.config.data.task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """What varies, a group of linked settings by one of them."""

    name: str
    """`COUNT`, else that of the setting."""
    setting: str
    values: Sequence[Any]

    @property
    def title(self) -> str:
        """Its last word, in words."""
        return words_of(self.name)

    @property
    def varies(self) -> bool:
        """Whether there is anything to tell apart by it."""
        return len(self.values) > 1


def axes_of(config: GridConfig) -> dict[str, Axis]:
    """Returns the axes of a grid by name; linked settings among which are count, seed or task go by it."""
    found = {}
    counted = next((name for name in _COUNTS if name in config.settings()), "")
    for axis in config.every_axis():
        setting = next((name for name in (counted, SEED, TASK) if name in axis), next(iter(axis)))
        name = COUNT if setting == counted else setting
        found[name] = Axis(name=name, setting=setting, values=axis[setting])
    return found


def by_setting(config: GridConfig, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Returns the cells that differ in their seed alone together, in the order of the grid."""
    seeds = {name for axis in config.every_axis() if SEED in axis for name in axis}
    members: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for cell in cells:
        key = tuple((name, repr(value)) for name, value in cell.values.items() if name not in seeds)
        members.setdefault(key, []).append(cell)
    return list(members.values())


def read_groups(config: GridConfig, cells: Sequence[Cell], folder: GridFolder) -> list[CellGroup]:
    """Returns the groups of the finished cells, in the order of the grid."""
    done, axes = folder.finished(), axes_of(config)
    groups = []
    for every in by_setting(config, cells):
        some = [cell for cell in every if cell.address in done]
        if not some:
            continue
        own = some[0].values
        values = {n: own[a.setting] for n, a in axes.items() if a.setting in own and n != SEED}
        varying = {name: value for name, value in values.items() if axes[name].varies}
        common, played = _note(varying | dict(some[0].change)), ""
        if COUNT in values and axes[COUNT].setting == _COUNTS[1]:
            played = count(int(values[COUNT]), "episode")
            if some[0].train.agent not in CHAIN_AGENTS:
                # No episode of it knows of those before.
                values[_COUNTS[1]] = values.pop(COUNT)
        results = [folder.result(cell.address) for cell in some]
        runs = [_run(cell, result, folder) for cell, result in zip(some, results, strict=True)]
        groups.append(
            CellGroup(
                values=values,
                cell=some[0],
                common=common,
                group=Group(runs, ", ".join(filter(None, (played, common)))),
                costs=[result["costs"] for result in results],
                addresses=[cell.address for cell in some],
                num_cells=len(every),
            )
        )
    return groups


def cell_title(config: GridConfig, cell: Cell) -> str:
    """Returns the axes along which a cell may differ from others, in words."""
    return _told(axes_of(config).values(), cell) or cell.title


def setting_title(config: GridConfig, cell: Cell) -> str:
    """Returns the axes along which a cell may differ from others, but for its seed, in words."""
    return _told((axis for name, axis in axes_of(config).items() if name != SEED), cell) or cell.title


def _told(axes: Iterable[Axis], cell: Cell) -> str:
    shown = {
        axis.title: cell.values[axis.setting] for axis in axes if axis.varies and axis.setting in cell.values
    }
    shown |= {words_of(name): value for name, value in cell.change.items()}
    return ", ".join(f"{title} {value}" for title, value in shown.items())


def families(groups: Sequence[CellGroup]) -> list[list[CellGroup]]:
    """Returns groups that differ by their number of trajectories alone, ascending, where there are two or more.

    Controls are in none.
    """
    found: dict[str, list[CellGroup]] = {}
    for group in groups:
        if not group.change and COUNT in group.values:
            rest = {name: value for name, value in group.values.items() if name != COUNT}
            found.setdefault(repr(rest), []).append(group)
    several = [sorted(family, key=lambda g: int(g.values[COUNT])) for family in found.values()]
    return [family for family in several if len(family) > 1]


def family_title(family: Sequence[CellGroup]) -> str:
    """Returns what a family's groups have in common, for a heading."""
    title = family[0].group.agent_title
    return f"{title}, {family[0].common}" if family[0].common else title


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
    return name.rpartition(".")[2].replace("_", " ")
