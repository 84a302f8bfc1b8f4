"""A file on an HTTP server, read from any offset, with each way of failing told apart: for good or for now."""

import contextlib
import dataclasses
import email.utils
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from bpt_rl import __version__

PIECE = 2**20
"""Bytes read at a time."""
_BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Status codes after which the same request may succeed."""
_HEADERS = {"User-Agent": f"bpt-rl/{__version__}", "Accept-Encoding": "identity"}
_OTHER_SERVER = "Name another server with --mirror or BPT_RL_EXORL_MIRROR."


class InterruptedTransferError(OSError):
    """What a later try may mend."""

    def __init__(self, reason: str, *, wait: float | None = None, is_stale: bool = False) -> None:
        """Keeps the reason.

        Args:
          reason: A clause, like "the server answered 503".
          wait: Seconds that the server asks for.
          is_stale: Whether what was read before belongs to another version of the file.
        """
        super().__init__(reason)
        self.wait = wait
        self.is_stale = is_stale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """What a server says of one version of a file."""

    num_bytes: int
    etag: str = ""
    """As in its header, quotes included."""
    last_modified: str = ""

    @property
    def validator(self) -> str:
        """What a request can hold this version to; empty if nothing. A weak ETag does not promise equal bytes."""
        return self.etag if self.etag.startswith('"') else self.last_modified


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """An open response: the rest of one version of a file, from an offset on."""

    version: Version
    offset: int
    response: http.client.HTTPResponse

    def pieces(self) -> Iterator[bytes]:
        """Yields the bytes from the offset to the end.

        Raises:
          InterruptedTransferError: If they end too early or stay away too long.
        """
        left = self.version.num_bytes - self.offset
        while left:
            try:
                piece = self.response.read(min(PIECE, left))
            except (http.client.HTTPException, OSError) as error:
                raise InterruptedTransferError(_reason(error)) from error
            if not piece:
                raise InterruptedTransferError("the connection ended early")
            left -= len(piece)
            yield piece


def check_url(url: str) -> None:
    """Checks that a URL can be asked.

    Raises:
      ValueError: If it is none of HTTP or HTTPS.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_fit = (
            parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        is_fit = False
    if not is_fit or parts.username or re.search(r"[\s?#]", url):
        raise ValueError(
            f"A mirror must be a plain http or https URL of a folder; got {url}. Name one like https://host/exorl."
        )


@contextlib.contextmanager
def open_from(
    url: str, offset: int, *, version: Version | None = None, timeout: float = 30.0
) -> Iterator[Answer]:
    """Yields the server's answer: the bytes from `offset` on, or all if the server will not or must not skip any.

    Args:
      url: Of the file.
      offset: Bytes to skip, of `version`; 0 for the whole file, whatever its version.
      version: Whose first bytes are there already.
      timeout: Seconds without a byte after which reading fails.

    Raises:
      InterruptedTransferError: If a later try may succeed.
      OSError: If none will.
      ValueError: If the server gives no file of a known length, as it is.
    """
    headers = dict(_HEADERS)
    if offset and version:
        headers |= {"Range": f"bytes={offset}-", "If-Range": version.validator}
    response = _open(urllib.request.Request(url, headers=headers), timeout)
    with contextlib.closing(response):
        yield _answer(response, url, offset, version)


def ask(url: str, *, timeout: float) -> Version:
    """Returns what the server says of a file, without reading it.

    Raises:
      OSError: If the server does not say.
      ValueError: As in `open_from`.
    """
    request = urllib.request.Request(url, headers=dict(_HEADERS), method="HEAD")
    with contextlib.closing(_open(request, timeout)) as response:
        return _answer(response, url, 0, None).version


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        # The base class would follow to FTP too.
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            return None
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            # Which the base class forgets.
            request.method = req.get_method()
        return request


_OPENER = urllib.request.build_opener(_Redirects)


def _open(request: urllib.request.Request, timeout: float) -> Any:
    url = request.full_url
    try:
        return _OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"{url} answered {error.code} {error.reason}".strip()
        if error.code == 416:
            raise InterruptedTransferError("the file has changed", wait=0.0, is_stale=True) from error
        if error.code in _BUSY:
            wait = _seconds(error.headers.get("Retry-After", ""))
            raise InterruptedTransferError(answer, wait=wait) from error
        raise OSError(f"A server must hold the zip; {answer}. {_OTHER_SERVER}") from error
    except http.client.InvalidURL as error:
        raise ValueError(f"A URL must be of plain characters; got {url}. {_OTHER_SERVER}") from error
    except (http.client.HTTPException, OSError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise OSError(
                f"A server must prove who it is; {url} does not: {reason}. {_OTHER_SERVER}"
            ) from error
        if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
            raise OSError(f"A server must be known; {url} names none that is. {_OTHER_SERVER}") from error
        raise InterruptedTransferError(_reason(reason)) from error


def _answer(response: Any, url: str, offset: int, version: Version | None) -> Answer:
    if response.status not in (200, 206):
        raise OSError(f"A server must send the zip; {url} answered {response.status}. {_OTHER_SERVER}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ValueError(f"A zip must be sent as it is; {url} sends it as {encoding}. {_OTHER_SERVER}")
    if response.status == 206:
        if version is None or not _is_rest(response.headers, offset, version):
            raise InterruptedTransferError("the server sent another part", wait=0.0, is_stale=True)
        return Answer(version=version, offset=offset, response=response)
    length = response.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d+", length):
        raise ValueError(
            f"A server must state the length, or a cut would pass for the end; {url} does not. {_OTHER_SERVER}"
        )
    got = Version(
        num_bytes=int(length),
        etag=response.headers.get("ETag", ""),
        last_modified=response.headers.get("Last-Modified", ""),
    )
    return Answer(version=got, offset=0, response=response)


def _is_rest(headers: Any, offset: int, version: Version) -> bool:
    """Returns whether a partial answer is the rest of this version; it may leave out what it would repeat."""
    rest = f"bytes {offset}-{version.num_bytes - 1}/{version.num_bytes}"
    return bool(
        headers.get("Content-Range") == rest
        and headers.get("ETag", version.etag) == version.etag
        and headers.get("Last-Modified", version.last_modified) == version.last_modified
    )


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "the server fell silent"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _seconds(retry_after: str) -> float | None:
    """Returns the seconds that a Retry-After header asks for, in either of its two forms."""
    if re.fullmatch(r"\d+", retry_after):
        return float(retry_after)
    try:
        moment = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(moment.timestamp() - time.time(), 0.0)
