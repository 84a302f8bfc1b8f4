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
