"""From episodes to a store: a subset of them, relabelled under every task, merged by action repeat."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bpt_rl.config import BuildConfig
from bpt_rl.datasets import subsets
from bpt_rl.datasets.episode_source import EpisodeSource
from bpt_rl.datasets.merging import merge
from bpt_rl.datasets.store_writer import StorePlan, write_store
from bpt_rl.envs import features, processes, reward_functions, rewards, tasks
from bpt_rl.types import Trajectory


class Member(NamedTuple):
    """An episode of a source."""

    source: str
    """Path of the folder or zip."""
    fingerprint: str
    """Of the source."""
    name: str
    num_steps: int
    """Control steps."""


def build_store(config: BuildConfig, report_progress: Callable[[int, int], None] | None = None) -> Path:
    """Returns the path of a store built from folders or zips of episodes, or from a Minari dataset.

    Each process reads one episode at a time, and a zip is never unpacked, so that memory stays small whatever
    the size. What is done lies in hidden files beside the store until it is whole; killed or interrupted, the
    same call goes on from there and ends with the same digest.

    Args:
      config: What to read, which tasks, and where to write.
      report_progress: Called with the episodes done and their number, first for those kept.

    Raises:
      FileNotFoundError: If there are no episodes.
      ValueError: If tasks, domain, episodes, subset and action repeat do not fit together. Nothing is kept.
      ImportError: If MuJoCo's version does not fit.
      OSError: If the store cannot be written. What is done is kept.
      BlockingIOError: If another process builds the same store.
    """
    if any(source.startswith("minari:") for source in config.source):
        # Not above: it imports this module.
        from bpt_rl.datasets.minari_build import build_from_minari

        return build_from_minari(config, report_progress)
    tasks.require_mujoco()
    domain, task_names = domain_and_tasks(config)
    try:
        members = [member for source in _checked_sources(config) for member in _members(source)]
        chosen = _chosen(config, domain, task_names, members)
        prepare = functools.partial(
            _prepare, domain=domain, task_names=task_names, action_repeat=config.action_repeat
        )
        return write_store(
            _plan(config, domain, task_names, chosen),
            chosen,
            prepare,
            num_workers=processes.num_processes(config.num_workers, len(chosen)),
            report_progress=lambda done: report_progress(done, len(chosen)) if report_progress else None,
        )
    finally:
        while _opened:
            _opened.popitem()[1].close()


def _checked_sources(config: BuildConfig) -> tuple[str, ...]:
    places = {Path(source).resolve() for source in config.source}
    if not places or len(places) != len(config.source):
        raise ValueError(
            f"A store must have at least one source, and each once; got {' '.join(config.source) or 'none'}. "
            "Name each folder or zip once."
        )
    out = Path(config.out)
    # Before hours of work, not when the file gets its name.
    if not out.name or out.is_dir() or out.resolve() in places:
        raise ValueError(
            f"A store must have a file of its own; got out {config.out!r}, a folder or a source. Name another file."
        )
    return config.source


def _members(source: str) -> list[Member]:
    with EpisodeSource.open(source) as opened:
        return [
            Member(source, opened.fingerprint, name, num_steps)
            for name, num_steps in zip(opened.names, opened.num_steps, strict=True)
        ]


_opened: dict[tuple[str, str], EpisodeSource] = {}
"""Kept open in each process: the list of a zip of ten thousand episodes takes longer to read than an episode."""


def _source(path: str, fingerprint: str) -> EpisodeSource:
    if (path, fingerprint) not in _opened:
        _opened[path, fingerprint] = EpisodeSource.open(path)
    source = _opened[path, fingerprint]
    if source.fingerprint != fingerprint:
        raise ValueError(
            f"Episodes must not change while a store is built from them; {path} did. Build it again."
        )
    return source


def domain_and_tasks(config: BuildConfig) -> tuple[str, tuple[str, ...]]:
    """Returns the domain and tasks that a configuration asks for, each task once in its canonical spelling.

    The domain is that of the tasks, or `config.domain`, or the last part of the source's path that names one.

    Raises:
      FileNotFoundError: If a task names a file that is not there.
      ValueError: If a name is unknown, they disagree, nothing says the domain, or a task is a function of the
        user's own.
    """
    named = {tasks.domain_of(task) for task in config.tasks} | ({config.domain} if config.domain else set())
    if len(named) > 1:
        raise ValueError(
            f"All tasks of a store must be of its one domain; got domains {', '.join(sorted(named))}. "
            "Build a store for each."
        )
    if not named:
        named = {domain for source in config.source if (domain := domain_on_path(source))}
    if len(named) != 1:
        raise ValueError(
            f"A store must have one domain; {', '.join(config.source)} says {', '.join(sorted(named)) or 'none'}. "
            f"Set tasks, or domain to one of {', '.join(tasks.DOMAINS)}."
        )
    [domain] = named
    return domain, tuple(dict.fromkeys(map(_stored_name, config.tasks))) or tasks.tasks_of(domain)


def _stored_name(task: str) -> str:
    reward_function = reward_functions.find(task)
    if reward_function and reward_function.origin:
        # Under its bare name it would go stale unnoticed when the function changes.
        raise ValueError(
            "A store must be built without functions of your own: one of action_repeat 1 computes their rewards "
            f"as it is read; got {task!r}. Leave it out of tasks, and set domain if no task is left."
        )
    return reward_function.task if reward_function else task


def domain_on_path(source: str) -> str | None:
    """Returns the last part of a source's path that names a domain, None if none does."""
    path = Path(source).absolute()
    on_path = [part for part in [*path.parts, path.stem] if part in tasks.DOMAINS]
    return on_path[-1] if on_path else None


