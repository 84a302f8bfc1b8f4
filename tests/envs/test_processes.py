import itertools
import os
import signal
import subprocess
import sys

import pytest

from bpt_rl.envs.processes import map_in_order, num_processes


def test_processes_are_limited_by_work_and_cores():
    assert num_processes(3, at_most=8) == 3
    assert num_processes(9, at_most=2) == 2
    assert num_processes(0, at_most=1000) == len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="num_workers must not be negative; got -2"):
        num_processes(-2, at_most=1)


# The standard library's, since test modules imported by path cannot be pickled by name.
def test_results_keep_the_order_of_an_endless_stream():
    drawn = []
    items = (drawn.append(i) or -i for i in itertools.count())
    results = map_in_order(abs, items, num_workers=2)
    assert list(itertools.islice(results, 10)) == list(range(10))
    results.close()
    assert len(drawn) < 20


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_comes_through_as_it_is(num_workers):
    with pytest.raises(ValueError, match=r"invalid literal for int\(\) with base 10: 'x'"):
        list(map_in_order(int, ["1", "x"], num_workers=num_workers))


def test_a_process_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="one died, perhaps out of memory"):
        list(map_in_order(signal.raise_signal, [signal.SIGKILL, 0], num_workers=2))


PARENT = """
import os, signal, time
from bpt_rl.envs.processes import map_in_order

if __name__ == "__main__":
    for _ in map_in_order(time.sleep, [0.1, 0.1, 0.1, 60], num_workers=2):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_parent_that_was_killed(tmp_path):
    """Whether one waits for work or is in the middle of it. Each holds the pipe that is read here to its end."""
    path = tmp_path / "parent.py"
    path.write_text(PARENT)
    done = subprocess.run([sys.executable, path], capture_output=True, timeout=20, check=False)
    assert done.returncode == -signal.SIGKILL
