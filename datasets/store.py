"""The HDF5 store: relabelled episodes of one domain, collector and subset, read one at a time.

`bpt_rl.datasets.build` writes it. Axes: E episodes, T1 rows of the longest; shorter ones are
padded with zeros.
  observation [E, T1, O] f4     discount [E, T1, 1] f4        reward/<task> [E, T1] f4
  action [E, T1, A] f4          stored_reward [E, T1, R] f4   return/<task> [E] f4
  physics [E, T1, P] f8         length [E] i8 (steps)         digest [E] (SHA-256, hexadecimal)
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float, Int, Shaped

from bpt_rl.types import DataStatistics, Trajectory

FORMAT_VERSION = 1
SMALLEST_STD = 1e-3
"""Floor of an observation's standard deviation: division must not blow up an entry that never moved."""

_COLUMNS: Mapping[str, str] = {
    "observation": "observation",
    "action": "action",
    "stored_reward": "reward",
    "discount": "discount",
    "physics": "physics",
}
"""Field of `Trajectory` that each dataset holds, in the order of the digest."""


class Store:
    """An open store. Reads from the file at each call, so that it may be far larger than memory."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self.path = path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Store":
        """Returns the store at `path`, open for reading; close it or use it in a `with` block.

        Raises:
          FileNotFoundError: If there is no such file.
          ValueError: If the file is no store, is damaged, or has another format version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"A store must be a file that `bpt-rl data build` wrote; none is at {path}. Build it first."
            )
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(
                f"A store must be a whole HDF5 file; {path} is not: {error}. Build it again."
            ) from error
        store = cls(file, path)
        try:
            fault = store._layout_fault()
        except Exception as error:
            # HDF5 and h5py answer damage with errors of many kinds.
            fault = f"cannot be read: {error}"
        if fault:
            store.close()
            raise ValueError(f"A store must hold what the builder wrote; {path} {fault}. Build it again.")
        return store

    def _layout_fault(self) -> str:
        version = self._file.attrs.get("format_version")
        if version is None:
            return "has no format version, so that it is no store"
        if version != FORMAT_VERSION:
            return f"has format version {version} and not {FORMAT_VERSION}"
        if attributes_digest(self._file.attrs) != self._text("attributes_digest"):
            return "has attributes that do not match their digest"
        rewards = [f"{kind}/{task}" for task in self.tasks for kind in ("reward", "return")]
        names = [*_COLUMNS, *rewards, "length", "digest"]
        counts = {len(self._file[name]) for name in names}
        rows = {self._file[name].shape[1] for name in names if self._file[name].ndim > 1}
        if len(counts) != 1 or rows != {int(self.lengths.max()) + 1}:
            return f"has arrays of {sorted(counts)} episodes and {sorted(rows)} rows"
        return ""

    def _text(self, name: str) -> str:
        return bytes(self._file.attrs[name]).decode()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self._file["length"])

    @property
    def lengths(self) -> Int[np.ndarray, "E"]:
        """Agent steps of each episode, without the dummy row."""
        lengths: np.ndarray = self._file["length"][:]
        return lengths

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks whose rewards are stored."""
        return tuple(bytes(task).decode() for task in self._file.attrs["tasks"])

    @property
    def domain(self) -> str:
        """Simulated body."""
        return self._text("domain")

    @property
    def source(self) -> str:
        """Domain and collector of the episodes, or the name of their folder."""
        return self._text("source")

    @property
    def subset(self) -> str:
        """Name of the subset; it belongs beside every result."""
        return self._text("subset")

    @property
    def action_repeat(self) -> int:
        """Control steps of an agent step."""
        return int(self._file.attrs["action_repeat"])

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the content: every episode, the tasks and the action repeat."""
        return self._text("digest")

    @property
    def versions(self) -> dict[str, str]:
        """Packages that the store was built with."""
        versions: dict[str, str] = json.loads(self._text("versions"))
        return versions

    @property
    def observation_dim(self) -> int:
        """O."""
        return int(self._file["observation"].shape[2])

    @property
    def action_dim(self) -> int:
        """A."""
        return int(self._file["action"].shape[2])

    def episode(self, index: int) -> Trajectory:
        """Returns one episode with `task_reward` filled for every stored task.

        Raises:
          IndexError: If there is no such episode.
        """
        if not 0 <= index < self.num_episodes:
            raise IndexError(
                f"An episode index must lie in [0, {self.num_episodes}); got {index}. Choose another."
            )
        rows = int(self._file["length"][index]) + 1
        columns = {field: self._file[name][index, :rows] for name, field in _COLUMNS.items()}
        rewards = {task: self._file["reward"][task][index, :rows] for task in self.tasks}
        return Trajectory(**columns, task_reward=rewards)

    def returns(self, task: str) -> Float[np.ndarray, "E"]:
        """Returns the undiscounted return of each episode under `task`, unscaled.

        Raises:
          ValueError: If the store was built without the task.
        """
        if task not in self.tasks:
            raise ValueError(
                f"A task must be one the store was built with; got {task!r}, and {self.path} holds "
                f"{', '.join(self.tasks)}. Build a store with that task."
            )
        returns: np.ndarray = self._file["return"][task][:]
        return returns

    def statistics(self, task: str) -> DataStatistics:
        """Returns sizes and scales of the data under `task`; reads every observation once.

        Mean and standard deviation are over all rows, the dummy row's observation included, in float64; the
        deviation is at least `SMALLEST_STD`.

        Raises:
          ValueError: If the store was built without the task.
        """
        returns = np.sort(self.returns(task))
        count, mean, deviation, largest = (
            0,
            np.zeros(self.observation_dim),
            np.zeros(self.observation_dim),
            0.0,
        )
        for i, length in enumerate(self.lengths):
            rows = self._file["observation"][i, : length + 1].astype(np.float64)
            # Chan's update: sums of squares over millions of rows would lose small deviations.
            shift = rows.mean(axis=0) - mean
            total = count + len(rows)
            mean = mean + shift * len(rows) / total
            deviation = deviation + rows.var(axis=0) * len(rows) + shift**2 * count * len(rows) / total
            count = total
            largest = max(largest, float(np.abs(self._file["reward"][task][i]).max()))
        std = np.maximum(np.sqrt(deviation / count), SMALLEST_STD)
        return DataStatistics(
            task=task,
            observation_mean=tuple(mean.tolist()),
            observation_std=tuple(std.tolist()),
            action_dim=self.action_dim,
            action_repeat=self.action_repeat,
            episode_steps=int(self.lengths.max()),
            returns=tuple(returns.tolist()),
            reward_abs_max=largest,
            num_episodes=self.num_episodes,
            source=self.source,
            subset=self.subset,
            digest=self.digest,
        )


