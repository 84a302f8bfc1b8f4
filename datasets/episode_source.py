"""An opened folder or zip of episodes, listed once and read in any order; a zip is never unpacked."""

import functools
import hashlib
import os
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from bpt_rl.datasets import zip_directory
from bpt_rl.datasets.episode_layout import check_size, parse_episode, parse_name
from bpt_rl.types import Trajectory


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.marks: dict[str, tuple[int, int]] = {}
        for inner in ("", "buffer"):
            if not self.marks and (path / inner).is_dir():
                self.marks = self._marks(inner)

    def _marks(self, inner: str) -> dict[str, tuple[int, int]]:
        marks = {}
        with os.scandir(self._path / inner) as entries:
            for entry in entries:
                if not entry.name.endswith(".npz"):
                    continue
                try:
                    status = entry.stat()
                except OSError as error:
                    raise ValueError(_no_plain_file(entry.path)) from error
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError(_no_plain_file(entry.path))
                if parse_name(entry.name):
                    check_size(status.st_size, entry.path)
                    marks[f"{inner}/{entry.name}".lstrip("/")] = (status.st_size, status.st_mtime_ns)
        return marks

    def read(self, name: str) -> bytes:
        return read_file(self._path / name)

    def close(self) -> None:
        """Nothing is held open."""


class _Zip:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        try:
            size = os.fstat(self._file.fileno()).st_size
            self._members = zip_directory.read_directory(self._read_at, size)
            self.marks = {name: (m.size, m.crc) for name, m in self._members.items() if parse_name(name)}
            self._check_members()
        except BaseException as error:
            self._file.close()
            if isinstance(error, zipfile.BadZipFile):
                raise ValueError(
                    f"Episodes must lie in a folder or a zip; {path} is a file but no whole zip ({error}). "
                    "Download it again."
                ) from error
            raise

    def _check_members(self) -> None:
        folders = {name.rpartition("/")[0] for name in self.marks}
        for name, member in self._members.items():
            if not name.endswith(".npz") or name.rpartition("/")[0] not in folders:
                continue
            if name not in self.marks:
                raise zipfile.BadZipFile(f"{name!r} lies among episodes but has no episode's name")
            check_size(max(member.size, member.compressed_size), f"{self._path}/{name}")

    def _read_at(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def read(self, name: str) -> bytes:
        if self._file.closed:
            raise ValueError(f"A source must be open to be read; {self._path} is closed. Open it again.")
        try:
            return zip_directory.read_member(self._read_at, self._members[name])
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"An episode must be a whole npz file; {self._path}/{name} cannot be read ({error}). "
                "Download or collect it again."
            ) from error

    def close(self) -> None:
        self._file.close()


class EpisodeSource:
    """The episodes of a folder or zip.

    It may be read from several threads at once, and from the children that a process forks.

    Attributes:
      path: The folder or zip.
      names: Of the episodes' files, by the index that each states; relative to a folder, whole in a zip.
      num_steps: Of each episode, as its name states; reading it checks that.
    """

    def __init__(self, path: Path, contents: _Folder | _Zip) -> None:
        self.path = path
        self._contents = contents
        self.names, self.num_steps = _by_index(contents.marks, path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "EpisodeSource":
        """Returns an opened folder, with episodes in it or in its `buffer/`, or zip, with episodes in any folder.

        A folder may hold symbolic links to plain files: that is how a subset is made without copies. A zip
        may hold plain files and folders only; `zip_directory.read_directory` says what else is refused.

        Raises:
          FileNotFoundError: If there is no such folder or zip, or no episode in it.
          ValueError: If a file is not a zip, is damaged or unsafe, or two episodes have the same index.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path, _Folder(path))
        if not path.is_file():
            raise FileNotFoundError(
                f"Episodes must lie in a folder or a zip; there is neither at {path}. Check the path."
            )
        contents = _Zip(path)
        try:
            return cls(path, contents)
        except BaseException:
            contents.close()
            raise

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 that changes when the episodes do, without reading them.

        It covers names and sizes, and CRCs in a zip or times of the last change in a folder.
        """
        lines = [
            f"{name}\0{size}\0{mark}\n" for name in self.names for size, mark in [self._contents.marks[name]]
        ]
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def read(self, name: str) -> Trajectory:
        """Returns the episode of one of `names`, as `exorl.read_episode` does.

        Raises:
          FileNotFoundError: If there is no such episode, or its file has gone.
          ValueError: If it is damaged or breaks the layout, or the source is closed.
        """
        if name not in self._contents.marks:
            raise FileNotFoundError(
                f"An episode must be one of the source's names; {self.path} holds no {name}. Check the name."
            )
        return parse_episode(self._contents.read(name), f"{self.path}/{name}")

    def close(self) -> None:
        """Closes a zip; the source cannot be read from any more."""
        self._contents.close()

    def __enter__(self) -> "EpisodeSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Returns the bytes of an episode's file.

    Raises:
      FileNotFoundError: If there is none, or no plain file: opening a pipe would wait for ever.
      ValueError: If it is larger than `episode_layout.LARGEST_EPISODE`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"An episode must be an npz file; there is none at {path}. Check the path.")
    with Path(path).open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        check_size(size, str(path))
        return file.read(size)


def _no_plain_file(path: str) -> str:
    return f"An episode must be a plain file; {path} is a folder, a pipe or a dangling link. Remove it."


def _by_index(names: Iterable[str], path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the names by index, and the steps that they state."""
    found: dict[int, tuple[str, int]] = {}
    for name in names:
        index, num_steps = parse_name(name) or (-1, 0)
        if index in found:
            first, second = sorted([found[index][0], name])
            raise ValueError(
                f"Each episode must have an index of its own; {path} holds {first} and {second}. Leave one out."
            )
        found[index] = (name, num_steps)
    if not found:
        raise FileNotFoundError(
            "A folder or zip of episodes must hold files named episode_{index}_{length}.npz or "
            f"{{timestamp}}_{{index}}_{{length}}.npz; {path} holds none. Name their folder or zip."
        )
    rows = [found[index] for index in sorted(found)]
    return tuple(name for name, _ in rows), tuple(num_steps for _, num_steps in rows)
