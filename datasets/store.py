"""The HDF5 store: relabelled episodes of one domain, collector and subset, read a few at a time.

`bpt_rl.datasets.build` writes it; `bpt_rl.datasets.store_format` says what it consists of.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float, Int, Shaped

from bpt_rl.datasets.store_format import COLUMNS, FORMAT_VERSION
from bpt_rl.datasets.store_seal import seal_fault
from bpt_rl.envs import reward_functions, rewards
from bpt_rl.types import DataStatistics, Trajectory

BLOCK_EPISODES = 64
"""Episodes that a pass over a whole store reads at a time."""


class Store:
    """An open store. Reads from the file at each call, so that it may be far larger than memory.

    Rewards of the tasks it was built with are stored. Those of every other task of its domain that has a
    formula over physical features (`bpt_rl.envs.reward_functions`) are computed as they are read.
    """

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
        fault = seal_fault(path)
        if fault:
            raise ValueError(f"A store must be as the builder wrote it; {path} {fault}. Build it again.")
        file = h5py.File(path, "r")
        version = file.attrs["format_version"]
        if version != FORMAT_VERSION:
            file.close()
            raise ValueError(
                f"A store must have format version {FORMAT_VERSION}; {path} has {version}. Build it again."
            )
        return cls(file, path)

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

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Physical features, in the order of their columns."""
        return tuple(bytes(name).decode() for name in self._file.attrs["features"])

    @property
    def episode_names(self) -> tuple[str, ...]:
        """Source and file that each episode came from, like "walker/rnd/episode_000017_1000.npz"."""
        return tuple(bytes(name).decode("utf-8", "replace") for name in self._file["name"][:])

    @property
    def episode_digests(self) -> tuple[str, ...]:
        """SHA-256 of each episode's arrays."""
        return tuple(bytes(digest).decode("ascii", "replace") for digest in self._file["digest"][:])

    @property
    def subset_digest(self) -> str:
        """SHA-256 that identifies the subset: the names of its episodes."""
        return self._text("subset_digest")

    def block(self, names: Sequence[str], start: int, stop: int) -> dict[str, Shaped[np.ndarray, "_ T1 ..."]]:
        """Returns columns of the episodes from `start` up to `stop`, padded with zeros to T1 rows.

        Args:
          names: Of `COLUMNS`, or "reward/<task>": float32, computed if the store was built without the task.
          start: First episode.
          stop: One behind the last.

        Raises:
          IndexError: If there are no such episodes.
          ValueError: If the store can give no reward of the task.
        """
        if not 0 <= start <= stop <= self.num_episodes:
            raise IndexError(
                f"An episode index must lie in [0, {self.num_episodes}); got {start} to {stop}. Choose others."
            )
        return {name: self._column(name, slice(start, stop)) for name in names}

    def _column(self, name: str, episodes: slice) -> Shaped[np.ndarray, "_ T1 ..."]:
        kind, _, task = name.partition("/")
        if kind == "reward":
            stored = self._stored_name(task)
            if stored is None:
                return self._computed_reward(task, episodes)
            name = f"reward/{stored}"
        values: np.ndarray = self._file[name][episodes]
        return values

    def _stored_name(self, task: str) -> str | None:
        """Returns the name of a stored task, however it is spelt; None if it is not stored."""
        names = self.tasks
        if task in names:
            return task
        found = reward_functions.find(task)
        # A user's own function may bear a stored task's name and be another one.
        return found.task if found and not found.origin and found.task in names else None

    def _computed_reward(self, task: str, episodes: slice) -> Float[np.ndarray, "_ T1"]:
        self.check_task(task)
        columns = [self._file[name][episodes] for name in ("features", "observation", "action")]
        reward = np.zeros(columns[0].shape[:2], np.float32)
        lengths = self.lengths[episodes]
        # Episodes of one length together, without padding: a user's function may divide by a feature.
        for length in np.unique(lengths):
            same, rows = lengths == length, slice(length + 1)
            reward[same, rows] = rewards.reward_from_features(task, *(c[same, rows] for c in columns))
        return reward

    def check_task(self, task: str) -> None:
        """Checks that the store can give the reward of a task.

        Raises:
          ValueError: If the store was built without the task and cannot compute its reward.
        """
        if self._stored_name(task):
            return
        function = reward_functions.find(task)
        if function is None or function.domain != self.domain:
            raise ValueError(
                f"A task must be one the store was built with or one with a formula for {self.domain}; got "
                f"{task!r}, and {self.path} holds {', '.join(self.tasks)}. Build a store with that task."
            )
        if self.action_repeat > 1:
            raise ValueError(
                f"Only a store of action_repeat 1 can compute rewards it was not built with; {self.path} has "
                f"action_repeat {self.action_repeat}, and got {task!r}. Build a store with that task, or of "
                "action_repeat 1."
            )

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
        columns = {field: self._file[name][index, :rows] for name, field in COLUMNS.items()}
        task_reward = {task: self._file["reward"][task][index, :rows] for task in self.tasks}
        return Trajectory(**columns, task_reward=task_reward)

    def returns(self, task: str) -> Float[np.ndarray, "E"]:
        """Returns the undiscounted return of each episode under `task`, unscaled, float32.

        Raises:
          ValueError: If the store can give no reward of the task.
        """
        name = self._stored_name(task)
        if name:
            stored: np.ndarray = self._file["return"][name][:]
            return stored
        self.check_task(task)
        sums = [
            block[f"reward/{task}"].sum(axis=1, dtype=np.float64)
            for block in self.blocks((f"reward/{task}",))
        ]
        return np.concatenate(sums).astype(np.float32)

    def blocks(self, names: Sequence[str]) -> Iterator[dict[str, Shaped[np.ndarray, "_ T1 ..."]]]:
        """Yields the columns of all episodes, `BLOCK_EPISODES` at a time; see `block`."""
        for start in range(0, self.num_episodes, BLOCK_EPISODES):
            yield self.block(names, start, min(start + BLOCK_EPISODES, self.num_episodes))

    def statistics(self, task: str) -> DataStatistics:
        """Returns sizes and scales of the data under `task`.

        Mean and standard deviation are over all rows, the dummy row's observation included.

        Raises:
          ValueError: If the store can give no reward of the task.
        """
        returns = np.sort(self.returns(task))
        name = f"reward/{task}"
        return DataStatistics(
            task=task,
            observation_mean=tuple(self._file["observation_mean"][:].tolist()),
            observation_std=tuple(self._file["observation_std"][:].tolist()),
            action_dim=self.action_dim,
            action_repeat=self.action_repeat,
            episode_steps=int(self.lengths.max()),
            returns=tuple(returns.tolist()),
            reward_abs_max=max(float(np.abs(block[name]).max()) for block in self.blocks((name,))),
            num_episodes=self.num_episodes,
            source=self.source,
            subset=self.subset,
            subset_digest=self.subset_digest,
            digest=self.digest,
        )
