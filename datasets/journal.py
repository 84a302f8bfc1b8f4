"""What a long piece of work has done so far, one line of JSON an entry, kept through kills."""

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """The journal of one piece of work. Open, it is locked: no other process can do the same work."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Opens the journal at `path`, and begins it anew if it is of other work.

        Args:
          path: Created if it is not there.
          header: What the work is; JSON values.

        Raises:
          BlockingIOError: If another process has it open.
          OSError: If it cannot be read or written.
        """
        self.path = path
        self.entries: list[dict[str, Any]] = []
        """Done before, in order."""
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_name()
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def _check_name(self) -> None:
        """Checks that the locked file is still the one at the path: whoever had it may just have removed it."""
        try:
            is_same = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise BlockingIOError(errno.EWOULDBLOCK, "The journal was just removed", str(self.path))

    def _read(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        # A kill may have cut the last line short.
        whole = lines[:-1]
        if not whole or whole[0] != _line(header):
            self.clear(header)
            return
        num_bytes = len(whole[0]) + 1
        for line in whole[1:]:
            try:
                self.entries.append(json.loads(line))
            except ValueError:
                # A machine that lost power; what it still knew of is good.
                break
            num_bytes += len(line) + 1
        os.ftruncate(self._file.fileno(), num_bytes)

    def clear(self, header: Mapping[str, Any]) -> None:
        """Forgets every entry and begins with a new header."""
        self.entries = []
        os.ftruncate(self._file.fileno(), 0)
        self.append(header)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds an entry that a kill of this process will not lose."""
        self._file.write(_line(entry) + b"\n")
        self._file.flush()

    def remove(self) -> None:
        """Deletes the journal: the work is done, or given up."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode()
