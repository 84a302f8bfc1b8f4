"""The cells of a grid: what each trains and evaluates, and its address, made of its content alone."""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bpt_rl import config_toml
from bpt_rl.ablate_config import GridConfig
from bpt_rl.config import CHAIN_AGENTS, CONDITIONED_AGENTS, EvaluateConfig, TrainConfig
from bpt_rl.datasets.store import Store
from bpt_rl.run.evaluation_record import SCHEMA
from bpt_rl.run.simulated_source import check_simulated
from bpt_rl.td_config import READ_FIELDS, TD_AGENTS

CELL_SCHEMA = 2
"""Raised when the same settings would give other numbers: then no cell that was finished before counts any more."""
_log = logging.getLogger(__name__)
Recorded = Callable[[], Mapping[str, Collection[str]]]
"""Returns, by task, the digests of the stores that finished cells were trained on."""
_COUNT, _BATCH = "train.data.num_trajectories", "train.data.batch_size"
_NO_PART = ("run", "checkpoint_every", "keep_checkpoints", "log_every", "logger", "data.store", "num_workers")
"""Settings that no number depends on, beside those of the mesh; of the store the content counts."""
_ONCE_DEFAULT: Mapping[type, Mapping[str, Any]] = {EvaluateConfig: {"seed": 1_000_000}}
"""Settings whose default has changed, and what it was: an address leaves out that value and no other, so that cells
finished before are still known."""
_OF_CONTEXT = ("context_order", "num_context_trajectories", "context_capacity", "full_context")
_OF_TARGET = (
    "target",
    "target_quantile",
    "target_value",
    "target_multiple",
    "target_sweep",
    "sweep_episodes",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of a grid."""

    values: Mapping[str, Any]
    """Of the settings that vary and that the agent reads, by dotted name."""
    change: Mapping[str, Any]
    """Those of them that make it a control; empty for a cell of the grid itself."""
    train: TrainConfig
    """Its run is the folder's own name: where it lies is not part of a cell."""
    evaluate: EvaluateConfig
    training: str
    """Address of the training: cells that are evaluated in different ways share it."""
    address: str

    @property
    def title(self) -> str:
        """The settings that vary, in words."""
        named = [f"{name.rpartition('.')[2]} {value}" for name, value in self.values.items()]
        return ", ".join(named) or self.train.run

    def setting(self, name: str) -> Any:
        """Returns any setting of training or evaluation by its dotted name; None for what is not read."""
        if name == "preset" or not _is_read(self.train.agent, name):
            return None
        return functools.reduce(getattr, name.split("."), self)


def expand(config: GridConfig, recorded: Recorded | None = None) -> list[Cell]:
    """Returns the cells of a grid, each once, the last axis varying fastest; then those of its controls.

    A cell takes of the settings those that its agent reads. So an agent that learns from single transitions has one
    cell where others have one for each number of trajectories. With `equal = "tokens"` the chains of a batch shrink as
    the trajectories of a chain grow, so that every cell trains on equally many trajectories a step.

    Args:
      config: The grid.
      recorded: Says of a store that is not there what it was, so that its finished cells are known.

    Raises:
      FileNotFoundError: If a preset does not exist, or a store of which nothing is recorded.
      ValueError: If an axis is no setting, a value does not fit, a batch is no whole number of chains, a store
        lacks the task or its simulator, or several are recorded for the one that is not there.
    """
    names = _setting_names()
    for name in config.settings() + config.changed():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"An axis must be a setting of a cell; got {name!r}. Nearest valid one: {near!r}."
            )
    stores, fixed = _Stores(recorded), _Fixed(config)
    found: dict[str, Cell] = {}
    for values in _combinations(config):
        cell = _cell(config, fixed.below(values), values, stores)
        # The first counts: a change that its agent does not read makes no control.
        found.setdefault(cell.address, cell)
    return list(found.values())


def _setting_names() -> list[str]:
    names = [*_fields(TrainConfig(), "train."), *_fields(EvaluateConfig(), "evaluate.")]
    return ["preset", *(name for name in names if name not in ("train.run", "evaluate.num_workers"))]


def _combinations(config: GridConfig) -> Iterator[dict[str, Any]]:
    axes = [
        [dict(zip(axis, row, strict=True)) for row in zip(*axis.values(), strict=True)]
        for axis in config.every_axis()
    ]
    combinations = [
        {name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)
    ]
    yield from combinations
    changed = config.changed()
    for control in config.controls:
        chosen = {name: values for name, values in control.items() if name not in changed}
        changes = {name: values for name, values in control.items() if name in changed}
        for values in combinations:
            if all(values[name] in some for name, some in chosen.items()):
                for row in itertools.product(*changes.values()):
                    yield values | dict(zip(changes, row, strict=True))


def _cell(config: GridConfig, fixed: Mapping[str, Any], values: Mapping[str, Any], stores: "_Stores") -> Cell:
    settings = {**fixed, **{name: value for name, value in values.items() if name != "preset"}}
    if config.equal == "tokens" and settings.get("train.agent") not in TD_AGENTS:
        _equalise(config, settings)
    agent = settings.get("train.agent", TrainConfig().agent)
    read = {name: value for name, value in settings.items() if _is_read(agent, name)}
    try:
        made = config_toml.from_mapping(_Settings, _nested(read))
    except ValueError as error:
        words = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        raise ValueError(f"{error} (In the cell of {words or 'all defaults'}.)") from error
    digest = stores.digest(made.train.data.store, made.train.data.task)
    training = _address([CELL_SCHEMA, digest, _content(made.train)])
    own = {name: value for name, value in values.items() if _is_read(agent, name)}
    changed = config.changed()
    return Cell(
        values=own,
        change={name: value for name, value in own.items() if name in changed},
        train=dataclasses.replace(made.train, run=f"{_readable(made.train)}-{training[:10]}"),
        evaluate=made.evaluate,
        training=training,
        address=_address([training, SCHEMA, _content(made.evaluate)]),
    )


