"""From a Minari dataset to a store."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bpt_rl.config import BuildConfig
from bpt_rl.datasets import subsets
from bpt_rl.datasets.build import domain_and_tasks
from bpt_rl.datasets.minari_source import PREFIX, MinariSource
from bpt_rl.datasets.store_writer import StorePlan, write_store
from bpt_rl.envs import features, processes, rewards, tasks
from bpt_rl.types import Trajectory


class _Member(NamedTuple):
    path: str
    fingerprint: str
    episode: int


def build_from_minari(config: BuildConfig, report_progress: Callable[[int, int], None] | None = None) -> Path:
    """Returns the path of a store built from one Minari dataset, as `bpt_rl.datasets.build.build_store` does.

    The reward of the dataset's own task is taken as it stands there. Those of other tasks are relabelled, where
    the dataset was exported from a store of single control steps; any other dataset has its own task alone.

    Args:
      config: Its only source is "minari:" and the dataset's id.
      report_progress: Called with the episodes done and their number, first for those kept.

    Raises:
      ModuleNotFoundError: If Minari is not installed.
      FileNotFoundError: If there is no such dataset on this machine.
      ValueError: If the dataset has other than Box spaces, is damaged, or does not fit tasks, domain or subset.
      OSError: If the store cannot be written. What is done is kept.
      BlockingIOError: If another process builds the same store.
    """
    source = MinariSource.open(_dataset_id(config))
    task_names = _tasks(config, source)
    fingerprint = source.fingerprint
    members = [_Member(str(source.path), fingerprint, i) for i in range(len(source.names))]

    def returns() -> Float[np.ndarray, "E"]:
        measure = functools.partial(_return, task=task_names[0])
        num_workers = processes.num_processes(config.num_workers, len(members))
        return np.array(list(processes.map_in_order(measure, members, num_workers=num_workers)))

    episodes = subsets.Episodes(names=source.names, num_steps=source.num_steps, returns=returns)
    chosen = subsets.select(config.subset, episodes)
    origin = source.origin
    plan = StorePlan(
        out=Path(config.out),
        domain=origin.domain,
        source=origin.source,
        subset=_subset(config.subset, origin.subset),
        tasks=task_names,
        action_repeat=origin.action_repeat,
        feature_names=features.FEATURES[origin.domain] if origin.is_simulated else (),
        episode_names=[source.names[i] for i in chosen],
        num_steps=source.num_steps[chosen],
        fingerprint=fingerprint,
    )
    return write_store(
        plan,
        [members[i] for i in chosen],
        functools.partial(_prepare, task_names=task_names),
        num_workers=processes.num_processes(config.num_workers, len(chosen)),
        report_progress=lambda done: report_progress(done, len(chosen)) if report_progress else None,
    )


def _dataset_id(config: BuildConfig) -> str:
    if len(config.source) > 1:
        raise ValueError(
            f"A store of a Minari dataset must have no other source; got {', '.join(config.source)}. Build a store "
            "of each, or join datasets with `minari combine` first."
        )
    if config.action_repeat != 1:
        raise ValueError(
            f"A Minari dataset keeps its steps, so action_repeat must be 1; got {config.action_repeat}. Leave it out."
        )
    return config.source[0].removeprefix(PREFIX)


def _tasks(config: BuildConfig, source: MinariSource) -> tuple[str, ...]:
    origin = source.origin
    if config.domain not in ("", origin.domain):
        raise ValueError(
            f"A Minari dataset says its domain itself; {config.source[0]} is of {origin.domain}, and got "
            f"{config.domain}. Leave domain out."
        )
    if origin.is_simulated and origin.action_repeat == 1:
        tasks.require_mujoco()
        _, names = domain_and_tasks(dataclasses.replace(config, domain=origin.domain))
        return names if config.tasks else tuple(dict.fromkeys((*names, origin.task)))
    if {*config.tasks} <= {origin.task}:
        return (origin.task,)
    reason = (
        f"it lacks the states between its steps of {origin.action_repeat} control steps"
        if origin.is_simulated
        else "it has no physics to relabel"
    )
    raise ValueError(
        f"{config.source[0]} can give the reward of {origin.task} alone, since {reason}; got "
        f"{', '.join(config.tasks)}. Leave tasks out."
    )


def _subset(asked: str, exported: str) -> str:
    """Returns the name of a subset of what was itself a subset."""
    if "full" in (asked, exported):
        return exported if asked == "full" else asked
    return f"{asked} of {exported}"


@functools.lru_cache(maxsize=1)
def _source(path: str, fingerprint: str) -> MinariSource:
    source = MinariSource.at(Path(path))
    if source.fingerprint != fingerprint:
        raise ValueError(
            f"Episodes must not change while a store is built from them; {path} did. Build it again."
        )
    return source


def _prepare(member: _Member, *, task_names: tuple[str, ...]) -> Trajectory:
    source = _source(member.path, member.fingerprint)
    trajectory = source.read(member.episode)
    own = trajectory.task_reward
    task_reward = {task: own[task] if task in own else _relabelled(task, trajectory) for task in task_names}
    return dataclasses.replace(trajectory, task_reward=task_reward)


def _relabelled(task: str, trajectory: Trajectory) -> Float[np.ndarray, "T1"]:
    return rewards.relabel(task, trajectory.physics, trajectory.action, trajectory.observation)


def _return(member: _Member, *, task: str) -> float:
    trajectory = _prepare(member, task_names=(task,))
    return float(trajectory.task_reward[task].sum(dtype=np.float64))