def columns_of(trajectory: Trajectory) -> dict[str, Shaped[np.ndarray, "T1 ..."]]:
    """Returns what the store keeps of an episode, by the path of its dataset, in the order of the digest."""
    columns = {name: getattr(trajectory, field) for name, field in _COLUMNS.items()}
    return columns | {f"reward/{task}": values for task, values in sorted(trajectory.task_reward.items())}


def episode_digest(trajectory: Trajectory) -> str:
    """Returns the SHA-256 of an episode's arrays, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, values in columns_of(trajectory).items():
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def store_digest(episode_digests: Sequence[str], tasks: Sequence[str], action_repeat: int) -> str:
    """Returns the SHA-256 that identifies a store's content; the order of the tasks does not matter."""
    parts = [str(FORMAT_VERSION), *sorted(tasks), str(action_repeat), *episode_digests]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def fixed_text(text: str) -> Shaped[np.ndarray, ""]:
    """Returns text as an attribute of fixed length.

    HDF5 keeps text of variable length without a checksum, and one wrong bit there makes it read for ever.
    """
    return np.array(text.encode(), f"S{max(1, len(text.encode()))}")


def attributes_digest(attributes: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a store's attributes but for this digest itself."""
    values = {
        key: np.asarray(value).tolist() for key, value in attributes.items() if key != "attributes_digest"
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=bytes.decode).encode()).hexdigest()


def verify(path: str | os.PathLike[str]) -> int:
    """Returns the number of episodes after checking every byte of each against the digests.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is no store, or any array differs from what was written; the episode is named.
    """
    with Store.open(path) as store:
        digests = [bytes(digest).decode("ascii", "replace") for digest in store._file["digest"]]
        for i, expected in enumerate(digests):
            try:
                fault = _episode_fault(store, i, expected)
            except Exception as error:
                # As above: damage has many kinds of error.
                fault = f"cannot be read ({error})"
            if fault:
                raise ValueError(
                    f"An episode must be as it was written; episode {i} of {path} {fault}. Build it again."
                )
        if store_digest(digests, store.tasks, store.action_repeat) != store.digest:
            raise ValueError(
                f"A store's digest must follow from its episodes'; that of {path} does not. Build it again."
            )
        return store.num_episodes


def _episode_fault(store: Store, i: int, expected: str) -> str:
    trajectory = store.episode(i)
    if episode_digest(trajectory) != expected:
        return "does not match its digest"
    if any(store._file[name][i, trajectory.num_steps + 1 :].any() for name in columns_of(trajectory)):
        return "has padding that is not zero"
    for task, reward in trajectory.task_reward.items():
        if store._file["return"][task][i] != np.float32(reward.sum(dtype=np.float64)):
            return f"has a return of {task} that is not the sum of its rewards"
    return ""


def describe(path_or_store: str | os.PathLike[str] | Store) -> dict[str, Any]:
    """Returns what `bpt-rl data info` shows: plain values, returns summarised for each task."""
    if not isinstance(path_or_store, Store):
        with Store.open(path_or_store) as store:
            return describe(store)
    store = path_or_store
    return {
        "path": str(store.path),
        "bytes": store.path.stat().st_size,
        "domain": store.domain,
        "source": store.source,
        "subset": store.subset,
        "action_repeat": store.action_repeat,
        "num_episodes": store.num_episodes,
        "num_steps": int(store.lengths.sum()),
        "episode_steps": [int(store.lengths.min()), int(store.lengths.max())],
        "observation_dim": store.observation_dim,
        "action_dim": store.action_dim,
        "returns": {task: _summary(store.returns(task)) for task in store.tasks},
        "digest": store.digest,
        "format_version": FORMAT_VERSION,
        "versions": store.versions,
    }


def _summary(returns: Float[np.ndarray, "E"]) -> dict[str, float]:
    return {
        "mean": float(returns.mean(dtype=np.float64)),
        "min": float(returns.min()),
        "median": float(np.median(returns)),
        "quantile_95": float(np.quantile(returns, 0.95)),
        "max": float(returns.max()),
    }
