"""Telling whether the bytes of a zip are the right ones: by SHA-256, or by an ETag that is made of MD5s."""

import hashlib
import re
from collections.abc import Mapping

from bpt_rl.datasets.catalogue import Archive

PART_SIZES = (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024)
"""MiB a part of an upload in parts: those that the usual programs choose."""
_MIB = 2**20
_ETAG = re.compile(r'"?([0-9a-f]{32})(?:-([1-9]\d*))?"?')


class Verification:
    """Digests of bytes that are fed in order, and what they say in the end."""

    def __init__(
        self, archive: Archive, *, num_bytes: int, etag: str, why_none: str = "the server gave no ETag"
    ) -> None:
        """Prepares the digests that the archive and its server allow to check.

        Args:
          archive: Its own SHA-256 or ETag, if known, is what counts.
          num_bytes: That will be fed.
          etag: As the server's header gives it; empty if it gives none.
          why_none: A clause that says why `etag` is empty.
        """
        self._archive = archive
        self._sha256 = hashlib.sha256()
        self._owner = "catalogue's" if archive.etag else "server's"
        self._etag = archive.etag or etag
        self._why_none = why_none
        self._candidates = {} if archive.sha256 else _candidates(self._etag, num_bytes)

    def update(self, data: bytes) -> None:
        """Feeds the next bytes."""
        self._sha256.update(data)
        for candidate in self._candidates.values():
            candidate.update(data)

    @property
    def sha256(self) -> str:
        """Of what was fed: 64 hexadecimal digits."""
        return self._sha256.hexdigest()

    def conclude(self) -> str:
        """Returns by what the bytes are verified, or that they are NOT and why.

        Raises:
          ValueError: If they are not what was asked for. The sentence lacks its end, what to do.
        """
        if self._archive.sha256:
            if self.sha256 == self._archive.sha256:
                return "verified by SHA-256"
            raise ValueError(
                f"{self._archive.name} must have SHA-256 {self._archive.sha256}; got {self.sha256}"
            )
        if not self._candidates:
            return f"NOT verified: the catalogue knows no SHA-256, and {self._why_not()}"
        found = {candidate.etag(): name for name, candidate in self._candidates.items()}
        expected = self._etag.strip('"')
        if expected in found:
            return f"verified by the {self._owner} {found[expected]}"
        raise ValueError(
            f"{self._archive.name} must have the {self._owner} {' or '.join(found.values())}, {expected}; "
            f"got {' or '.join(found)}"
        )

    def _why_not(self) -> str:
        if not self._etag:
            return self._why_none
        parts = _ETAG.fullmatch(self._etag)
        if parts is None:
            return f"the server's ETag {self._etag} is not made of MD5s"
        return f"no usual part size gives the {parts[2]} parts of the {self._owner} ETag {self._etag}"


class _PartedMD5:
    """The ETag of an upload in parts: the MD5 of the parts' MD5s, then their number."""

    def __init__(self, part_size: int) -> None:
        self._part_size = part_size
        self._ended: list[bytes] = []
        self._part, self._filled = hashlib.md5(usedforsecurity=False), 0

    def update(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            piece = left[: self._part_size - self._filled]
            self._part.update(piece)
            self._filled += len(piece)
            if self._filled == self._part_size:
                self._ended.append(self._part.digest())
                self._part, self._filled = hashlib.md5(usedforsecurity=False), 0
            left = left[len(piece) :]

    def etag(self) -> str:
        digests = self._ended + ([self._part.digest()] if self._filled else [])
        return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


class _WholeMD5:
    """The ETag of an upload in one piece."""

    def __init__(self) -> None:
        self._whole = hashlib.md5(usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self._whole.update(data)

    def etag(self) -> str:
        return self._whole.hexdigest()


def part_sizes(num_bytes: int, num_parts: int) -> tuple[int, ...]:
    """Returns the usual part sizes, in bytes, that cut so many bytes into so many parts."""
    sizes = (size * _MIB for size in PART_SIZES)
    return tuple(size for size in sizes if -(-num_bytes // size) == num_parts)


def _candidates(etag: str, num_bytes: int) -> Mapping[str, _PartedMD5 | _WholeMD5]:
    """Returns the digests that may give this ETag, by what to call it; none for one not made of MD5s."""
    match = _ETAG.fullmatch(etag)
    if match is None:
        return {}
    if match[2] is None:
        return {"ETag, an MD5": _WholeMD5()}
    if int(match[2]) == 1:
        return {"multipart ETag (one part)": _PartedMD5(max(num_bytes, 1))}
    sizes = part_sizes(num_bytes, int(match[2]))
    return {f"multipart ETag ({size // _MIB} MiB parts)": _PartedMD5(size) for size in sizes}
