"""Fetching a zip of ExoRL: gone on with after any interruption, verified, and in its place whole or not at all."""

import dataclasses
import errno
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from bpt_rl.config import DownloadConfig
from bpt_rl.datasets.catalogue import HOST, Archive
from bpt_rl.datasets.checksums import Verification
from bpt_rl.datasets.partial_file import PartialFile, open_partial
from bpt_rl.datasets.remote_file import PIECE, InterruptedTransferError, Version, ask, check_url, open_from

Report = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all (0 while unknown) and a note to show."""
LONGEST_WAIT = 600.0
"""Seconds between two tries."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Download:
    """A zip in its place."""

    path: Path
    num_bytes: int
    sha256: str
    verification: str
    """Like "verified by SHA-256", or "NOT verified: " and the reason."""
    is_new: bool
    """False if it was there before, and was only checked."""

    @property
    def is_verified(self) -> bool:
        """Whether the bytes were compared with anything."""
        return not self.verification.startswith("NOT ")


def download(archive: Archive, config: DownloadConfig, report_progress: Report | None = None) -> Download:
    """Returns where the zip lies, and by what it is verified; one that is there already is only checked.

    After any error, what was fetched stays in a hidden file beside it, and the next call goes on from there.

    Args:
      archive: Which zip.
      config: Where to, where from and how patiently.
      report_progress: Called after every piece, and before every wait.

    Raises:
      ValueError: If the bytes are not those of the archive, or the mirror is no URL.
      OSError: If the server does not send the zip, the disk is full, or another process is downloading it.
    """
    folder = config.mirror or HOST
    check_url(folder)
    url = archive.url_below(folder)
    target = Path(config.out) / f"{archive.name}.zip"
    report = report_progress or (lambda done, total, note: None)
    if not target.exists():
        with open_partial(target) as partial:
            # Another process may have finished it before the lock was free.
            if not target.exists():
                transfer = _Transfer(archive, url, config, partial, report)
                transfer.fetch()
                return transfer.finish(target)
    return _check(archive, url, config.timeout, target, report)


