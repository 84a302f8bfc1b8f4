"""The beginning of a file that is still being fetched: kept across processes, written by one at a time."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from bpt_rl.datasets.remote_file import PIECE, Version
from bpt_rl.datasets.whole_file import explained, sync_folder, whole_file


class PartialFile:
    """Bytes beside `target` that make up its beginning, and the version of the remote file that they are of."""

    def __init__(self, target: Path, file: FileIO) -> None:
        """Takes over an open file whose lock this process holds."""
        self._target = target
        self.path = _part_of(target)
        """Where the bytes lie meanwhile."""
        self._note = self.path.with_name(f"{self.path.name}.json")
        self._file = file
        self.version = self._noted_version()
        """None if nothing is there that could be gone on with."""
        if self.version is None:
            self.drop()

    @property
    def num_bytes(self) -> int:
        """Bytes that are there."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def is_whole(self) -> bool:
        """Whether all bytes of the remote file are there."""
        return self.version is not None and self.num_bytes == self.version.num_bytes

    def drop(self) -> None:
        """Drops what is there."""
        with explained(self._target):
            self._file.truncate(0)
        self.version = None

    def begin(self, version: Version) -> None:
        """Drops what is there, for the first byte of `version`.

        Raises:
          OSError: If the disk refuses.
        """
        self.drop()
        self.version = version
        with whole_file(self._note) as file:
            file.write(json.dumps(dataclasses.asdict(version)).encode())

    def append(self, data: bytes) -> None:
        """Writes the next bytes.

        Raises:
          OSError: If the disk refuses. What was written stays.
        """
        left = memoryview(data)
        with explained(self._target):
            while left:
                left = left[self._file.write(left) :]

    def pieces(self) -> Iterator[bytes]:
        """Yields the bytes that are there."""
        with self.path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece

    def become_whole(self) -> None:
        """Puts the file in its place.

        Raises:
          OSError: If the disk refuses. Then nothing is in its place.
        """
        self._move_to(self._target)

    def set_aside(self) -> Path:
        """Returns where the bytes, which turned out wrong, are kept from now on; what was there before goes."""
        aside = self._target.with_name(f"{self._target.name}.rejected")
        self._move_to(aside)
        return aside

    def _move_to(self, path: Path) -> None:
        with explained(path):
            os.fsync(self._file.fileno())
            self.path.replace(path)
            self._note.unlink(missing_ok=True)
            sync_folder(path.parent)

    def _noted_version(self) -> Version | None:
        try:
            version = Version(**json.loads(self._note.read_bytes()))
            is_fit = bool(version.validator) and 0 < self.num_bytes <= version.num_bytes
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None
        return version if is_fit or 0 < self.num_bytes == version.num_bytes else None

    def drop_if_empty(self) -> None:
        """Leaves nothing behind where nothing was fetched."""
        if self.num_bytes == 0 and _is_at(self._file, self.path):
            self.path.unlink()
            self._note.unlink(missing_ok=True)


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


@contextlib.contextmanager
def open_partial(target: Path) -> Iterator[PartialFile]:
    """Yields what is there of `target`, which no other process may write meanwhile.

    Raises:
      OSError: If another process is writing it, or the folder cannot be written.
    """
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(_part_of(target))
    if file is None:
        raise OSError(
            errno.EAGAIN,
            f"One process at a time may download a file; another one is downloading {target}. Wait for its end.",
        )
    with file:
        partial = PartialFile(target, file)
        try:
            yield partial
        finally:
            partial.drop_if_empty()


def _locked(path: Path) -> FileIO | None:
    """Returns the file at `path`, made if there is none; None if another process holds its lock."""
    while True:
        file = FileIO(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        # Whoever held the lock before may have moved the file to its place.
        if _is_at(file, path):
            return file
        file.close()


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
