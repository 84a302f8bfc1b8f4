"""What a long piece of work has done so far, one line of JSON an entry, kept through kills."""

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
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def _read(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        # A kill may have cut the last line short.
        whole = lines[:-1]
        if not whole or whole[0] != _line(header):
            self.clear(header)
            return
        self.entries = [json.loads(line) for line in whole[1:]]
        os.ftruncate(self._file.fileno(), sum(len(line) + 1 for line in whole))

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
