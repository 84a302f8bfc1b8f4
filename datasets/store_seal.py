"""The seal at the end of a store file: the SHA-256 of every byte of it but the episodes' arrays.

A few megabytes of structure, lengths, names, digests and returns are checked whenever a store is opened, and
before HDF5 sees them: its own checksums leave some of them out, and its library crashes on some structures that
carry good ones. Each episode's arrays have a digest, which `bpt_rl.datasets.verification` checks.

HDF5 takes no notice of what lies behind its end; writing through it cuts the seal off. Layout, little-endian:
  first byte and size of each gap, two u8    SHA-256, 32 bytes    number of gaps, u4    b"BPTSEAL1"
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

_MAGIC = b"BPTSEAL1"
_END = struct.Struct("<32sI8s")
_MOST_GAPS = 10_000
_PIECE = 1 << 20


class Gap(NamedTuple):
    """Bytes of the file that the seal leaves out."""

    start: int
    size: int


def seal(file: FileIO, gaps: Sequence[Gap]) -> None:
    """Appends the seal to an open file.

    Args:
      file: Readable and writable; ends where HDF5's part ends.
      gaps: In any order; they lie in the file and do not overlap.
    """
    end = file.seek(0, os.SEEK_END)
    gaps = sorted(gap for gap in gaps if gap.size)
    digest = _digest(file, gaps, end)
    file.write(_packed(gaps) + _END.pack(digest, len(gaps), _MAGIC))


def seal_fault(path: Path) -> str:
    """Returns how a file is not as it was sealed, or ""."""
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        tail = _read(file, max(0, size - _END.size), size)
        if not tail.endswith(_MAGIC) or len(tail) < _END.size:
            return "does not end like a store: it is none, was cut short, or was written to"
        digest, num_gaps, _ = _END.unpack(tail)
        end = size - _END.size - num_gaps * 16
        if num_gaps <= _MOST_GAPS and end >= 0:
            packed = _read(file, end, size - _END.size)
            gaps = [Gap(*pair) for pair in struct.iter_unpack("<QQ", packed)]
            if _digest(file, gaps, end) == digest:
                return ""
    return "is damaged: its structure does not match the digest at its end"


def _packed(gaps: Sequence[Gap]) -> bytes:
    return b"".join(struct.pack("<QQ", *gap) for gap in gaps)


def _digest(file: FileIO, gaps: Sequence[Gap], end: int) -> bytes:
    digest = hashlib.sha256(_packed(gaps))
    edges = [0, *(edge for start, size in gaps for edge in (start, start + size)), end]
    if edges != sorted(edges):
        return b""
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        for piece in _pieces(file, start, stop):
            digest.update(piece)
    return digest.digest()


def _pieces(file: FileIO, start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, _PIECE):
        yield _read(file, at, min(at + _PIECE, stop))


def _read(file: FileIO, start: int, stop: int) -> bytes:
    return os.pread(file.fileno(), stop - start, start)
