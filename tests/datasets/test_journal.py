import fcntl
import subprocess
import sys

import pytest

from bpt_rl.datasets.journal import Journal

HEADER = {"what": "work", "tasks": ["a", "b"]}


def test_entries_outlive_the_process_that_was_killed(tmp_path):
    path = tmp_path / "journal"
    script = (
        "import os, signal, sys; from pathlib import Path; from bpt_rl.datasets.journal import Journal\n"
        f"journal = Journal(Path({str(path)!r}), {HEADER!r})\n"
        "journal.append({'i': 0}); journal.append({'i': 1, 'x': 0.1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with Journal(path, HEADER) as journal:
        assert journal.entries == [{"i": 0}, {"i": 1, "x": 0.1}]


@pytest.mark.parametrize("kept", range(1, 9))
def test_a_line_that_was_cut_short_is_forgotten_and_written_anew(tmp_path, kept):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        journal.append({"i": 0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"i": 1}\n'[:kept])
    with Journal(path, HEADER) as journal:
        assert journal.entries == [{"i": 0}]
        journal.append({"i": 2})
    with Journal(path, HEADER) as journal:
        assert journal.entries == [{"i": 0}, {"i": 2}]


def test_a_journal_of_other_work_begins_anew(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        journal.append({"i": 0})
    with Journal(path, {**HEADER, "what": "else"}) as journal:
        assert journal.entries == []
    with Journal(path, HEADER) as journal:
        assert journal.entries == []


def test_two_cannot_do_the_same_work(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        journal.append({"i": 0})
        with pytest.raises(BlockingIOError):
            Journal(path, HEADER)
    with Journal(path, HEADER) as journal:
        assert journal.entries == [{"i": 0}]


def test_what_follows_a_line_that_cannot_be_read_is_forgotten(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        for i in range(3):
            journal.append({"i": i})
    # As a machine that lost power may leave it: a block of zeros.
    path.write_bytes(path.read_bytes().replace(b'{"i": 1}', b"\0" * 8))
    with Journal(path, HEADER) as journal:
        assert journal.entries == [{"i": 0}]
        journal.append({"i": 5})
    with Journal(path, HEADER) as journal:
        assert journal.entries == [{"i": 0}, {"i": 5}]


def test_a_journal_that_was_removed_while_it_was_opened_is_not_worked_with(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    lock = fcntl.flock

    def finish_and_lock(*arguments):
        path.unlink()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", finish_and_lock)
    with pytest.raises(BlockingIOError, match="just removed"):
        Journal(path, HEADER)
    assert not path.exists()
