"""Episodes in ExoRL's npz layout: reading, writing, and walking through a folder or a zip."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from bpt_rl.datasets import whole_file
from bpt_rl.datasets.episode_layout import KEYS, LARGEST_EPISODE, check_arrays, parse_episode, parse_name
from bpt_rl.datasets.episode_source import EpisodeSource, read_file
from bpt_rl.types import Trajectory

__all__ = [
    "KEYS",
    "BinaryFile",
    "iterate_episodes",
    "list_episodes",
    "parse_name",
    "read_episode",
    "write_episode",
]


@runtime_checkable
class BinaryFile(Protocol):
    """A file opened for binary reading, in memory or in a zip too."""

    def read(self, size: int = -1, /) -> bytes:
        """Returns at most `size` bytes, or all."""


def read_episode(path: str | os.PathLike[str] | BinaryFile) -> Trajectory:
    """Returns the episode of an npz file; arrays that ExoRL does not name go to `extras`.

    Observation, action, reward and discount may be stored in any floating type and become float32. Physics
    must be float64: rewards relabelled from anything coarser are not exact. The arrays are read-only.

    Args:
      path: An npz file, or one opened for binary reading. A name like ExoRL's states the number of steps.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is cut short, damaged or larger than `LARGEST_EPISODE`, or its arrays break the
        layout; the message says how.
    """
    if isinstance(path, str | os.PathLike):
        return parse_episode(read_file(path), str(path))
    return parse_episode(path.read(LARGEST_EPISODE + 1), str(getattr(path, "name", "the opened file")))


def write_episode(path: str | os.PathLike[str], trajectory: Trajectory) -> None:
    """Writes an episode in ExoRL's layout, so that a reader never sees a part of it.

    Raises:
      ValueError: If the trajectory breaks the layout, or the file name states another number of steps.
      OSError: If the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {key: np.asarray(getattr(trajectory, key)) for key in KEYS}
    check_arrays({**arrays, **trajectory.extras}, str(path))
    objects = [key for key, values in trajectory.extras.items() if values.dtype.hasobject]
    if objects:
        raise ValueError(
            f"extras must hold plain arrays; {objects[0]} holds Python objects. Convert or drop it."
        )
    for key in KEYS[:-1]:
        arrays[key] = arrays[key].astype(np.float32)
    with whole_file.whole_file(path) as file:
        np.savez_compressed(file, **arrays, **trajectory.extras)  # type: ignore[arg-type]


def list_episodes(source: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the names of the episodes of a folder or zip, by index.

    Args:
      source: What `EpisodeSource.open` takes.

    Raises:
      FileNotFoundError: If there is no such folder or zip, or no episode in it.
      ValueError: If a file is not a whole and safe zip, or two episodes have the same index.
    """
    with EpisodeSource.open(source) as opened:
        return opened.names


def iterate_episodes(source: str | os.PathLike[str]) -> Iterator[tuple[str, Trajectory]]:
    """Returns an iterator over (name, episode) of a folder or zip, by index; a zip is not unpacked.

    Raises:
      FileNotFoundError: At once, as `list_episodes` does.
      ValueError: At once, as `list_episodes` does; on reaching an episode that `read_episode` refuses.
    """
    return _read_all(EpisodeSource.open(source))


def _read_all(source: EpisodeSource) -> Iterator[tuple[str, Trajectory]]:
    with source:
        for name in source.names:
            yield name, source.read(name)
