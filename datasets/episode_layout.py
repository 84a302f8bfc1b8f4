"""ExoRL's layout of an episode: its file name, its arrays, and what both must fulfil."""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from bpt_rl.datasets import npz
from bpt_rl.types import Trajectory

KEYS = ("observation", "action", "reward", "discount", "physics")

LARGEST_EPISODE = 256 * 2**20
"""Bytes of an episode's file, and of its arrays; ExoRL's have up to 1 MiB."""

_NAME = re.compile(r"(?:episode|\d{8}T\d{6})_(\d{1,18})_(\d{1,18})\.npz", re.ASCII)


def parse_name(name: str) -> tuple[int, int] | None:
    """Returns the index and the number of steps that a file name states, or None for another kind of file.

    Both namings that ExoRL's code used are known: `episode_000017_1000.npz` and
    `20211012T120000_17_1000.npz`. Folders before the name are ignored.
    """
    match = _NAME.fullmatch(name.rpartition("/")[2])
    return (int(match[1]), int(match[2])) if match else None


def parse_episode(content: bytes, name: str) -> Trajectory:
    """Returns the episode of an npz file in memory; `exorl.read_episode` says what is in it.

    Raises:
      ValueError: If the file is damaged or breaks the layout; the message calls it `name`.
    """
    check_size(len(content), name)
    arrays = npz.read_arrays(content, name, largest=LARGEST_EPISODE)
    check_arrays(arrays, name)
    extras = {key: values for key, values in arrays.items() if key not in KEYS}
    columns: dict[str, Any] = {key: arrays[key].astype(np.float32, copy=False) for key in KEYS[:-1]}
    return Trajectory(**columns, physics=arrays["physics"], extras=extras)


def check_size(size: int, name: str) -> None:
    """Raises ValueError if a file so called has too many bytes for an episode."""
    if size > LARGEST_EPISODE:
        raise ValueError(
            f"An episode must have at most {LARGEST_EPISODE} bytes; {name} has {size}. Leave this file out."
        )


def check_arrays(arrays: Mapping[str, Shaped[np.ndarray, "..."]], name: str) -> None:
    """Raises ValueError if the arrays of a file so called are no episode."""
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
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argmin(finite.all(axis=1)))
        raise ValueError(
            f"{key} must be finite; got {values[row][~finite[row]][0]} in row {row} of "
            f"{name}. Leave this file out."
        )
