"""What an evaluation has done so far, on disk, so that a killed one goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bpt_rl.run import records
from bpt_rl.run.rollout import Played, Transition
from bpt_rl.types import EpisodeLog


class EvaluationJournal:
    """A folder that holds, under the name of each log, the log if it is finished, else the steps played so far."""

    def __init__(self, evaluations_path: Path, key: Mapping[str, Any]) -> None:
        """Opens the journal of one evaluation; nothing is written yet.

        Args:
          evaluations_path: Folder that receives the journal's.
          key: All that the evaluation's numbers depend on, as JSON values. Another key is another journal.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = evaluations_path / f"unfinished_{digest}"

    def log(self, name: str) -> EpisodeLog | None:
        """Returns a finished log; None if it is not."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        values = json.loads(path.read_text())
        return records.log_from_json(values)

    def finish(self, name: str, log: EpisodeLog) -> None:
        """Keeps a finished log, in place of its steps."""
        records.write_json(self.folder / f"{name}.json", records.log_to_json(log) | {"seconds": log.seconds})
        self.forget(name)

    def forget(self, name: str) -> None:
        """Removes the steps of a log."""
        # The last first: what a kill in between leaves is what was played, from its beginning.
        for path in sorted(self.folder.glob(f"{name}_*.npz"), reverse=True):
            path.unlink()

    def played(self, name: str) -> Played | None:
        """Returns the steps of an unfinished log; None if there are none."""
        blocks: list[dict[str, Any]] = []
        while (path := self._block_path(name, len(blocks))).is_file():
            with np.load(path) as file:
                blocks.append(dict(file))
        if not blocks:
            return None
        steps = {key: np.concatenate([block[key] for block in blocks]) for key in _BLOCK}
        failures = [failure for block in blocks for failure in json.loads(str(block["failures"]))]
        return Played(**steps, failures={(t, i): reason for t, i, reason in failures})

    def keep(self, name: str, index: int, block: "_Block") -> None:
        """Keeps a block of steps, atomically."""
        arrays = {key: np.stack(getattr(block, key)) for key in _BLOCK}
        records.write_arrays(self._block_path(name, index), **arrays, failures=json.dumps(block.failures))

    def keep_episodes(self, **arrays: Any) -> None:
        """Keeps the episodes that are to stay when the journal goes."""
        records.write_arrays(self.folder / "episodes.npz", **arrays)

    def move_episodes(self, path: Path) -> None:
        """Moves the kept episodes to a place where they stay, unless they have been moved before."""
        kept = self.folder / "episodes.npz"
        if kept.is_file():
            kept.replace(path)

    def remove(self) -> None:
        """Removes the journal."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _block_path(self, name: str, index: int) -> Path:
        return self.folder / f"{name}_{index:06d}.npz"


_BLOCK = ("observation", "action", "reward", "done")


class _Block:
    """Steps in a row, each of all environments; rows of those that are finished stay zeros."""

    def __init__(self) -> None:
        self.observation: list[np.ndarray] = []
        self.action: list[np.ndarray] = []
        self.reward: list[np.ndarray] = []
        self.done: list[np.ndarray] = []
        self.failures: list[tuple[int, int, str]] = []


class JournalWriter:
    """Takes a rollout's transitions and keeps them in blocks of a fixed number of steps, an episode's at best."""

    def __init__(
        self, journal: EvaluationJournal, name: str, *, num_environments: int, block_steps: int
    ) -> None:
        """Goes on behind the steps that the journal holds, whose transitions come first and are not kept twice."""
        self.played = journal.played(name)
        self._journal, self._name = journal, name
        self._num_environments, self._block_steps = num_environments, block_steps
        self._num_kept = self.played.num_steps if self.played else 0
        self._num_seen = np.zeros(num_environments, np.int64)
        self._block = _Block()

    def add(self, transition: Transition) -> None:
        """Takes the next transition of some environments; when all have passed the end of a block, it is written."""
        members = transition.environment
        t = int(self._num_seen[members[0]])
        self._num_seen[members] += 1
        if t < self._num_kept:
            return
        # Parts take turns: a step that nobody has taken before shows that all have taken the one before it.
        if t - self._num_kept == len(self._block.reward) == self._block_steps:
            self._journal.keep(self._name, self._num_kept // self._block_steps, self._block)
            self._num_kept, self._block = t, _Block()
        row = t - self._num_kept
        if row == len(self._block.reward):
            self._append_row(transition)
        for key in _BLOCK:
            getattr(self._block, key)[row][members] = getattr(transition, key)
        self._block.failures += [(t, i, reason) for i, reason in transition.failures.items()]

    def _append_row(self, transition: Transition) -> None:
        for key in _BLOCK:
            values = getattr(transition, key)
            shape = (self._num_environments, *values.shape[1:])
            getattr(self._block, key).append(np.zeros(shape, values.dtype))
