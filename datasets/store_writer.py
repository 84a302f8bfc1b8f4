"""Writing a store from many processes, so that a killed build goes on where it stopped.

What is done stands in a journal. File and journal are hidden beside the store, which appears under its own
name once it is whole.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np
from jaxtyping import Float, Int, Shaped

from bpt_rl import __version__
from bpt_rl.datasets.journal import Journal
from bpt_rl.datasets.store_format import FORMAT_VERSION, fixed_text, store_digest, subset_digest
from bpt_rl.datasets.store_layout import Column, Layout, create, finish
from bpt_rl.datasets.whole_file import explained
from bpt_rl.envs import processes
from bpt_rl.types import Trajectory

Item = TypeVar("Item")

SMALLEST_STD = 1e-3
"""Floor of an observation's standard deviation: division must not blow up an entry that never moved."""

_BLOCK_EPISODES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorePlan:
    """What a store will be, before its first episode is read."""

    out: Path
    domain: str
    source: str
    subset: str
    tasks: tuple[str, ...]
    action_repeat: int
    feature_names: tuple[str, ...]
    episode_names: Sequence[str]
    """Source and file name of each, like "walker/rnd/episode_000017_1000.npz"."""
    num_steps: Int[np.ndarray, "E"]
    """Agent steps of each."""
    fingerprint: str
    """Of the files that the episodes come from."""

    def header(self) -> dict[str, Any]:
        """Returns what a build must have in common with an interrupted one to go on with its work."""
        names = ("domain", "source", "subset", "tasks", "action_repeat", "feature_names", "fingerprint")
        return {name: getattr(self, name) for name in names} | {
            "episodes": subset_digest(self.episode_names),
            "steps": self.num_steps.tolist(),
            "format_version": FORMAT_VERSION,
            **versions(),
        }

    def attributes(self) -> dict[str, Any]:
        """Returns what the store says of itself, but for the digest of its content."""
        return {
            "domain": fixed_text(self.domain),
            "source": fixed_text(self.source),
            "subset": fixed_text(self.subset),
            "subset_digest": fixed_text(subset_digest(self.episode_names)),
            "tasks": np.array([task.encode() for task in self.tasks]),
            "features": np.array([name.encode() for name in self.feature_names], "S"),
            "action_repeat": self.action_repeat,
            "format_version": FORMAT_VERSION,
            "versions": fixed_text(json.dumps(versions())),
        }


class _Done(NamedTuple):
    episode: int
    digest: str
    returns: dict[str, float]


def versions() -> dict[str, str]:
    """Returns the packages that decide what a store holds."""
    packages = ("numpy", "mujoco", "dm_control", "h5py")
    return {name: importlib.metadata.version(name) for name in packages} | {"bpt_rl": __version__}


def write_store(
    plan: StorePlan,
    items: Sequence[Item],
    prepare: Callable[[Item], Trajectory],
    *,
    num_workers: int,
    report_progress: Callable[[int], None],
) -> Path:
    """Returns the path of the store, once every episode is written and every byte is on disk.

    Args:
      plan: What it will be.
      items: What `prepare` makes each episode from; small, since it travels to other processes.
      prepare: Gives an episode of agent steps with features and the rewards of every task; picklable.
      num_workers: Processes.
      report_progress: Told the number of episodes done, first of those kept from an interrupted call.

    Raises:
      ValueError: If an episode cannot be part of the store. What was written is then deleted.
      OSError: If the store cannot be written. What was written is kept for the next call.
      BlockingIOError: If another process writes the same store.
    """
    with explained(plan.out):
        plan.out.parent.mkdir(parents=True, exist_ok=True)
    with _journal(plan) as journal:
        try:
            layout, done = _resumed(plan, journal, num_workers)
            if layout is None:
                layout = _begun(plan, journal, prepare(items[0]))
            report_progress(len(done))
            missing = [(i, item) for i, item in enumerate(items) if i not in done]
            write = functools.partial(_write_one, prepare=prepare, layout=layout)
            for one in processes.map_in_order(write, missing, num_workers=num_workers):
                done[one.episode] = one
                journal.append(one._asdict())
                report_progress(len(done))
            _finish(plan, layout, [done[i] for i in range(len(items))])
        except ValueError:
            # Its input must change before the store can be built, and then this is no part of it.
            _discard_parts(plan.out)
            journal.remove()
            raise
        journal.remove()
    return plan.out


@contextlib.contextmanager
def _journal(plan: StorePlan) -> Iterator[Journal]:
    path = plan.out.with_name(f".{plan.out.name}.journal")
    try:
        journal = Journal(path, plan.header())
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno,
            f"A store must be built by one process at a time; another one is building {plan.out}. "
            "Wait for it, or choose another `out`.",
        ) from error
    with journal:
        yield journal