def _content(config: TrainConfig | EvaluateConfig) -> dict[str, Any]:
    """Returns the settings that count and are not the default: one that did not exist yet was not said either."""
    unsaid = _unsaid()[type(config)]
    return {
        name: value
        for name, value in _fields(config).items()
        if value != unsaid[name] and name not in _NO_PART and not name.startswith("mesh.")
    }


@functools.cache
def _unsaid() -> dict[type, dict[str, Any]]:
    """Returns the values that addresses leave out."""
    return {kind: {**fields, **_ONCE_DEFAULT.get(kind, {})} for kind, fields in _defaults().items()}


def _said(config: TrainConfig | EvaluateConfig) -> dict[str, Any]:
    """Returns the settings that are not the default, by dotted name."""
    unsaid = _defaults()[type(config)]
    return {name: value for name, value in _fields(config).items() if value != unsaid[name]}


@functools.cache
def _defaults() -> dict[type, dict[str, Any]]:
    return {kind: _fields(kind()) for kind in (TrainConfig, EvaluateConfig)}


class _Fixed:
    """What lies below the axes: the settings of the grid that are not the default, over those of a preset."""

    def __init__(self, config: GridConfig) -> None:
        said = {"train": _said(config.train), "evaluate": _said(config.evaluate)}
        self._own = {f"{group}.{name}": value for group in said for name, value in said[group].items()}
        self._presets: dict[str, dict[str, Any]] = {}

    def below(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings by dotted name."""
        preset = values.get("preset", "")
        if preset and preset not in self._presets:
            self._presets[preset] = _fields(config_toml.load(TrainConfig, preset), "train.")
        return self._presets.get(preset, {}) | self._own


def _fields(owner: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the fields of nested dataclasses by dotted name; `asdict` copies, a thousand cells over a second long."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        is_group = dataclasses.is_dataclass(value)
        found |= _fields(value, f"{prefix}{field.name}.") if is_group else {prefix + field.name: value}
    return found


def _equalise(config: GridConfig, settings: dict[str, Any]) -> None:
    counts = next((axis[_COUNT] for axis in config.every_axis() if _COUNT in axis), ())
    if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
        return  # The cell itself says what is wrong with such a count.
    total = settings.get(_BATCH, TrainConfig().data.batch_size) * max(counts)
    settings[_BATCH], rest = divmod(total, settings[_COUNT])
    if rest:
        raise ValueError(
            f"Equal tokens need a whole number of chains in every batch; got {total} trajectories a batch "
            f"and chains of {settings[_COUNT]}. Use counts that divide {total}, or equal = 'gradient_steps'."
        )


def _is_read(agent: str, name: str) -> bool:
    """Returns whether a setting means something to an agent; `train` and `evaluate` refuse others, or ignore them."""
    room, _, rest = name.partition(".")
    group = rest.partition(".")[0]
    if group == "mesh":
        return agent in (*CHAIN_AGENTS, *CONDITIONED_AGENTS)
    if room == "train":
        if agent in TD_AGENTS:
            return group not in ("data", "model", "optimizer") or rest in READ_FIELDS
        return group != "td"
    if room == "evaluate" and rest in _OF_CONTEXT:
        return agent in CHAIN_AGENTS
    if room == "evaluate" and rest in _OF_TARGET:
        return agent in CONDITIONED_AGENTS
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)


class _Stores:
    """Digests of the stores that a grid reads, each opened once for a task."""

    def __init__(self, recorded: Recorded | None) -> None:
        self._recorded = recorded
        self._digests: dict[tuple[str, str], str] = {}

    def digest(self, path: str, task: str) -> str:
        if (path, task) not in self._digests:
            self._digests[path, task] = self._read(path, task)
        return self._digests[path, task]

    def _read(self, path: str, task: str) -> str:
        try:
            store = Store.open(path)
        except FileNotFoundError:
            if self._recorded is None or not (known := sorted(self._of_finished.get(task, ()))):
                raise
            if len(known) > 1:
                raise ValueError(
                    f"A store that is not there is told by the finished cells of its task, which must share one; "
                    f"got {', '.join(digest[:8] for digest in known)} for {task} and none at {path}. Build it."
                ) from None
            _log.warning(
                "No store is at %s: cells of %s are those of the store %s.", path, task, known[0][:8]
            )
            return known[0]
        with store:
            check_simulated(store.source)
            store.returns(task)  # It refuses a task that the store lacks.
            return store.digest

    @functools.cached_property
    def _of_finished(self) -> Mapping[str, Collection[str]]:
        return self._recorded() if self._recorded else {}


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        *groups, last = name.split(".")
        table = found
        for group in groups:
            table = table.setdefault(group, {})
        table[last] = value
    return found


def _address(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _readable(train: TrainConfig) -> str:
    count = "" if train.agent in TD_AGENTS else f"_n{train.data.num_trajectories}"
    return f"{train.agent}_{train.data.task}{count}_seed{train.seed}"


def trainings(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Returns the cells of each training by its address, in their order."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.training, []).append(cell)
    return found
