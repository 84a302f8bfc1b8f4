"""What a store file consists of, and the digests that hold it together.

Axes: E episodes, T1 rows of the longest; shorter ones are padded with zeros.
  observation [E, T1, O] f4     discount [E, T1, 1] f4        reward/<task> [E, T1] f4
  action [E, T1, A] f4          stored_reward [E, T1, R] f4   return/<task> [E] f4
  physics [E, T1, P] f8         features [E, T1, F] f8        length [E] i8 (steps)
  observation_mean, observation_std [O] f8                    name [E] (source/file), digest [E] (SHA-256)
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from bpt_rl.types import Trajectory

FORMAT_VERSION = 2

COLUMNS: Mapping[str, str] = {
    "observation": "observation",
    "action": "action",
    "stored_reward": "reward",
    "discount": "discount",
    "physics": "physics",
    "features": "features",
}
"""Field of `Trajectory` that each dataset holds, in the order of the digest."""


def columns_of(trajectory: Trajectory) -> dict[str, Shaped[np.ndarray, "T1 ..."]]:
    """Returns what the store keeps of an episode, by the path of its dataset, in the order of the digest."""
    columns = {name: getattr(trajectory, field) for name, field in COLUMNS.items()}
    return columns | {f"reward/{task}": values for task, values in sorted(trajectory.task_reward.items())}


def episode_digest(columns: Mapping[str, Shaped[np.ndarray, "T1 ..."]]) -> str:
    """Returns the SHA-256 of an episode's arrays (`columns_of`), with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, values in columns.items():
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def store_digest(episode_digests: Sequence[str], tasks: Sequence[str], action_repeat: int) -> str:
    """Returns the SHA-256 that identifies a store's content; the order of the tasks does not matter."""
    parts = [str(FORMAT_VERSION), *sorted(tasks), str(action_repeat), *episode_digests]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def subset_digest(names: Sequence[str]) -> str:
    """Returns the SHA-256 that identifies a subset: the names of its episodes, in order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def fixed_text(text: str) -> Shaped[np.ndarray, ""]:
    """Returns text as an attribute of fixed length, which is written in place."""
    return np.array(text.encode(), f"S{max(1, len(text.encode()))}")
