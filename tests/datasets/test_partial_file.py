"""What is left of a download that ended early: who may go on with it, and from where."""

import contextlib
import errno
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from bpt_rl.datasets.catalogue import Archive
from bpt_rl.datasets.download import download
from bpt_rl.datasets.partial_file import PartialFile

COMMAND = str(Path(sys.executable).with_name("bpt-rl"))
UNKNOWN = Archive(domain="walker", collector="icm")


def test_a_whole_partial_file_needs_no_server(server, known, config, target, part):
    part.parent.mkdir()
    part.write_bytes(server.zip)
    note = {"num_bytes": len(server.zip), "etag": "", "last_modified": ""}
    part.with_name(f"{part.name}.json").write_text(json.dumps(note))
    assert download(known, config).verification == "verified by SHA-256"
    assert (list(target.parent.iterdir()), server.requests) == ([target], [])


@pytest.mark.parametrize("note", [None, "{", "[1]", '{"num_bytes": 7, "etag": "\\"version-1\\""}', "3"])
def test_a_partial_file_of_unknown_origin_is_not_gone_on_with(server, known, config, target, part, note):
    part.parent.mkdir()
    part.write_bytes(server.other_zip[:1000])
    if note is not None:
        part.with_name(f"{part.name}.json").write_text(note)
    server.script.append(server.status(503))
    with pytest.raises(OSError, match=r"\. 0 bytes are kept"):
        download(known, replace(config, num_tries=1))
    download(known, config)
    assert (target.read_bytes(), server.requests) == (server.zip, [("GET", None)] * 2)


def test_a_zip_that_another_process_finishes_meanwhile_is_only_checked(
    server, known, config, target, part, monkeypatch
):
    real = fcntl.flock

    def lock(file, operation):
        # The other process lets the lock go once the zip is in its place.
        if not target.exists():
            part.write_bytes(server.zip)
            part.replace(target)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    assert not download(known, config).is_new
    assert (target.read_bytes(), list(target.parent.iterdir())) == (server.zip, [target])
    assert server.requests == []


def test_a_disk_that_takes_few_bytes_at_a_time_gets_them_all(tmp_path):
    class Slow(FileIO):
        def write(self, data):
            return super().write(data[:10])

    with Slow(tmp_path / ".zip.part", "a+") as file:
        PartialFile(tmp_path / "zip", file).append(bytes(range(256)))
    assert (tmp_path / ".zip.part").read_bytes() == bytes(range(256))


def test_too_small_a_disk_is_refused_before_the_first_byte(server, known, config, target, monkeypatch):
    server.script.append(server.cut(2_000_000))
    with pytest.raises(OSError, match="ended early"):
        download(known, replace(config, num_tries=1))
    usage = shutil.disk_usage(target.parent)
    # What is there already needs no more room.
    left = len(server.zip) - 2_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left - 1))
    with pytest.raises(OSError, match=r"walker/icm needs 0\.00 GB more and .* --out") as caught:
        download(known, config)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left))
    download(known, config)
    assert target.read_bytes() == server.zip


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
def test_one_process_at_a_time_and_the_next_goes_on_after_its_death(server, known, config, target, part, end):
    server.script.append(server.hang(2**20))
    with process(config, part, 2**20) as running:
        with pytest.raises(OSError, match=rf"another one is downloading {target}"):
            download(UNKNOWN, config)
        assert len(server.requests) == 1
        running.send_signal(end)
        status, err = running.wait(20), running.stderr.read()
    if end == signal.SIGINT:
        assert status == 130
        assert "the same command goes on from there" in err
        assert "Traceback" not in err
    assert (target.exists(), part.read_bytes()) == (False, server.zip[: 2**20])
    done = subprocess.run(line_of(config), capture_output=True, text=True, check=True)
    assert f"{len(server.zip):,} bytes, SHA-256 {known.sha256}: NOT verified" in done.stdout
    assert (target.read_bytes(), server.requests[1:]) == (server.zip, [("GET", 2**20)])


def test_a_full_disk_keeps_what_is_there_and_says_so_in_one_sentence(server, known, config, target, part):
    # The system itself refuses to let any file grow over 4000 blocks of 512 bytes.
    limited = ["sh", "-c", 'ulimit -f 4000; exec "$@"', "sh", *line_of(config)]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{target} was not: File too large. Free space or use another." in done.stderr
    assert "Traceback" not in done.stderr
    assert part.read_bytes() == server.zip[: 4000 * 512]
    download(known, config)
    assert (target.read_bytes(), server.requests[-1]) == (server.zip, ("GET", 4000 * 512))
