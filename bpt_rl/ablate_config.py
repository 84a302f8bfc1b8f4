"""Configurations of what makes many runs: a grid of cells, and the demo."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from bpt_rl.collect_config import Algorithm, CollectConfig
from bpt_rl.config import EvaluateConfig, TrainConfig
from bpt_rl.config_checks import not_negative, positive

Axes = Mapping[str, tuple[Any, ...]]
"""Dotted names of settings, like "train.data.num_trajectories" or "evaluate.context_order", each with its values."""

SHARED_FOLDERS = ("cells", "results", "failures", "locks", "logs")
"""Of every folder of cells: what all its grids have in common."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig:
    """A grid of cells, each of them a training and its evaluation."""

    out: str = "runs/ablation"
    """Folder of the cells. Other grids may have the same one: they share cells, and run none twice."""
    name: str = ""
    """Folder within `out` of this grid's own tables and page, those of others of `out` beside it. If empty: on the
    command line the name of CONFIG, without .toml; from Python `out` itself."""
    axes: Axes = dataclasses.field(default_factory=dict)
    """Settings that vary and their values: every combination is a cell. "preset" names presets or TOML files of
    training, which underlie a cell."""
    linked: tuple[Axes, ...] = ()
    """Groups of settings that vary together, with equally many values each, like a task and its store."""
    controls: tuple[Axes, ...] = ()
    """Cells beside the grid, each like one of it but for a change: settings of axes say which cells, by their values,
    and any others are what is changed in them. The page compares each with the cell that it is like."""
    equal: Literal["tokens", "gradient_steps"] = "tokens"
    """What cells share beside the number of gradient steps: trajectories a batch, or chains a batch."""
    seeds_at_once: int = 1
    """Cells that differ in train.seed alone and are trained together, at most so many: faster for small agents."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Settings of every cell, over those of its preset where they are not the default; its batch_size is that of the
    largest count of trajectories. A cell takes those that its agent reads."""
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    """The same of the evaluation."""

    def __post_init__(self) -> None:
        positive(self, "seeds_at_once")
        if self.name in SHARED_FOLDERS or not re.fullmatch(r"(?!\.)[^/\\]*", self.name):
            raise ValueError(
                f"A grid's name must be that of a folder of its own, none of {', '.join(SHARED_FOLDERS)}; "
                f"got {self.name!r}. Use another --name."
            )
        seen: set[str] = set()
        for axis in self.every_axis():
            _check_axis(axis)
            if twice := seen & axis.keys():
                raise ValueError(
                    f"A setting must be on one axis; got {min(twice)} on two. Leave it out of axes or of linked."
                )
            seen |= axis.keys()
        for control in self.controls:
            self._check_control(control)

    def _check_control(self, control: Axes) -> None:
        for name, values in control.items():
            _check_axis({name: values})
            known = next((axis[name] for axis in self.every_axis() if name in axis), values)
            if others := [value for value in values if value not in known]:
                raise ValueError(
                    f"A control must be like a cell of the grid; got {name} {others[0]}, whose axis has "
                    f"{', '.join(map(str, known))}. Add it there, or take another."
                )
        if control.keys() <= set(self.settings()):
            raise ValueError(
                "A control must change a setting that is on no axis; got "
                f"{', '.join(control) or 'none at all'}. Name what sets it apart from its cells of the grid."
            )

    def every_axis(self) -> Iterator[Axes]:
        """Yields the axes of the grid, an unlinked setting as a group of one; the last varies fastest."""
        yield from (group for group in self.linked if group)
        yield from ({name: values} for name, values in self.axes.items())

    def settings(self) -> list[str]:
        """Returns the dotted names of all settings that vary."""
        return [name for axis in self.every_axis() for name in axis]

    def changed(self) -> list[str]:
        """Returns the dotted names of all settings that controls change."""
        axes = self.settings()
        return list(dict.fromkeys(name for control in self.controls for name in control if name not in axes))


def _check_axis(axis: Axes) -> None:
    lengths = {len(values) for values in axis.values()}
    if len(lengths) > 1 or 0 in lengths:
        got = ", ".join(f"{len(values)} of {name}" for name, values in axis.items())
        raise ValueError(
            f"An axis needs a value, and linked settings equally many; got {got}. Name as many of each."
        )
    rows = list(map(repr, zip(*axis.values(), strict=True)))
    if len(set(rows)) < len(rows):
        names = ", ".join(axis)
        raise ValueError(f"An axis must not repeat a value; got {names} = {rows}. Leave one out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateConfig(GridConfig):
    """A grid of runs, and where it runs."""

    launcher: Literal["local", "ray"] = "local"
    """Processes of this machine, or tasks of Ray on a cluster (the extra `ray`)."""
    workers: int = 0
    """Processes of the local launcher; 0 for as many as devices, or cores and memory, allow."""
    workers_per_device: int = 1
    """Cells that share an accelerator, each with its part of the memory."""
    ray_address: str = ""
    """Cluster to connect to, "auto" for the one of this machine; empty starts one of this machine's own."""
    ray_cpus: float = 2.0
    """Cores that Ray holds for a job, and simulators that it may have."""
    ray_gpus: float = 0.0
    """Accelerators that Ray holds for a job; 0.5 puts two on one."""
    ray_memory_gib: float = 0.0
    """Memory that Ray holds for a job; 0 for no request."""
    dry_run: bool = False
    """Print the cells with the time and memory that they should take, and run nothing."""
    report_only: bool = False
    """Write tables and page of the cells that are finished, and run nothing; also while another process runs some."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "workers_per_device", "ray_cpus")
        not_negative(self, "workers", "ray_gpus", "ray_memory_gib")
        if self.dry_run and self.report_only:
            raise ValueError(
                "A grid is planned or reported; got dry_run and report_only together. Leave one of them out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything `bpt-rl demo` does, station by station."""

    out: str = "runs/demo"
    """Folder that receives episodes, store, runs and report."""
    seed: int = 0
    """Of data and training; the environments of the evaluation have 1,000,000 more."""
    collect: CollectConfig = dataclasses.field(default_factory=CollectConfig)
    """What each algorithm records."""
    algorithms: tuple[Algorithm, ...] = ("random", "ornstein_uhlenbeck")
    """Explorers whose episodes make up the data, in equal parts."""
    task: str = "cartpole_swingup"
    """Task that episodes are relabelled for and agents trained on; not the one they were collected for."""
    ablation: GridConfig = dataclasses.field(default_factory=GridConfig)
    """Agentic Transformers over the number of trajectories."""
    dt: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    bc: TrainConfig = dataclasses.field(default_factory=TrainConfig)
