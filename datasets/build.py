"""From episodes to a store: relabelled under every task, merged by action repeat, written whole."""

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import itertools
import json
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float, Int

from bpt_rl import __version__
from bpt_rl.config import BuildConfig
from bpt_rl.datasets import exorl
from bpt_rl.datasets.store import (
    FORMAT_VERSION,
    attributes_digest,
    columns_of,
    episode_digest,
    fixed_text,
    store_digest,
)
from bpt_rl.datasets.whole_file import whole_file
from bpt_rl.envs import processes, rewards, tasks
from bpt_rl.types import Trajectory


def build_store(config: BuildConfig, report_progress: Callable[[int, int], None] | None = None) -> Path:
    """Returns the path of a store built from a folder or zip of episodes.

    Args:
      config: What to read, which tasks, and where to write.
      report_progress: Called with the episodes done and their number, after each.

    Raises:
      FileNotFoundError: If there are no episodes.
      ValueError: If tasks, domain, episodes and action repeat do not fit together.
      ImportError: If MuJoCo's version does not fit.
      OSError: If the store cannot be written. As after any error, nothing new is then left on disk.
    """
    tasks.require_mujoco()
    domain, task_names = domain_and_tasks(config)
    names = [name for source in config.source for name in exorl.list_episodes(source)]
    names = names[: config.max_episodes or len(names)]
    lengths = _agent_steps(names, config.action_repeat)
    prepared = _prepared(config, domain, task_names, len(names))
    out = Path(config.out)
    with contextlib.closing(prepared):
        # Prepared before the file is opened: its sizes are the store's, and most mistakes show here.
        first = next(prepared)
        _check_space(out, first, lengths)
        # Version 1.10 of the format carries checksums of its own structures.
        with whole_file(out) as raw, h5py.File(raw, "w", libver=("v110", "v110")) as file:
            _create(file, first, lengths)
            digests = []
            for i, trajectory in enumerate(itertools.chain([first], prepared)):
                _write(file, i, trajectory)
                digests.append(episode_digest(trajectory))
                file.flush()
                raw.check()
                if report_progress:
                    report_progress(i + 1, len(names))
            file["digest"] = np.array(digests, "S64")
            _set_attributes(file, config, domain, task_names, digests)
    return out


def domain_and_tasks(config: BuildConfig) -> tuple[str, tuple[str, ...]]:
    """Returns the domain and tasks that a configuration asks for.

    The domain is that of the tasks, or `config.domain`, or the last part of the source's path that names one.

    Raises:
      ValueError: If a name is unknown, they disagree, or nothing says the domain.
    """
    named = {tasks.domain_of(task) for task in config.tasks} | ({config.domain} if config.domain else set())
    if len(named) > 1:
        raise ValueError(
            f"All tasks of a store must be of its one domain; got domains {', '.join(sorted(named))}. "
            "Build a store for each."
        )
    if not named:
        named = {domain for source in config.source if (domain := _domain_on_path(source))}
    if len(named) != 1:
        raise ValueError(
            f"A store must have one domain; {', '.join(config.source)} says {', '.join(sorted(named)) or 'none'}. "
            f"Set tasks, or domain to one of {', '.join(tasks.DOMAINS)}."
        )
    [domain] = named
    return domain, tuple(dict.fromkeys(config.tasks)) or tasks.tasks_of(domain)


def _domain_on_path(source: str) -> str | None:
    path = Path(source).absolute()
    on_path = [part for part in [*path.parts, path.stem] if part in tasks.DOMAINS]
    return on_path[-1] if on_path else None


def _agent_steps(names: Sequence[str], action_repeat: int) -> Int[np.ndarray, "E"]:
    steps = np.array([(exorl.parse_name(name) or (0, 0))[1] for name in names], np.int64)
    odd = np.flatnonzero(steps % action_repeat)
    if odd.size:
        raise ValueError(
            f"action_repeat must divide the steps of every episode; got {action_repeat} and "
            f"{steps[odd[0]]} steps in {names[odd[0]]}. Use a divisor."
        )
    return steps // action_repeat


def _prepared(
    config: BuildConfig, domain: str, task_names: tuple[str, ...], num_episodes: int
) -> Generator[Trajectory, None, None]:
    every = itertools.chain.from_iterable(exorl.iterate_episodes(source) for source in config.source)
    episodes = itertools.islice(every, num_episodes)
    prepare = functools.partial(
        _prepare, domain=domain, task_names=task_names, action_repeat=config.action_repeat
    )
    num_workers = processes.num_processes(config.num_workers, num_episodes)
    return processes.map_in_order(prepare, episodes, num_workers=num_workers)


