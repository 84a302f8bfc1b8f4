"""Run folders as a report sees them: the latest evaluation of each, seeds of one experiment together."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpt_rl.config import CHAIN_AGENTS, TrainConfig
from bpt_rl.run.records import RunFolder, log_from_json
from bpt_rl.types import DataStatistics, EpisodeFailure, EpisodeLog

AGENT_TITLES = {
    "at": "Agentic Transformer",
    "dt": "Decision Transformer",
    "ad": "Algorithm distillation",
    "bc": "Behaviour cloning",
}
"""In the order of the tables; other agents follow under the names of their configuration."""
_WITH_CONTEXT = (*CHAIN_AGENTS, "dt")
SCHEMA = 2
_WITHOUT_EFFECT = ("run", "seed", "checkpoint_every", "keep_checkpoints", "log_every", "logger")
"""Fields of a run's configuration that cannot change what its agent learns, and the seed."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder, read."""

    folder: RunFolder
    config: TrainConfig
    statistics: DataStatistics | None
    versions: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]
    evaluation: Mapping[str, Any] | None
    """The latest, or None."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.path.resolve().name

    def log(self, context: str) -> EpisodeLog | None:
        """Returns the latest evaluation's log of a context, if it was rolled out."""
        logs = self.evaluation["logs"] if self.evaluation else {}
        return log_from_json(logs[context]) if context in logs else None


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ by their training seed alone, evaluated alike."""

    runs: Sequence[Run]
    note: str = ""
    """Settings that tell this group from others of the same agent and trajectory count."""

    @property
    def config(self) -> TrainConfig:
        """Configuration of the first run."""
        return self.runs[0].config

    @property
    def agent_title(self) -> str:
        """The agent's name in full."""
        return AGENT_TITLES.get(self.config.agent, self.config.agent.upper())

    @property
    def subtitle(self) -> str:
        """What the agent was shown, and what else sets the group apart."""
        data = self.config.data
        if self.config.agent not in _WITH_CONTEXT:
            seen = (
                f"best {data.top_fraction:.0%} of the episodes" if data.top_fraction < 1 else "all episodes"
            )
        else:
            seen = f"{data.num_trajectories} {'trajectory' if data.num_trajectories == 1 else 'trajectories'}"
        return f"{seen}, {self.note}" if self.note else seen

    @property
    def title(self) -> str:
        """The group's name on a line."""
        return f"{self.agent_title}, {self.subtitle}"

    @property
    def short_title(self) -> str:
        """The title for a legend."""
        name = self.config.agent.upper()
        data = self.config.data
        if self.config.agent not in _WITH_CONTEXT:
            name = name if data.top_fraction == 1 else f"{name}-{data.top_fraction:.0%}"
        else:
            name = f"{name} n={data.num_trajectories}"
        return f"{name}, {self.note}" if self.note else name

    @functools.cached_property
    def evaluation(self) -> Mapping[str, Any]:
        """The first run's evaluation; the others' have the same settings."""
        evaluation = self.runs[0].evaluation
        if evaluation is None:
            raise ValueError(
                f"A group's numbers need an evaluation; {self.title} has none. Run `bpt-rl evaluate`."
            )
        return evaluation

    @property
    def shares_start_states(self) -> bool:
        """Whether several training seeds were played from the same start states: they are a smaller sample then."""
        played = [run.evaluation["environment_seed"] for run in self.runs if run.evaluation is not None]
        return len(set(played)) < len(played)

    @property
    def shown(self) -> str:
        """The dataset trajectories that stood in context before the first episode, in words; empty if none did."""
        context = self.evaluation["context"]
        number = context["num_trajectories"]
        if not number:
            return ""
        return f"shown {number} {'trajectory' if number == 1 else 'trajectories'} of the data, {context['order']}"

    @functools.cached_property
    def asks(self) -> bool:
        """Whether the agent is asked for a return."""
        return not any(math.isnan(log.target_return) for log in self.logs("chain"))

    @functools.cached_property
    def sweep(self) -> list[tuple[float, list[EpisodeLog]]]:
        """Targets that every run tried beside its own, ascending, with a log of each run."""
        tried = [
            {
                entry["target_return"]: log_from_json(entry["log"])
                for entry in (run.evaluation or {"sweep": ()})["sweep"]
            }
            for run in self.runs
        ]
        shared = sorted(target for target in tried[0] if all(target in other for other in tried))
        return [(target, [logs[target] for logs in tried]) for target in shared]

    def failures(self, context: str) -> list[tuple[Run, EpisodeFailure]]:
        """Returns the episodes of a context that their simulator ended, each with a run; see `logs` for `random`."""
        found = [(run, f) for run in self.runs if (log := run.log(context)) for f in log.failures]
        return list({f: (run, f) for run, f in reversed(found)}.values()) if context == "random" else found

    def sweep_failures(self) -> list[tuple[Run, float, EpisodeFailure]]:
        """Returns the episodes of `sweep` that their simulator ended, each with its run and target."""
        return [
            (run, target, failure)
            for target, logs in self.sweep
            for run, log in zip(self.runs, logs, strict=True)
            for failure in log.failures
        ]

    @property
    def has_memory(self) -> bool:
        """Whether a context can hold more than one episode, so that clearing it makes a difference."""
        return self.config.agent in CHAIN_AGENTS and self.evaluation["num_episodes"] > 1

    @property
    def chain_title(self) -> str:
        """What the log `chain` is, in a word or two."""
        if self.config.agent not in _WITH_CONTEXT:
            return "No context"
        return "Context kept" if self.has_memory else "One episode in context"

    def memoryless_logs(self) -> list[EpisodeLog]:
        """Returns logs of episodes that know nothing of each other: the control's, or the agent's own."""
        return self.logs("memoryless") if self.has_memory else self.logs("chain")

    def logs(self, context: str) -> list[EpisodeLog]:
        """Returns a log of each run, or none at all where a run lacks it.

        Random actions do not depend on the training seed: where two runs played the same ones, the log counts
        once, since the same sample taken twice would shorten every interval.
        """
        found: list[EpisodeLog] = []
        for run in self.runs:
            log = run.log(context)
            if log is None:
                return []
            repeated = any(np.array_equal(log.returns, other.returns) for other in found)
            if context != "random" or not repeated:
                found.append(log)
        return found


