"""Short cartpole episodes, recorded with real dm_control: its reward reads the control; and a server of zips."""

import contextlib
import dataclasses
import hashlib
import io
import re
import struct
import threading
import zipfile
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pytest

from bpt_rl.collect_config import CollectConfig
from bpt_rl.config import BuildConfig, DownloadConfig
from bpt_rl.datasets import exorl
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.catalogue import Archive
from bpt_rl.datasets.store_seal import Gap, seal
from bpt_rl.run.collect import record_episode
from bpt_rl.types import Trajectory

LENGTHS = (40, 60, 20)
"""Control steps; actions are held for 4."""


def cut(trajectory: Trajectory, num_steps: int) -> Trajectory:
    columns = {key: getattr(trajectory, key)[: num_steps + 1] for key in exorl.KEYS}
    return dataclasses.replace(trajectory, **columns)


class Streamed(io.BytesIO):
    """Cannot be sought: zipfile then puts sizes and CRC behind the data."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise OSError

    def tell(self):
        raise OSError


@pytest.fixture(scope="session")
def make_pipe():
    """Returns a function that opens what takes a zip and cannot be sought, as a pipe."""
    return Streamed


@pytest.fixture(scope="session")
def episodes() -> list[Trajectory]:
    config = CollectConfig(task="cartpole_swingup", action_repeat=4, algorithm="random")
    return [cut(record_episode(config, i), length) for i, length in enumerate(LENGTHS)]


@pytest.fixture
def episode(episodes) -> Trajectory:
    """A copy that a test may spoil."""
    columns = {key: np.array(getattr(episodes[0], key)) for key in exorl.KEYS}
    return Trajectory(**columns)


@pytest.fixture(scope="session")
def folder(episodes, tmp_path_factory):
    """`cartpole/random/buffer` with the three episodes."""
    buffer = tmp_path_factory.mktemp("exorl") / "cartpole" / "random" / "buffer"
    buffer.mkdir(parents=True)
    for i, trajectory in enumerate(episodes):
        exorl.write_episode(buffer / f"episode_{i:06d}_{trajectory.num_steps}.npz", trajectory)
    return buffer


@contextlib.contextmanager
def edited(path):
    """Yields a store's HDF5 file to change, and seals it again."""
    content = path.read_bytes()
    [num_gaps] = struct.unpack("<I", content[-12:-8])
    gaps = [Gap(*pair) for pair in struct.iter_unpack("<QQ", content[-44 - 16 * num_gaps : -44])]
    with h5py.File(path, "r+") as file:
        yield file
    with path.open("r+b", buffering=0) as raw:
        seal(raw, gaps)


@pytest.fixture(name="edited")
def edited_fixture():
    return edited


def zip_of(seed: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("buffer/noise", np.random.default_rng(seed).bytes(6_000_000))
    return file.getvalue()


class ZipServer(ThreadingHTTPServer):
    """Sends `content` as a good server does; each of `script` is how it answers one request instead."""

    daemon_threads = True
    zip, other_zip = zip_of(0), zip_of(1)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.last_modified = self.zip, '"version-1"', ""
        self.script = deque()
        self.requests = []
        """Method and first byte asked for of each."""
        self.go_on = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that is gone is what some tests are about."""

    def swap(self):
        self.content, self.etag = self.other_zip, '"version-2"'

    @staticmethod
    def cut(num_bytes=None, **options):
        """Answers as asked, but with no more than `num_bytes` of the body."""
        return lambda handler: handler.serve(num_bytes=num_bytes, **options)

    @staticmethod
    def status(code, **headers):
        return lambda handler: handler.send(code, {"Content-Length": 0} | headers)

    @staticmethod
    def hang(num_bytes=None):
        """Sends so many bytes, or not even headers, and falls silent until `go_on` is set."""

        def answer(handler):
            if num_bytes is not None:
                handler.serve(num_bytes=num_bytes)
            handler.server.go_on.wait(20)

        return answer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        span = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        self.asked = int(span[1]) if span else None
        server.requests.append((self.command, self.asked))
        if server.script:
            server.script.popleft()(self)
        else:
            self.serve()

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, *arguments):
        """Keeps quiet."""

    def send(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value != "":
                self.send_header(name, str(value))
        self.end_headers()

    def serve(self, *, num_bytes=None, offset=None, then=None, **headers):
        """Sends what was asked for, or the bytes from `offset` on, whatever was asked."""
        server = self.server
        if offset is None:
            validator = self.headers.get("If-Range", "")
            # A weak ETag never matches here: it allows other bytes.
            is_known = validator in (server.etag, server.last_modified) and not validator.startswith("W/")
            offset = self.asked if self.asked is not None and is_known else 0
        total, body = len(server.content), server.content[offset:]
        known = {"ETag": server.etag, "Last-Modified": server.last_modified, "Content-Length": len(body)}
        if self.headers["Accept-Encoding"] != "identity":
            known["Content-Encoding"] = "gzip"
        if offset:
            known["Content-Range"] = f"bytes {offset}-{total - 1}/{total}"
        self.send(206 if offset else 200, known | headers)
        if self.command != "HEAD":
            self.wfile.write(body[:num_bytes])
        if then:
            then()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ZipServer() as server:
        # Polled often, so that shutting down takes no half second.
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def known(server) -> Archive:
    """What a catalogue may know of the server's zip."""
    sha256 = hashlib.sha256(server.zip).hexdigest()
    return Archive(domain="walker", collector="icm", num_bytes=len(server.zip), sha256=sha256)


@pytest.fixture
def config(server, tmp_path) -> DownloadConfig:
    return DownloadConfig(out=str(tmp_path), mirror=server.url, first_wait=0.0, num_tries=3, timeout=5.0)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "walker" / "icm.zip"


@pytest.fixture
def part(target):
    return target.with_name(".icm.zip.part")


SHORT_LENGTHS = (12, 9, 10, 12, 8, 12, 11, 12)
"""Steps of the episodes of `short_store`."""


def piece(trajectory: Trajectory, start: int, num_steps: int) -> Trajectory:
    """Steps from the midst of an episode, as an episode of their own."""
    columns = {key: np.array(getattr(trajectory, key)[start : start + num_steps + 1]) for key in exorl.KEYS}
    columns["action"][0] = 0
    columns["reward"][0] = 0
    return dataclasses.replace(trajectory, **columns)


@pytest.fixture(scope="session")
def short_store(episodes, tmp_path_factory):
    """Path of a store of eight short episodes of real physics, built for cartpole_swingup alone."""
    folder = tmp_path_factory.mktemp("short") / "cartpole" / "buffer"
    folder.mkdir(parents=True)
    # Episodes 0 and 1 of the fixture have 40 and 60 steps.
    places = [(0, 0), (0, 13), (0, 27), (1, 0), (1, 12), (1, 24), (1, 36), (1, 48)]
    for i, ((source, start), length) in enumerate(zip(places, SHORT_LENGTHS, strict=True)):
        exorl.write_episode(folder / f"episode_{i:06d}_{length}.npz", piece(episodes[source], start, length))
    tasks = ("cartpole_swingup",)
    return build_store(
        BuildConfig(
            source=(str(folder),), out=str(folder / "store.h5"), tasks=tasks, domain="cartpole", num_workers=1
        )
    )
