"""Checking every byte of a store, and every episode of a folder or zip, against what they must be."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from bpt_rl.datasets.episode_source import EpisodeSource
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.store_format import columns_of, episode_digest, store_digest, subset_digest
from bpt_rl.datasets.store_writer import moments
from bpt_rl.envs import features, processes, tasks
from bpt_rl.types import Trajectory

OBSERVATION_TOLERANCE = 1e-4
"""Largest difference, relative above 1, between an observation and that of its state.

float32 keeps 7 digits; what else differs is how another version of MuJoCo adds up. Rows shifted by one differ
by far more within an episode.
"""

FEATURES_TOLERANCE = 1e-8
"""Likewise for stored features, float64, which another processor may round another way."""

Item = TypeVar("Item")
Opened = TypeVar("Opened", Store, EpisodeSource)

Progress = Callable[[int, int], None]


def verify_store(
    path: str | os.PathLike[str], *, num_workers: int = 0, report_progress: Progress | None = None
) -> int:
    """Returns the number of episodes of a store after checking all of it.

    Every array of each episode must match its digest, be finite, and be aligned (`alignment_fault`); padding
    must be zero, and whatever follows from the episodes must be what follows.

    Args:
      path: Of the store.
      num_workers: Processes; 0 means one a core.
      report_progress: Called with the episodes checked and their number.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is no store, or is not as it was written; the first bad episode is named.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(path))
        stack.callback(_close_all)
        with _named(path):
            digests = store.episode_digests
        check = functools.partial(_stored_fault, path=str(path))
        _check_all(list(enumerate(digests)), check, num_workers, report_progress)
        with _named(path):
            fault = _whole_fault(store)
    if fault:
        raise ValueError(f"A store must hold what the builder wrote; {path} {fault}. Build it again.")
    return len(digests)


def verify_episodes(
    source: str | os.PathLike[str],
    domain: str,
    *,
    num_workers: int = 0,
    report_progress: Progress | None = None,
) -> int:
    """Returns the number of episodes of a folder or zip after reading each and checking its alignment.

    Raises:
      FileNotFoundError: If there are no episodes.
      ValueError: If one is damaged, not finite, of another body, or not aligned; the first is named.
    """
    tasks.tasks_of(domain)
    with EpisodeSource.open(source) as opened, contextlib.ExitStack() as stack:
        stack.callback(_close_all)
        check = functools.partial(_recorded_fault, source=str(source), domain=domain)
        _check_all(opened.names, check, num_workers, report_progress)
        return len(opened.names)


def alignment_fault(domain: str, trajectory: Trajectory) -> str:
    """Returns how the rows of an episode do not belong together, or "".

    Each observation must be that of the state in its row, as far as a state alone decides it (contact forces
    and accelerations it does not), and row 0 must be the dummy row: no action, no reward. Of a domain without a
    simulator, which a Minari dataset may have, only the dummy row is checked.

    Raises:
      ValueError: If the arrays are not of the domain's sizes.
    """
    for name in ("action", "reward"):
        if getattr(trajectory, name)[0].any():
            return f"has no dummy row 0: its {name} is not zero"
    if domain not in tasks.DOMAINS:
        return ""
    columns, expected = features.recomputed_observation(domain, trajectory.physics)
    got = trajectory.observation[:, columns]
    bad = np.abs(got - expected) > OBSERVATION_TOLERANCE * np.maximum(1, np.abs(expected))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        return (
            f"has in row {row} an observation that is not that of its state: entry {columns[column]} is "
            f"{got[row, column]:.6g} and should be {expected[row, column]:.6g}"
        )
    return ""


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says of any error in the block that the store cannot be read: damage to HDF5 has many kinds of error."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"A store must hold what the builder wrote; {path} cannot be read ({error}). Build it again."
        ) from error


def _check_all(
    items: Sequence[Item], check: Callable[[Item], str], num_workers: int, report_progress: Progress | None
) -> None:
    num_workers = processes.num_processes(num_workers, len(items))
    faults = processes.map_in_order(check, items, num_workers=num_workers)
    for i, fault in enumerate(faults, 1):
        if fault:
            raise ValueError(fault)
        if report_progress:
            report_progress(i, len(items))


_opened: dict[str, Store | EpisodeSource] = {}
"""Kept open in each process."""


def _open(kind: type[Opened], path: str) -> Opened:
    opened = _opened.get(path) or _opened.setdefault(path, kind.open(path))
    if not isinstance(opened, kind):
        raise TypeError(f"{path} is open as {type(opened).__name__}")
    return opened


def _close_all() -> None:
    while _opened:
        _opened.popitem()[1].close()


def _recorded_fault(name: str, *, source: str, domain: str) -> str:
    try:
        fault = alignment_fault(domain, _open(EpisodeSource, source).read(name))
    except ValueError as error:
        return str(error)
    return fault and f"An episode must be one of {domain}'s; {source}/{name} {fault}. Leave this file out."


def _stored_fault(item: tuple[int, str], *, path: str) -> str:
    index, digest = item
    try:
        fault = _episode_fault(_open(Store, path), index, digest)
    except Exception as error:
        # Damage to HDF5 has many kinds of error.
        fault = f"cannot be read ({error})"
    return (
        fault and f"An episode must be as it was written; episode {index} of {path} {fault}. Build it again."
    )


def _episode_fault(store: Store, index: int, digest: str) -> str:
    trajectory = store.episode(index)
    columns = columns_of(trajectory)
    if episode_digest(columns) != digest:
        return "does not match its digest"
    padded = store.block(list(columns), index, index + 1)
    if any(values[0, trajectory.num_steps + 1 :].any() for values in padded.values()):
        return "has padding that is not zero"
    for task, reward in trajectory.task_reward.items():
        if store.returns(task)[index] != np.float32(reward.sum(dtype=np.float64)):
            return f"has a return of {task} that is not the sum of its rewards"
    unfinite = [name for name, values in columns.items() if not np.isfinite(values).all()]
    if unfinite:
        return f"has a {unfinite[0]} that is not finite"
    return alignment_fault(store.domain, trajectory) or _features_fault(store.domain, trajectory)


def _features_fault(domain: str, trajectory: Trajectory) -> str:
    if trajectory.features is None or domain not in tasks.DOMAINS:
        return ""
    expected = features.physical_features(domain, trajectory.physics)
    bad = np.abs(trajectory.features - expected) > FEATURES_TOLERANCE * np.maximum(1, np.abs(expected))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        name = features.FEATURES[domain][column]
        return f"has in row {row} a {name} that is not that of its state"
    return ""


def _whole_fault(store: Store) -> str:
    if store_digest(store.episode_digests, store.tasks, store.action_repeat) != store.digest:
        return "has a digest that does not follow from its episodes'"
    if subset_digest(store.episode_names) != store.subset_digest:
        return "has a subset digest that does not follow from the names of its episodes"
    statistics = store.statistics(store.tasks[0])
    found = (np.array(statistics.observation_mean), np.array(statistics.observation_std))
    if not all(map(np.array_equal, found, moments(store.path, store.lengths))):
        return "has a mean or deviation that is not that of its observations"
    return ""