def _chosen(
    config: BuildConfig, domain: str, task_names: tuple[str, ...], members: Sequence[Member]
) -> list[Member]:
    def returns() -> Float[np.ndarray, "E"]:
        measure = functools.partial(_return, domain=domain, task=task_names[0])
        num_workers = processes.num_processes(config.num_workers, len(members))
        return np.array(list(processes.map_in_order(measure, members, num_workers=num_workers)))

    episodes = subsets.Episodes(
        names=[_episode_name(member, domain) for member in members],
        num_steps=np.array([member.num_steps for member in members], np.int64),
        returns=returns,
    )
    return [members[i] for i in subsets.select(config.subset, episodes)]


def _plan(
    config: BuildConfig, domain: str, task_names: tuple[str, ...], members: Sequence[Member]
) -> StorePlan:
    fingerprints = "\n".join(dict.fromkeys(member.fingerprint for member in members))
    return StorePlan(
        out=Path(config.out),
        domain=domain,
        source=" + ".join(dict.fromkeys(source_name(source, domain) for source in config.source)),
        subset=config.subset,
        tasks=task_names,
        action_repeat=config.action_repeat,
        feature_names=features.FEATURES[domain],
        episode_names=[_episode_name(member, domain) for member in members],
        num_steps=_agent_steps(members, config.action_repeat),
        fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest(),
    )


def _agent_steps(members: Sequence[Member], action_repeat: int) -> Int[np.ndarray, "E"]:
    steps = np.array([member.num_steps for member in members], np.int64)
    odd = np.flatnonzero(steps % action_repeat)
    if odd.size:
        raise ValueError(
            f"action_repeat must divide the steps of every episode; got {action_repeat} and "
            f"{steps[odd[0]]} steps in {members[odd[0]].name}. Use a divisor."
        )
    return steps // action_repeat


def _prepare(member: Member, *, domain: str, task_names: tuple[str, ...], action_repeat: int) -> Trajectory:
    trajectory = _source(member.source, member.fingerprint).read(member.name)
    try:
        measured = features.physical_features(domain, trajectory.physics)
        task_reward = {task: _reward(task, trajectory, measured) for task in task_names}
        episode = dataclasses.replace(trajectory, features=measured, task_reward=task_reward, extras={})
        return merge(episode, action_repeat)
    except ValueError as error:
        raise ValueError(f"{member.source}/{member.name}: {error}") from error


def _return(member: Member, *, domain: str, task: str) -> float:
    trajectory = _prepare(member, domain=domain, task_names=(task,), action_repeat=1)
    return float(trajectory.task_reward[task].sum(dtype=np.float64))


def _reward(
    task: str, trajectory: Trajectory, measured: Float[np.ndarray, "T1 F"]
) -> Float[np.ndarray, "T1"]:
    if reward_functions.find(task) is None:
        return rewards.relabel_by_simulation(task, trajectory.physics, trajectory.action)
    return rewards.reward_from_features(task, measured, trajectory.observation, trajectory.action)


def _episode_name(member: Member, domain: str) -> str:
    return f"{source_name(member.source, domain)}/{member.name.rpartition('/')[2]}"


def source_name(source: str, domain: str) -> str:
    """Returns like "walker/rnd": domain and collector, whatever folders lie around them."""
    path = Path(source).absolute()
    collector = path.parent.name if path.name == "buffer" else path.name.removesuffix(".zip")
    return f"{domain}/{collector}"