def _prepare(
    episode: tuple[str, Trajectory], *, domain: str, task_names: tuple[str, ...], action_repeat: int
) -> Trajectory:
    name, trajectory = episode
    try:
        task_reward = {
            task: rewards.relabel(task, trajectory.physics, trajectory.action, trajectory.observation)
            for task in task_names
        }
        return merge(dataclasses.replace(trajectory, task_reward=task_reward, extras={}), action_repeat)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def merge(trajectory: Trajectory, action_repeat: int) -> Trajectory:
    """Returns an episode of agent steps: every `action_repeat` control steps made one.

    Observation, action, physics and extras are those after the last control step, rewards are added and
    discounts multiplied.

    Raises:
      ValueError: If the episode is not whole agent steps, or an action changes within one.
    """
    if action_repeat == 1:
        return trajectory
    if trajectory.num_steps % action_repeat:
        raise ValueError(
            f"action_repeat must divide the steps of an episode; got {action_repeat} and "
            f"{trajectory.num_steps}. Use a divisor."
        )
    held = trajectory.action[1:].reshape(-1, action_repeat, trajectory.action.shape[1])
    changed = np.flatnonzero((held != held[:, -1:]).any(axis=(1, 2)))
    if changed.size:
        raise ValueError(
            f"An action must be held for action_repeat = {action_repeat} control steps; it changes within "
            f"rows {changed[0] * action_repeat + 1} to {(changed[0] + 1) * action_repeat}. Use that "
            "of the data's collection, or 1."
        )

    def total(values: Float[np.ndarray, "T1 ..."]) -> Float[np.ndarray, "_ ..."]:
        sums = values[1:].reshape(-1, action_repeat, *values.shape[1:]).sum(axis=1, dtype=np.float64)
        return np.concatenate([values[:1], sums.astype(values.dtype)])

    rows = slice(None, None, action_repeat)
    num_rows = trajectory.num_steps + 1
    discount = trajectory.discount[1:].reshape(-1, action_repeat, 1).prod(axis=1)
    return Trajectory(
        observation=trajectory.observation[rows],
        action=trajectory.action[rows],
        reward=total(trajectory.reward),
        discount=np.concatenate([trajectory.discount[:1], discount]),
        physics=trajectory.physics[rows],
        task_reward={task: total(values) for task, values in trajectory.task_reward.items()},
        extras={k: v[rows] if v.ndim and len(v) == num_rows else v for k, v in trajectory.extras.items()},
    )


def _check_space(out: Path, first: Trajectory, lengths: Int[np.ndarray, "E"]) -> None:
    row_bytes = sum(values.nbytes for values in columns_of(first).values()) / (first.num_steps + 1)
    needed = int(row_bytes * len(lengths) * (lengths.max() + 1))
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"A store must fit on its disk; {out} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free. Free space or choose another folder.",
        )


def _create(file: Any, first: Trajectory, lengths: Int[np.ndarray, "E"]) -> None:
    rows = int(lengths.max()) + 1
    for name, values in columns_of(first).items():
        shape = (rows, *values.shape[1:])
        file.create_dataset(name, (len(lengths), *shape), values.dtype, chunks=(1, *shape))
    for task in first.task_reward:
        file.create_dataset(f"return/{task}", (len(lengths),), np.float32)
    file["length"] = lengths


def _write(file: Any, i: int, trajectory: Trajectory) -> None:
    for name, values in columns_of(trajectory).items():
        if values.shape[1:] != file[name].shape[2:]:
            raise ValueError(
                f"All episodes of a store must have the same columns; {name} has {values.shape[1:]} in "
                f"episode {i} and {file[name].shape[2:]} before. Leave this episode out."
            )
        file[name][i, : len(values)] = values
    for task, values in trajectory.task_reward.items():
        file["return"][task][i] = values.sum(dtype=np.float64)


def _set_attributes(
    file: Any, config: BuildConfig, domain: str, task_names: tuple[str, ...], digests: Sequence[str]
) -> None:
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "mujoco", "dm_control", "h5py")}
    file.attrs["domain"] = fixed_text(domain)
    file.attrs["source"] = fixed_text(" + ".join(_source_name(source, domain) for source in config.source))
    file.attrs["subset"] = fixed_text(config.subset)
    file.attrs["tasks"] = np.array([task.encode() for task in task_names])
    file.attrs["action_repeat"] = config.action_repeat
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["versions"] = fixed_text(json.dumps(packages | {"bpt_rl": __version__}))
    file.attrs["digest"] = fixed_text(store_digest(digests, task_names, config.action_repeat))
    file.attrs["attributes_digest"] = fixed_text(attributes_digest(file.attrs))


def _source_name(source: str, domain: str) -> str:
    """Returns like "walker/rnd": domain and collector, whatever folders lie around them."""
    path = Path(source).absolute()
    collector = path.parent.name if path.name == "buffer" else path.name.removesuffix(".zip")
    return f"{domain}/{collector}"