def _begun(plan: StorePlan, journal: Journal, first: Trajectory) -> Layout:
    _discard_parts(plan.out)
    # A name that no other build has: a worker of a killed one may still be about to write.
    part = plan.out.with_name(f".{plan.out.name}.{secrets.token_hex(4)}.building")
    try:
        layout = create(
            part,
            plan.out,
            first,
            lengths=plan.num_steps,
            names=plan.episode_names,
            attributes=plan.attributes(),
        )
    except OSError:
        part.unlink(missing_ok=True)
        journal.remove()
        raise
    journal.append({"layout": dataclasses.asdict(layout)})
    return layout


def _discard_parts(out: Path) -> None:
    """Deletes what builds of this store that cannot be gone on with have left."""
    of_this = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.building")
    for path in out.parent.iterdir():
        if of_this.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _write_one(item: tuple[int, Any], *, prepare: Callable[[Any], Trajectory], layout: Layout) -> _Done:
    index, source = item
    trajectory = prepare(source)
    digest = layout.write(index, trajectory)
    returns = {task: values.sum(dtype=np.float64) for task, values in trajectory.task_reward.items()}
    return _Done(index, digest, {task: float(np.float32(value)) for task, value in returns.items()})


def _resumed(plan: StorePlan, journal: Journal, num_workers: int) -> tuple[Layout | None, dict[int, _Done]]:
    """Returns what an interrupted build left that is still as it was written."""
    layout = _layout(journal.entries[0]["layout"], plan) if journal.entries else None
    if layout is None or not _is_sound(layout.path):
        journal.clear(plan.header())
        return None, {}
    entries = [_Done(**entry) for entry in journal.entries[1:]]
    places = [(entry.episode, int(plan.num_steps[entry.episode]), entry.digest) for entry in entries]
    # A machine that lost power may have kept the journal and lost what it tells of.
    check = functools.partial(_is_there, layout=layout)
    there = processes.map_in_order(check, places, num_workers=num_workers)
    return layout, {entry.episode: entry for entry, is_there in zip(entries, there, strict=True) if is_there}


def _is_sound(path: str) -> bool:
    try:
        h5py.File(path, "r").close()
    except OSError:
        return False
    return True


def _layout(values: Mapping[str, Any], plan: StorePlan) -> Layout:
    columns = {
        name: Column(dtype=column["dtype"], shape=tuple(column["shape"]), offset=column["offset"])
        for name, column in values["columns"].items()
    }
    # The folder may have been moved since.
    path = plan.out.with_name(Path(values["path"]).name)
    return Layout(**{**values, "path": str(path), "out": str(plan.out), "columns": columns})


def _is_there(place: tuple[int, int, str], *, layout: Layout) -> bool:
    index, num_steps, digest = place
    return layout.digest(index, num_steps) == digest


def _finish(plan: StorePlan, layout: Layout, done: Sequence[_Done]) -> None:
    digests = [one.digest for one in done]
    mean, std = moments(Path(layout.path), plan.num_steps)
    arrays: dict[str, Shaped[np.ndarray, "..."]] = {
        "digest": np.array(digests, "S64"),
        "observation_mean": mean,
        "observation_std": std,
    }
    arrays |= {
        f"return/{task}": np.array([one.returns[task] for one in done], np.float32) for task in plan.tasks
    }
    finish(layout, arrays, store_digest(digests, plan.tasks, plan.action_repeat))


def moments(
    path: Path, num_steps: Int[np.ndarray, "E"]
) -> tuple[Float[np.ndarray, "O"], Float[np.ndarray, "O"]]:
    """Returns mean and standard deviation of the observations over all rows of a store file, in float64."""
    with h5py.File(path, "r") as file:
        observation = file["observation"]
        count, mean, squares = 0, np.zeros(observation.shape[2]), np.zeros(observation.shape[2])
        for start in range(0, len(num_steps), _BLOCK_EPISODES):
            lengths = num_steps[start : start + _BLOCK_EPISODES]
            block = observation[start : start + len(lengths)]
            rows = block[np.arange(block.shape[1]) <= lengths[:, None]].astype(np.float64)
            # Chan's update: sums of squares over millions of rows would lose small deviations.
            shift, total = rows.mean(axis=0) - mean, count + len(rows)
            mean = mean + shift * len(rows) / total
            squares = squares + rows.var(axis=0) * len(rows) + shift**2 * count * len(rows) / total
            count = total
    return mean, np.maximum(np.sqrt(squares / count), SMALLEST_STD)
