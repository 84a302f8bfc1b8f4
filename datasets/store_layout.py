"""Where everything lies in a store file, so that many processes can write its episodes.

The file's structure is laid out first, every chunk at a known place. After that episodes are written beside
HDF5, straight to their places: no crash can leave the structure half-written, and processes need not send
arrays to each other.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int, Shaped

from bpt_rl.datasets.store_format import columns_of, episode_digest, fixed_text
from bpt_rl.datasets.store_seal import Gap, seal
from bpt_rl.datasets.whole_file import PatientFile, explained, sync_folder
from bpt_rl.types import Trajectory

_NO_DIGEST = fixed_text("0" * 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """Where one array of every episode lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    """Of a row."""
    offset: int
    """Of episode 0, bytes; the others follow, each padded to the longest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where every array of every episode lies in the file at `path`."""

    path: str
    out: str
    """Name that the file gets when it is whole; errors speak of it."""
    num_episodes: int
    """E."""
    rows: int
    """T1: of the longest episode."""
    columns: Mapping[str, Column]

    def _size(self, name: str) -> int:
        """Returns the bytes of one episode's array, padded."""
        column = self.columns[name]
        return math.prod((self.rows, *column.shape)) * np.dtype(column.dtype).itemsize

    def _place(self, name: str, index: int) -> int:
        return self.columns[name].offset + index * self._size(name)

    def gaps(self) -> list[Gap]:
        """Returns where the episodes' arrays lie."""
        return [Gap(self._place(name, 0), self.num_episodes * self._size(name)) for name in self.columns]

    def write(self, index: int, trajectory: Trajectory) -> str:
        """Writes an episode to its place and returns its digest.

        Raises:
          ValueError: If its arrays are not those that the layout was made for.
          OSError: If it cannot be written.
        """
        columns = columns_of(trajectory)
        for name, values in columns.items():
            column = self.columns[name]
            if values.shape[1:] != column.shape or values.dtype.str != column.dtype:
                raise ValueError(
                    f"All episodes of a store must have the same columns; {name} has {values.dtype} "
                    f"{values.shape[1:]} here and {np.dtype(column.dtype)} {column.shape} in the first. "
                    "Leave this episode out."
                )
        with explained(Path(self.out)), Path(self.path).open("r+b", buffering=0) as file:
            for name, values in columns.items():
                _write_at(file.fileno(), np.ascontiguousarray(values), self._place(name, index))
        return episode_digest(columns)

    def digest(self, index: int, num_steps: int) -> str:
        """Returns the digest of the episode that lies at a place, as `write` gave it if it is all there."""
        columns = {}
        with Path(self.path).open("rb", buffering=0) as file:
            for name, column in self.columns.items():
                shape, dtype = (num_steps + 1, *column.shape), np.dtype(column.dtype)
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                content = os.pread(file.fileno(), size, self._place(name, index))
                columns[name] = np.frombuffer(content.ljust(size, b"\0"), dtype).reshape(shape)
        return episode_digest(columns)


def _write_at(descriptor: int, values: Shaped[np.ndarray, "T1 ..."], place: int) -> None:
    left = values.data.cast("B") if values.size else memoryview(b"")
    while left:
        written = os.pwrite(descriptor, left, place)
        left, place = left[written:], place + written


def create(
    path: Path,
    out: Path,
    first: Trajectory,
    *,
    lengths: Int[np.ndarray, "E"],
    names: Sequence[str],
    attributes: Mapping[str, Any],
) -> Layout:
    """Returns the layout of a new file at `path`, whose size on disk is then reserved.

    Args:
      path: Replaced if it is there.
      out: Name that it gets when it is whole.
      first: An episode with the columns and tasks of all.
      lengths: Agent steps of every episode.
      names: Of every episode.
      attributes: Of the store; `finish` adds its digest.

    Raises:
      OSError: If there is no room.
    """
    rows, columns = int(lengths.max()) + 1, {}
    with explained(out), PatientFile(path, "w+") as raw:
        # Version 1.10 of the format carries checksums of its own structures.
        with h5py.File(raw, "w", libver=("v110", "v110")) as file:
            for name, values in columns_of(first).items():
                shape = (len(lengths), rows, *values.shape[1:])
                columns[name] = Column(
                    dtype=values.dtype.str,
                    shape=values.shape[1:],
                    offset=_create(file, name, shape, values.dtype),
                )
            for task in first.task_reward:
                file.create_dataset(f"return/{task}", (len(lengths),), np.float32)
            for name in ("observation_mean", "observation_std"):
                file.create_dataset(name, first.observation.shape[1:], np.float64)
            file["length"] = lengths
            file["name"] = np.array([name.encode() for name in names])
            file.create_dataset("digest", (len(lengths),), "S64")
            for name, value in attributes.items():
                file.attrs[name] = value
            file.attrs["digest"] = _NO_DIGEST
        raw.check()
        size = raw.seek(0, os.SEEK_END)
        os.posix_fallocate(raw.fileno(), 0, size)
        os.fsync(raw.fileno())
    return Layout(path=str(path), out=str(out), num_episodes=len(lengths), rows=rows, columns=columns)


def _create(file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    if 0 in shape:
        file.create_dataset(name, shape, dtype)
        return 0
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((1, *shape[1:]))
    # Laid out at once and in order, so that there is no index of chunks that a crash could spoil.
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    group, _, leaf = name.rpartition("/")
    parent = file.require_group(group) if group else file
    kind, space = h5py.h5t.py_create(dtype), h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(parent.id, leaf.encode(), kind, space, creation)
    places = [dataset.get_chunk_info(i).byte_offset for i in (0, shape[0] - 1)]
    if places[1] - places[0] != (shape[0] - 1) * int(np.prod(shape[1:])) * dtype.itemsize:
        raise RuntimeError(f"HDF5 must lay chunks out in order; it did not for {name}. Report this as a bug.")
    return int(places[0])


def finish(layout: Layout, arrays: Mapping[str, Shaped[np.ndarray, "..."]], digest: str) -> None:
    """Fills in what only the whole store has, makes sure of every byte on disk, and gives the file its name.

    Nothing changes its place or size, so that it can be done again after a kill and gives the same bytes.

    Raises:
      OSError: If it cannot be written.
    """
    path, out = Path(layout.path), Path(layout.out)
    with explained(out), PatientFile(path, "r+") as raw:
        with h5py.File(raw, "r+") as file:
            for name, values in arrays.items():
                file[name][...] = values
            file.attrs.modify("digest", fixed_text(digest))
        seal(raw, layout.gaps())
        raw.check()
        os.fsync(raw.fileno())
        path.replace(out)
        sync_folder(out.parent)
