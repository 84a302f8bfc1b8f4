"""Downloads from a real server on this machine that misbehaves as real servers do."""

import contextlib
import errno
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import deque
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from bpt_rl.config import BuildConfig, DownloadConfig
from bpt_rl.datasets import download as download_lib
from bpt_rl.datasets import exorl
from bpt_rl.datasets.build import domain_and_tasks
from bpt_rl.datasets.catalogue import Archive
from bpt_rl.datasets.download import download

COMMAND = str(Path(sys.executable).with_name("bpt-rl"))


def zip_of(seed, num_bytes=3_000_000):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("buffer/noise", np.random.default_rng(seed).bytes(num_bytes))
    return file.getvalue()


ZIP, OTHER_ZIP = zip_of(0), zip_of(1)
SHA256 = hashlib.sha256(ZIP).hexdigest()
KNOWN = Archive(domain="walker", collector="icm", num_bytes=len(ZIP), sha256=SHA256)
UNKNOWN = Archive(domain="walker", collector="icm")


class Server(ThreadingHTTPServer):
    """Sends `content`; each of `script` is how one request is answered instead."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = ZIP, '"version-1"'
        self.last_modified = ""
        self.script = deque()
        self.requests = []
        """Method and first byte of each."""
        self.go_on = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that is gone is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        span = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        self.server.requests.append((self.command, int(span[1]) if span else None))
        assert self.headers["Accept-Encoding"] == "identity"
        answer = self.server.script.popleft() if self.server.script else serve
        answer(self)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *arguments):
        """Keeps quiet."""

    @property
    def offset(self):
        """First byte to send, as a good server understands the request."""
        validators = {self.server.etag, self.server.last_modified}
        asked = self.server.requests[-1][1]
        return asked if asked is not None and self.headers["If-Range"] in validators else 0

    def send(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()


def serve(handler, *, num_bytes=None, offset=None, then=None, **headers):
    """Sends what was asked for, or at most `num_bytes` of it."""
    server = handler.server
    offset = handler.offset if offset is None else offset
    body = server.content[offset:]
    known = {"ETag": server.etag, "Last-Modified": server.last_modified, "Content-Length": len(body)}
    if offset:
        known["Content-Range"] = f"bytes {offset}-{len(server.content) - 1}/{len(server.content)}"
    chosen = {name: value for name, value in (known | headers).items() if value != ""}
    handler.send(206 if offset else 200, **chosen)
    if handler.command != "HEAD":
        handler.wfile.write(body[:num_bytes])
    if then:
        then(server)


def cut(num_bytes, **options):
    return lambda handler: serve(handler, num_bytes=num_bytes, **options)


def status(code, **headers):
    return lambda handler: handler.send(code, Content_Length=0, **headers)


def hang(num_bytes):
    """Sends so many bytes and falls silent, until `go_on` is set."""
    return cut(num_bytes, then=lambda server: server.go_on.wait(20))


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        # Polled often, so that shutting down takes no half second.
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def config(server, tmp_path):
    return DownloadConfig(out=str(tmp_path), mirror=server.url, first_wait=0.0, num_tries=3, timeout=5.0)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "walker" / "icm.zip"


@pytest.fixture
def part(target):
    return target.with_name(".icm.zip.part")


def change(config, **changes):
    return DownloadConfig(**(vars(config) | changes))


def in_folder(target):
    return sorted(path.name for path in target.parent.iterdir())


def test_a_download_is_whole_verified_and_alone_in_its_folder(server, config, target):
    seen = []
    done = download(KNOWN, config, lambda done, total, note: seen.append((done, total, note)))
    assert target.read_bytes() == ZIP
    assert (done.path, done.num_bytes, done.sha256) == (target, len(ZIP), SHA256)
    assert (done.verification, done.is_verified, done.is_new) == ("verified by SHA-256", True, True)
    assert in_folder(target) == ["icm.zip"]
    assert [done for done, _, _ in seen] == [2**20, 2 * 2**20, len(ZIP)]
    assert {total for _, total, _ in seen} == {len(ZIP)}
    assert all(re.fullmatch(r"\d+\.\d MB/s", note) for _, _, note in seen)


def test_each_try_asks_for_just_what_is_missing(server, config, target):
    # Four cuts, more than tries in a row: each brings new bytes.
    server.script.extend([cut(1_000_000), cut(10), cut(1_100_000), cut(1)])
    assert download(KNOWN, config).verification == "verified by SHA-256"
    assert target.read_bytes() == ZIP
    assert [first for _, first in server.requests] == [None, 1_000_000, 1_000_010, 2_100_010, 2_100_011]


@pytest.mark.parametrize("validator", ["etag", "last_modified"])
def test_the_next_call_goes_on_where_one_gave_up(server, config, target, part, validator):
    if validator == "last_modified":
        # A weak ETag allows other bytes, so it must not be what a range is asked by.
        server.etag, server.last_modified = 'W/"weak"', formatdate(0, usegmt=True)
    server.script.append(cut(1_500_000))
    with pytest.raises(OSError, match=r"1,500,000 bytes are kept, and the same command goes on from there"):
        download(KNOWN, change(config, num_tries=1))
    assert (target.exists(), part.read_bytes()) == (False, ZIP[:1_500_000])
    download(KNOWN, config)
    assert (target.read_bytes(), server.requests[1:]) == (ZIP, [("GET", 1_500_000)])
    assert in_folder(target) == ["icm.zip"]


def test_a_server_without_validators_or_ranges_sends_everything_anew(server, config, target):
    server.etag = ""
    server.script.append(cut(1_500_000))
    with pytest.raises(OSError, match="the connection ended early"):
        download(KNOWN, change(config, num_tries=1))
    download(KNOWN, config)
    assert (target.read_bytes(), server.requests) == (ZIP, [("GET", None)] * 2)

    target.unlink()
    server.etag = '"version-1"'
    server.script.extend([cut(2_000_000), cut(1_000_000, offset=0), cut(None, offset=0)])
    download(KNOWN, config)
    assert target.read_bytes() == ZIP
    assert [first for _, first in server.requests[2:]] == [None, 2_000_000, 1_000_000]


def test_starting_anew_at_every_try_has_an_end(server, config):
    server.script.extend([cut(1_000_000, offset=0)] * 50)
    with pytest.raises(OSError, match="3 tries in a row failed"):
        download(KNOWN, config)
    assert len(server.requests) == 3


def swap(server):
    server.content, server.etag = OTHER_ZIP, '"version-2"'


@pytest.mark.parametrize(
    "second",
    [serve, cut(None, offset=1_000_000), status(416)],
    ids=["whole", "a part of the new version", "416"],
)
def test_a_file_that_changed_meanwhile_is_fetched_anew(server, config, target, second):
    server.script.extend([cut(1_000_000, then=swap), second])
    done = download(UNKNOWN, config)
    assert target.read_bytes() == OTHER_ZIP
    assert done.sha256 == hashlib.sha256(OTHER_ZIP).hexdigest()
    assert server.requests[1] == ("GET", 1_000_000)


def test_a_part_other_than_the_missing_one_is_not_taken(server, config, target):
    server.script.extend([cut(1_000_000), cut(None, offset=999_999)])
    download(KNOWN, config)
    assert target.read_bytes() == ZIP


def test_a_missing_file_is_refused_at_once(server, config, target):
    for code in (403, 404, 410):
        server.script.append(status(code))
        message = rf"{server.url}/walker/icm\.zip answered {code} .*--mirror or BPT_RL_EXORL_MIRROR"
        with pytest.raises(OSError, match=message):
            download(KNOWN, config)
    assert len(server.requests) == 3
    assert in_folder(target) == []


def test_a_busy_server_is_asked_again_after_waits_that_double(server, config, target, monkeypatch):
    waits, notes = [], []
    monkeypatch.setattr(download_lib.time, "sleep", waits.append)
    server.script.extend([status(503), status(429), cut(1000), status(500), cut(0)])
    download(KNOWN, change(config, first_wait=1.5, num_tries=4), lambda done, total, note: notes.append(note))
    assert target.read_bytes() == ZIP
    assert waits == [1.5, 3.0, 1.5, 3.0, 6.0]
    assert any("answered 503 Service Unavailable; next try in 2 s" in note for note in notes)


def test_the_wait_that_a_server_asks_for_is_kept(server, config, monkeypatch):
    waits = []
    monkeypatch.setattr(download_lib.time, "sleep", waits.append)
    monkeypatch.setattr("bpt_rl.datasets.remote_file.time.time", lambda: 1e9)
    date = formatdate(1e9 + 20, usegmt=True)
    server.script.extend([status(503, Retry_After=7), status(503, Retry_After=date)])
    download(KNOWN, config)
    assert waits == [7.0, 20.0]


def test_a_wait_of_hours_is_left_to_the_user(server, config, target):
    server.script.extend([cut(1000), status(429, Retry_After=3600)])
    with pytest.raises(OSError, match=r"within 600 s; \S+ asks to wait 3600 s\. 1,000 bytes are kept"):
        download(KNOWN, config)
    assert len(server.requests) == 2


def test_a_server_that_stays_busy_is_given_up(server, config, target):
    server.script.extend([status(503)] * 9)
    with pytest.raises(
        OSError, match=r"3 tries in a row failed .* answered 503 Service Unavailable\. 0 bytes"
    ):
        download(KNOWN, config)
    assert (len(server.requests), in_folder(target)) == (3, [])


def test_a_silent_server_is_asked_again(server, config, target):
    server.script.extend([hang(1_200_000), lambda handler: handler.server.go_on.wait(20)])
    notes = []
    download(KNOWN, change(config, timeout=0.2), lambda done, total, note: notes.append(note))
    assert target.read_bytes() == ZIP
    assert notes.count("the server fell silent; next try in 0 s") == 2
    # 1 MiB was read whole, the rest of the second piece may be lost with the connection.
    assert server.requests[1][1] >= 2**20


def test_redirects_are_followed_within_http_only(server, config, target):
    server.script.extend([cut(1_000_000), status(302, Location="/elsewhere.zip")])
    download(KNOWN, config)
    assert target.read_bytes() == ZIP
    assert [first for _, first in server.requests] == [None, 1_000_000, 1_000_000]
    target.unlink()
    for place in ("ftp://127.0.0.1/icm.zip", f"file://{__file__}"):
        server.script.append(status(302, Location=place))
        with pytest.raises(OSError, match="answered 302"):
            download(KNOWN, config)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Encoding": "gzip"}, r"must be sent as it is; \S+ sends it as gzip"),
        ({"Content-Length": ""}, "must state the length"),
        ({"Content-Length": len(ZIP) - 5}, r"must have 3,\d+,\d+ bytes; \S+ has 3,"),
        ({"Content-Length": len(ZIP) + 5}, r"must have 3,\d+,\d+ bytes; \S+ has 3,"),
    ],
)
def test_answers_that_cannot_be_the_zip_are_refused_and_cost_nothing(
    server, config, target, part, headers, message
):
    server.script.extend([cut(1_000_000), cut(None, offset=0, **headers)])
    with pytest.raises(ValueError, match=message):
        download(KNOWN, config)
    assert part.read_bytes() == ZIP[:1_000_000]
    download(KNOWN, config)
    assert (target.read_bytes(), server.requests[-1]) == (ZIP, ("GET", 1_000_000))


def test_a_body_shorter_than_announced_never_passes_for_whole(server, config, target):
    server.script.extend([cut(None, **{"Content-Length": len(ZIP) + 5})] * 3)
    with pytest.raises(OSError, match="the connection ended early"):
        download(UNKNOWN, config)
    assert not target.exists()


def test_wrong_bytes_are_set_aside_and_never_get_the_name(server, config, target):
    wrong = OTHER_ZIP[: len(ZIP)]
    server.content = wrong
    message = rf"must have SHA-256 {SHA256}; got {hashlib.sha256(wrong).hexdigest()}\. What came is kept as"
    with pytest.raises(ValueError, match=message):
        download(KNOWN, config)
    assert in_folder(target) == ["icm.zip.rejected"]
    assert target.with_name("icm.zip.rejected").read_bytes() == wrong
    server.content = ZIP
    assert download(KNOWN, config).is_verified
    assert server.requests[-1] == ("GET", None)


def test_a_page_in_place_of_the_zip_is_refused(server, config, target):
    server.content, server.etag = b"<html>Please log in</html>", ""
    with pytest.raises(ValueError, match="An archive must be a zip"):
        download(UNKNOWN, config)
    assert not target.exists()


@pytest.mark.parametrize(
    ("etag", "verification"),
    [
        (f'"{hashlib.md5(ZIP).hexdigest()}"', "verified by the server's ETag, an MD5"),
        ('"5fcbe90c-2d3f"', 'NOT verified: .* ETag "5fcbe90c-2d3f" is not made of MD5s'),
        ("", "NOT verified: .* the server gave no ETag"),
    ],
)
def test_without_a_known_digest_the_etag_is_what_is_checked(server, config, target, etag, verification):
    server.etag = etag
    done = download(UNKNOWN, config)
    assert re.fullmatch(verification, done.verification)
    assert done.is_verified == done.verification.startswith("verified")
    again = download(UNKNOWN, config)
    assert (again.verification, again.is_new) == (done.verification, False)
    assert server.requests == [("GET", None), ("HEAD", None)]


def test_a_wrong_etag_refuses_the_bytes_also_after_a_resume(server, config, target):
    server.etag = f'"{hashlib.md5(OTHER_ZIP).hexdigest()}"'
    server.script.append(cut(1_000_000))
    with pytest.raises(ValueError, match=r"must have the server's ETag, an MD5, .* What came is kept as"):
        download(UNKNOWN, config)
    assert in_folder(target) == ["icm.zip.rejected"]


def test_a_zip_that_is_there_is_checked_and_never_fetched_again(server, config, target):
    target.parent.mkdir()
    target.write_bytes(ZIP)
    seen = []
    done = download(KNOWN, config, lambda done, total, note: seen.append((done, total)))
    assert (done.verification, done.is_new, server.requests) == ("verified by SHA-256", False, [])
    assert (seen[-1], in_folder(target)) == ((len(ZIP), len(ZIP)), ["icm.zip"])

    message = rf"It stays as it is; move {target} away, and the same command downloads anew"
    for wrong in (OTHER_ZIP[: len(ZIP)], ZIP[:-1]):
        target.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            download(KNOWN, config)
        assert (target.read_bytes(), in_folder(target)) == (wrong, ["icm.zip"])
    with pytest.raises(ValueError, match=r"must have 3,\d+,\d+ bytes; \S+ has 3,\d+,\d+\. It stays"):
        download(UNKNOWN, config)


def test_a_zip_that_is_there_needs_no_server(config, target):
    target.parent.mkdir()
    target.write_bytes(ZIP)
    done = download(UNKNOWN, change(config, mirror="http://127.0.0.1:9"))
    assert re.search(r"^NOT verified: .* could not be asked \(Connection refused\)$", done.verification)


def test_a_whole_partial_file_needs_no_server(server, config, target, part):
    part.parent.mkdir()
    part.write_bytes(ZIP)
    note = {"num_bytes": len(ZIP), "etag": "", "last_modified": ""}
    part.with_name(f"{part.name}.json").write_text(json.dumps(note))
    assert download(KNOWN, config).verification == "verified by SHA-256"
    assert (in_folder(target), server.requests) == (["icm.zip"], [])


@pytest.mark.parametrize("note", [None, "{", "[1]", '{"num_bytes": 7, "etag": "\\"version-1\\""}', "3"])
def test_a_partial_file_of_unknown_origin_is_not_gone_on_with(server, config, target, part, note):
    part.parent.mkdir()
    part.write_bytes(OTHER_ZIP[:1000])
    if note is not None:
        part.with_name(f"{part.name}.json").write_text(note)
    download(KNOWN, config)
    assert (target.read_bytes(), server.requests) == (ZIP, [("GET", None)])


def test_too_small_a_disk_is_refused_before_the_first_byte(server, config, target, monkeypatch):
    server.script.append(cut(2_000_000))
    with pytest.raises(OSError, match="ended early"):
        download(KNOWN, change(config, num_tries=1))
    usage = shutil.disk_usage(target.parent)
    # What is there already needs no more room.
    left = len(ZIP) - 2_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left - 1))
    with pytest.raises(OSError, match=r"walker/icm needs 0\.00 GB more and .* --out") as caught:
        download(KNOWN, config)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left))
    download(KNOWN, config)
    assert target.read_bytes() == ZIP


def line_of(config):
    return [COMMAND, "data", "download", "walker", "icm", "--out", config.out, "--mirror", config.mirror]


@contextlib.contextmanager
def process(config, part, num_bytes):
    """Yields a process that is downloading and has written so many bytes."""
    running = subprocess.Popen(line_of(config), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size == num_bytes) and time.monotonic() < deadline:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.01)
        yield running
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_one_process_at_a_time_and_the_next_goes_on_after_its_death(server, config, target, part, end):
    server.script.append(hang(2**20))
    with process(config, part, 2**20) as running:
        with pytest.raises(OSError, match=rf"another one is downloading {target}"):
            download(UNKNOWN, config)
        assert len(server.requests) == 1
        running.send_signal(end)
        status, err = running.wait(20), running.stderr.read()
    if end == signal.SIGINT:
        assert (status, "the same command goes on from there" in err, "Traceback" in err) == (
            130,
            True,
            False,
        )
    assert (target.exists(), part.read_bytes()) == (False, ZIP[: 2**20])
    done = subprocess.run(line_of(config), capture_output=True, text=True, check=True)
    assert f"Archive: {target}\n{len(ZIP):,} bytes, SHA-256 {SHA256}: NOT verified" in done.stdout
    assert (target.read_bytes(), server.requests[1:]) == (ZIP, [("GET", 2**20)])


def test_a_full_disk_keeps_what_is_there_and_says_so_in_one_sentence(server, config, target, part):
    # The system itself refuses to let any file grow over 4000 blocks of 512 bytes.
    limited = ["sh", "-c", 'ulimit -f 4000; exec "$@"', "sh", *line_of(config)]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{target} was not: File too large. Free space or use another." in done.stderr
    assert "Traceback" not in done.stderr
    assert part.read_bytes() == ZIP[: 4000 * 512]
    download(KNOWN, config)
    assert (target.read_bytes(), server.requests[-1]) == (ZIP, ("GET", 4000 * 512))


@pytest.mark.parametrize(
    "mirror",
    [
        "ftp://host/exorl",
        "file:///exorl",
        "host/exorl",
        "http://",
        "http://host:port/",
        "http://a b/",
        "https://h/?a=1",
    ],
)
def test_a_mirror_must_be_a_url_of_a_folder(config, tmp_path, mirror):
    with pytest.raises(ValueError, match=r"must be a plain http or https URL of a folder; got"):
        download(KNOWN, change(config, mirror=mirror))
    assert not list(tmp_path.iterdir())


def test_a_host_that_nobody_knows_is_refused_at_once(config):
    with pytest.raises(OSError, match=r"host\.invalid/walker/icm\.zip names none that is"):
        download(KNOWN, change(config, mirror="http://host.invalid"))


def test_a_folder_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"file/walker/icm\.zip was not: "):
        download(KNOWN, change(config, out=str(tmp_path / "file")))


def test_a_downloaded_zip_is_what_a_store_is_built_from(server, config, tmp_path, folder, episodes):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"buffer/{path.name}")
    server.content = file.getvalue()
    done = download(Archive(domain="cartpole", collector="random"), config)
    assert done.path == tmp_path / "cartpole" / "random.zip"
    read = list(exorl.iterate_episodes(done.path))
    assert len(read) == len(episodes)
    domain, task_names = domain_and_tasks(BuildConfig(source=(str(done.path),)))
    assert (domain, "cartpole_swingup" in task_names) == ("cartpole", True)
