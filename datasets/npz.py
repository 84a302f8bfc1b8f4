"""Arrays of an npz file in memory: no pickles, and nothing inflated beyond what was declared and allowed."""

import functools
import zipfile
from io import BytesIO

import numpy as np
from jaxtyping import Shaped

from bpt_rl.datasets import zip_directory

LARGEST = 256 * 2**20
"""Bytes of all arrays of a file together, unless the caller says otherwise."""

_LONGEST_HEADER = 10_000
_PLAIN_KINDS = "?biufcSUmM"


def read_arrays(content: bytes, name: str, *, largest: int = LARGEST) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Returns the arrays of an npz file by key, in native byte order and mostly read-only.

    Args:
      content: The whole file.
      name: What to call it in messages.
      largest: Bytes that all arrays may have together, headers included.

    Raises:
      ValueError: If the file is damaged, its arrays are too large, or one is structured or holds Python
        objects; the message names file and reason.

    Source: `numpy.lib.format`, versions 1.0 and 2.0 of the format.
    """

    def read_at(offset: int, size: int) -> bytes:
        return content[offset : offset + size]

    try:
        members = zip_directory.read_directory(read_at, len(content))
        declared = sum(member.size for member in members.values())
        if declared > largest:
            raise ValueError(f"its arrays declare {declared} bytes, more than {largest}")
        return dict(_entry(member, read_at) for member in members.values())
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(
            f"An episode must be a whole npz file; {name} cannot be read ({error}). "
            "Download or collect it again."
        ) from error


def _entry(
    member: zip_directory.Member, read_at: zip_directory.ReadAt
) -> tuple[str, Shaped[np.ndarray, "..."]]:
    if not member.name.endswith(".npy"):
        raise ValueError(f"{member.name!r} is no npy array")
    content = zip_directory.read_member(read_at, member)
    try:
        return member.name.removesuffix(".npy"), _array(content)
    # A damaged header makes NumPy and Python's parser raise nearly anything, a MemoryError too.
    except Exception as error:
        raise ValueError(f"{member.name!r}: {error or type(error).__name__}") from error


def _array(content: bytes) -> Shaped[np.ndarray, "..."]:
    # Version 3.0 is for structured arrays with names beyond Latin-1.
    if content[:8] not in (b"\x93NUMPY\1\0", b"\x93NUMPY\2\0"):
        raise ValueError("an array does not begin like npy of version 1 or 2")
    size_end = 10 if content[6] == 1 else 12
    begin = size_end + int.from_bytes(content[8:size_end], "little")
    if begin > _LONGEST_HEADER:
        raise ValueError(f"an array's header has {begin} bytes, more than {_LONGEST_HEADER}")
    shape, is_fortran, dtype, num_bytes = _header(content[:begin])
    if num_bytes != len(content) - begin:
        raise ValueError(f"an array of shape {shape} and type {dtype} has {len(content) - begin} bytes")
    array: np.ndarray = np.ndarray(
        shape, dtype, buffer=content, offset=begin, order="F" if is_fortran else "C"
    )
    if not (array.flags.aligned and dtype.isnative):
        array = array.astype(dtype.newbyteorder("="), order="K")
    return array


@functools.lru_cache(maxsize=256)
def _header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Returns shape, whether in Fortran's order, type, and bytes; the headers of 10,000 episodes repeat."""
    file = BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    if dtype.kind not in _PLAIN_KINDS or dtype.itemsize == 0:
        raise ValueError(f"an array is of type {dtype}, not a plain one")
    num_bytes = dtype.itemsize
    for length in shape:
        num_bytes *= length
    if min(shape, default=0) < 0:
        raise ValueError(f"an array has shape {shape}")
    return shape, is_fortran, dtype, num_bytes