class _Transfer:
    """The way of one zip from a server to its place."""

    def __init__(
        self, archive: Archive, url: str, config: DownloadConfig, partial: PartialFile, report: Report
    ) -> None:
        self._archive, self._url, self._config = archive, url, config
        self._partial, self._report = partial, report
        self._verification = _verification_of(archive, partial.version or Version(num_bytes=0))
        """Fed with the bytes of `partial`, whenever no try is under way."""

    def fetch(self) -> None:
        """Tries until all bytes are there."""
        partial = self._partial
        if partial.num_bytes:
            self._tell("reading what is there")
            for piece in partial.pieces():
                self._verification.update(piece)
        most, num_failures = partial.num_bytes, 0
        while not partial.is_whole:
            try:
                self._try()
            except InterruptedTransferError as error:
                # Counted from the most there ever was: starting anew each time must have an end too.
                num_failures = 1 if partial.num_bytes > most else num_failures + 1
                most = max(most, partial.num_bytes)
                if error.is_stale:
                    partial.drop()
                self._wait(error, num_failures)

    def finish(self, target: Path) -> Download:
        """Puts the bytes in their place, if they are the right ones."""
        partial = self._partial
        try:
            conclusion = _conclude(self._verification, partial.path)
        except ValueError as error:
            raise ValueError(
                f"{error}. What came is kept as {partial.set_aside()}; the same command downloads anew, "
                "and --mirror names another server."
            ) from error
        partial.become_whole()
        return Download(
            path=target,
            num_bytes=partial.num_bytes,
            sha256=self._verification.sha256,
            verification=conclusion,
            is_new=True,
        )

    def _try(self) -> None:
        partial, timeout = self._partial, self._config.timeout
        with open_from(self._url, partial.num_bytes, version=partial.version, timeout=timeout) as answer:
            if answer.offset == 0:
                self._check_length(answer.version.num_bytes)
                partial.begin(answer.version)
                self._verification = _verification_of(self._archive, answer.version)
            self._check_space(answer.version.num_bytes - partial.num_bytes)
            began, num_bytes = time.monotonic(), 0
            for piece in answer.pieces():
                partial.append(piece)
                self._verification.update(piece)
                num_bytes += len(piece)
                self._tell(f"{num_bytes / 1e6 / max(time.monotonic() - began, 1e-3):.1f} MB/s")

    def _check_length(self, num_bytes: int) -> None:
        if num_bytes != (self._archive.num_bytes or num_bytes):
            raise ValueError(
                f"{self._archive.name} must have {self._archive.num_bytes:,} bytes; {self._url} has {num_bytes:,}. "
                "Name another server with --mirror or BPT_RL_EXORL_MIRROR."
            )

    def _check_space(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self._partial.path.parent).free
        if num_bytes > free:
            raise OSError(
                errno.ENOSPC,
                f"A download must fit on its disk; {self._archive.name} needs {num_bytes / 1e9:.2f} GB more and "
                f"{free / 1e9:.2f} GB are free. Free space or choose another folder with --out.",
            )

    def _wait(self, error: InterruptedTransferError, num_failures: int) -> None:
        kept = f"{self._partial.num_bytes:,} bytes are kept, and the same command goes on from there."
        if num_failures >= self._config.num_tries:
            raise OSError(
                f"A download must get on; {num_failures} tries in a row failed for {self._url}, the last since "
                f"{error}. {kept}"
            ) from error
        doubled = self._config.first_wait * 2.0 ** (num_failures - 1)
        seconds = min(doubled, LONGEST_WAIT) if error.wait is None else error.wait
        if seconds > LONGEST_WAIT:
            raise OSError(
                f"A server must be ready within {LONGEST_WAIT:.0f} s; {self._url} asks to wait {seconds:.0f} s. {kept}"
            ) from error
        self._tell(f"{error}; next try in {seconds:.0f} s")
        time.sleep(seconds)

    def _tell(self, note: str) -> None:
        version = self._partial.version
        self._report(self._partial.num_bytes, version.num_bytes if version else 0, note)


def _check(archive: Archive, url: str, timeout: float, target: Path, report: Report) -> Download:
    """Returns what can be said of a zip that is there already."""
    num_bytes = target.stat().st_size
    version, why_none = Version(num_bytes=archive.num_bytes or num_bytes), "the server gave no ETag"
    if not archive.sha256 and not archive.etag:
        try:
            version = ask(url, timeout=timeout)
        except OSError as error:
            why_none = f"the server could not be asked ({error})"
    verification = Verification(archive, num_bytes=num_bytes, etag=version.etag, why_none=why_none)
    try:
        if num_bytes != version.num_bytes:
            raise ValueError(
                f"{archive.name} must have {version.num_bytes:,} bytes; {target} has {num_bytes:,}"
            )
        with target.open("rb") as file:
            while piece := file.read(PIECE):
                verification.update(piece)
                report(file.tell(), num_bytes, "reading what is there")
        conclusion = _conclude(verification, target)
    except ValueError as error:
        raise ValueError(
            f"{error}. It stays as it is; move {target} away, and the same command downloads anew."
        ) from error
    return Download(
        path=target,
        num_bytes=num_bytes,
        sha256=verification.sha256,
        verification=conclusion,
        is_new=False,
    )


def _verification_of(archive: Archive, version: Version) -> Verification:
    return Verification(archive, num_bytes=version.num_bytes, etag=version.etag)


def _conclude(verification: Verification, path: Path) -> str:
    conclusion = verification.conclude()
    # What a server calls a zip may be a page that asks for a password.
    if not zipfile.is_zipfile(path):
        raise ValueError(f"An archive must be a zip; the bytes that came are none ({conclusion})")
    return conclusion
