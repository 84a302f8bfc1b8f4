"""Episodes in ExoRL's npz layout: reading, writing, and walking through a folder or a zip."""

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from bpt_rl.datasets import whole_file
from bpt_rl.types import Trajectory

KEYS = ("observation", "action", "reward", "discount", "physics")
_NAME = re.compile(r"(?:episode|\d{8}T\d{6})_(\d+)_(\d+)\.npz")


@runtime_checkable
class BinaryFile(Protocol):
    """A file opened for binary reading, in memory or in a zip too."""

    def read(self, size: int = -1, /) -> bytes:
        """Returns at most `size` bytes, or all."""


def parse_name(name: str) -> tuple[int, int] | None:
    """Returns the index and the number of steps that a file name states, or None for another kind of file.

    Both namings that ExoRL's code used are known: `episode_000017_1000.npz` and
    `20211012T120000_17_1000.npz`. Folders before the name are ignored.
    """
    match = _NAME.fullmatch(name.rpartition("/")[2])
    return (int(match[1]), int(match[2])) if match else None


def read_episode(path: str | os.PathLike[str] | BinaryFile) -> Trajectory:
    """Returns the episode of an npz file; arrays that ExoRL does not name go to `extras`.

    Observation, action, reward and discount may be stored in any floating type and become float32. Physics
    must be float64: rewards relabelled from anything coarser are not exact.

    Args:
      path: An npz file, or one opened for binary reading. A name like ExoRL's states the number of steps.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is cut short or damaged, or its arrays break the layout; the message says how.
    """
    if isinstance(path, str | os.PathLike):
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"An episode must be an npz file; there is none at {path}. Check the path."
            )
        return _parse(Path(path).read_bytes(), str(path))
    return _parse(path.read(), str(getattr(path, "name", "the opened file")))


def write_episode(path: str | os.PathLike[str], trajectory: Trajectory) -> None:
    """Writes an episode in ExoRL's layout, so that a reader never sees a part of it.

    Raises:
      ValueError: If the trajectory breaks the layout, or the file name states another number of steps.
      OSError: If the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {key: np.asarray(getattr(trajectory, key)) for key in KEYS}
    _check({**arrays, **trajectory.extras}, str(path))
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
      source: A folder that holds episodes itself or in `buffer/`, or a zip with episodes in any folder.

    Raises:
      FileNotFoundError: If there is no such folder or zip, or no episode in it.
      ValueError: If a file is not a zip.
    """
    source = Path(source)
    if source.is_dir():
        folders = (source, source / "buffer")
        groups = [[str(p.relative_to(source)) for p in folder.glob("*.npz")] for folder in folders]
    elif source.is_file():
        with _open_zip(source) as archive:
            groups = [archive.namelist()]
    else:
        raise FileNotFoundError(
            f"Episodes must lie in a folder or a zip; there is neither at {source}. Check the path."
        )
    for names in groups:
        indexed = [(parsed[0], name) for name in names if (parsed := parse_name(name))]
        if indexed:
            return tuple(name for _, name in sorted(indexed))
    raise FileNotFoundError(
        "A folder or zip of episodes must hold files named episode_{index}_{length}.npz or "
        f"{{timestamp}}_{{index}}_{{length}}.npz; {source} holds none. Name their folder or zip."
    )


def iterate_episodes(source: str | os.PathLike[str]) -> Iterator[tuple[str, Trajectory]]:
    """Returns an iterator over (name, episode) of a folder or zip, by index; a zip is not unpacked.

    Raises:
      FileNotFoundError: At once, as `list_episodes` does.
      ValueError: At once if a file is not a zip; on reaching an episode that `read_episode` refuses.
    """
    return _read_all(Path(source), list_episodes(source))


def _read_all(source: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Trajectory]]:
    if source.is_dir():
        for name in names:
            yield name, read_episode(source / name)
        return
    with _open_zip(source) as archive:
        for name in names:
            try:
                content = archive.read(name)
            except (zipfile.BadZipFile, OSError, EOFError) as error:
                raise ValueError(_damaged(f"{source}/{name}", error)) from error
            yield name, _parse(content, f"{source}/{name}")


def _open_zip(source: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"Episodes must lie in a folder or a zip; {source} is a file but no whole zip. Download it again."
        ) from error


def _damaged(name: str, error: Exception) -> str:
    return (
        f"An episode must be a whole npz file; {name} cannot be read ({error}). Download or collect it again."
    )


def _parse(content: bytes, name: str) -> Trajectory:
    try:
        # NumPy takes anything that is no zip for a pickle, and advises to load it unsafely.
        if not content.startswith(b"PK"):
            raise ValueError("it does not begin like a zip")
        with np.load(BytesIO(content), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    # NumPy has no error of its own: a cut header, deflate stream or checksum each raise another.
    except Exception as error:
        raise ValueError(_damaged(name, error)) from error
    _check(arrays, name)
    extras = {key: values for key, values in arrays.items() if key not in KEYS}
    columns = {key: arrays[key].astype(np.float32, copy=False) for key in KEYS[:-1]}
    return Trajectory(**columns, physics=arrays["physics"], extras=extras)


def _check(arrays: Mapping[str, Shaped[np.ndarray, "..."]], name: str) -> None:
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(
            f"An episode must hold {', '.join(KEYS)}; {name} lacks {', '.join(missing)}. Leave this file out."
        )
    rows = len(arrays["observation"]) if arrays["observation"].ndim else 0
    for key in KEYS:
        _check_array(key, arrays[key], rows, name)
    stated = parse_name(name.replace(os.sep, "/"))
    if stated and stated[1] != rows - 1:
        raise ValueError(
            f"A file name must state the episode's number of steps; {name} holds {rows - 1} "
            "(rows less the dummy row). Rename it, or download it again."
        )


def _check_array(key: str, values: Shaped[np.ndarray, "..."], rows: int, name: str) -> None:
    if values.ndim != 2 or len(values) != rows or rows < 2 or (key == "discount" and values.shape[1] != 1):
        raise ValueError(
            f"{key} must have two axes (discount: 1 column) and as many rows as observation, at least 2; "
            f"got shape {values.shape} beside {rows} rows of observation in {name}. Leave this file out."
        )
    if key == "physics" and values.dtype != np.float64:
        raise ValueError(
            f"physics must be float64, or relabelled rewards are not exact; got {values.dtype} in {name}. "
            "Record the episode again."
        )
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"{key} must be of a floating type; got {values.dtype} in {name}. Leave this file out."
        )
    if key != "physics":
        # Values beyond float32's range become infinite here and are refused below.
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"{key} must be finite; got {values[row][~np.isfinite(values[row])][0]} in row {row} of "
            f"{name}. Leave this file out."
        )