def read_run(path: Path) -> Run:
    """Returns what a report needs of a run folder.

    Raises:
      FileNotFoundError: If the folder is missing or is no run folder.
      ValueError: If its latest evaluation has another schema.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"A report is made of run folders; there is no folder {path}. Name what `bpt-rl train` wrote."
        )
    folder = RunFolder(path)
    config = folder.config()
    evaluations = folder.evaluations()
    latest = evaluations[-1] if evaluations else None
    if latest is not None and latest.get("schema") != SCHEMA:
        raise ValueError(
            f"An evaluation must have schema {SCHEMA}; the latest of {path} has {latest.get('schema')!r}. "
            "Evaluate the run again with this version."
        )
    return Run(
        folder=folder,
        config=config,
        statistics=folder.statistics() if (path / "statistics.json").is_file() else None,
        versions=folder.versions() if (path / "versions.json").is_file() else {},
        metrics=folder.metrics(),
        evaluation=latest,
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Returns the runs of a report, each folder once.

    Raises:
      ValueError: If no folder is named, or the runs are of different tasks.
    """
    unique = list({path.resolve(): path for path in paths}.values())
    if not unique:
        raise ValueError("A report needs a run folder; got none. Name what `bpt-rl train` wrote.")
    runs = [read_run(path) for path in unique]
    tasks = sorted({run.evaluation["task"] if run.evaluation else run.config.data.task for run in runs})
    if len(tasks) > 1:
        raise ValueError(
            f"The runs of a report must share a task; got {', '.join(tasks)}. Write one report a task."
        )
    return _share_random(runs)


def _share_random(runs: Sequence[Run]) -> list[Run]:
    """Random actions depend on no run: where one evaluation played them, equal ones need not play them again."""

    def plays(evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(
            evaluation[name] for name in ("environment_seed", "action_repeat", "num_chains", "num_episodes")
        )

    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    played = {plays(e): e["logs"]["random"] for e in evaluations if "random" in e["logs"]}
    shared = []
    for run in runs:
        evaluation = run.evaluation
        if evaluation is not None and "random" not in evaluation["logs"] and plays(evaluation) in played:
            logs = {**evaluation["logs"], "random": played[plays(evaluation)]}
            run = dataclasses.replace(run, evaluation={**evaluation, "logs": logs})
        shared.append(run)
    return shared


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Returns the evaluated runs, grouped, in the order of their agents and trajectory counts.

    Raises:
      ValueError: If two runs of a group have the same seed: they would be counted as two samples.
    """
    members: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if run.evaluation is not None:
            members.setdefault(tuple(settings(run).items()), []).append(run)
    for group in members.values():
        _check_seeds(group)
    keys = [dict(key) for key in members]
    groups = [Group(runs, _note(dict(key), keys)) for key, runs in members.items()]
    order = {agent: index for index, agent in enumerate(AGENT_TITLES)}
    return sorted(
        groups,
        key=lambda g: (
            order.get(g.config.agent, len(order)),
            g.config.agent,
            g.config.data.num_trajectories,
            g.note,
        ),
    )


def settings(run: Run) -> dict[str, str]:
    """Returns all that must agree for two runs to count as seeds of one experiment, by dotted name."""
    found = _flatten(dataclasses.asdict(run.config))
    found = {name: value for name, value in found.items() if name not in _WITHOUT_EFFECT}
    if run.evaluation is not None:
        evaluation = run.evaluation
        for name in ("num_episodes", "action_repeat", "target_rule"):
            found[f"evaluation.{name}"] = str(evaluation[name])
        for name, value in evaluation["context"].items():
            found[f"evaluation.context.{name}"] = str(value)
        found["evaluation.subset"] = str(evaluation["data"]["subset"])
        found["evaluation.digest"] = str(evaluation["data"]["digest"])
    return found


def _check_seeds(runs: Sequence[Run]) -> None:
    by_seed: dict[int, Run] = {}
    for run in runs:
        other = by_seed.setdefault(run.config.seed, run)
        if other is not run:
            raise ValueError(
                f"Runs that share their settings must differ in seed; got seed {run.config.seed} in "
                f"{other.folder.path} and {run.folder.path}. Leave one out."
            )


def _note(own: Mapping[str, str], everyone: Sequence[Mapping[str, str]]) -> str:
    same = ("agent", "data.num_trajectories")
    rivals = [other for other in everyone if all(other[name] == own[name] for name in same)]
    differing = [name for name in own if any(other.get(name) != own[name] for other in rivals)]
    return ", ".join(
        f"{name.rpartition('.')[2].replace('_', ' ')} {_shorten(own[name])}" for name in differing
    )


def _shorten(value: str) -> str:
    return value if len(value) <= 28 else f"{value[:12]}…{value[-12:]}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)
    return found
