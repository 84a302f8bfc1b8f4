"""Files that appear whole or not at all."""

import contextlib
import io
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class PatientFile(io.FileIO):
    """A binary file whose failing writes seem to succeed; `error` then holds the reason.

    HDF5 cannot close a file that it failed to write, and the interpreter crashes at its end. Behind this
    file it closes like any other, and `whole_file` discards what was written.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Writes all of `data`, or remembers why that failed."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while self.error is None and left:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None, /) -> int:
        """Sets the size of the file, or remembers why that failed."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        """Raises the error that a write met, if any."""
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[PatientFile]:
    """Yields a file beside `path` that takes its place once the block ends and every byte is on disk.

    Raises:
      OSError: If anything could not be written. Then, as after any other error, `path` is as it was and
        nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = PatientFile(temporary, "w+")
    try:
        with file:
            try:
                yield file
            finally:
                # A failed write is the cause of whatever else went wrong.
                with explained(path):
                    file.check()
            with explained(path):
                os.fsync(file.fileno())
        with explained(path):
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says of an error in the block that `path` could not be written whole."""
    try:
        yield
    except OSError as error:
        # HDF5 gives a report of several lines for a reason.
        reason = os.strerror(error.errno) if error.errno else error
        raise OSError(
            error.errno,
            f"A file must be written whole; {path} was not: {reason}. Free space or use another.",
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
