"""A process of the local launcher: takes job after job over its standard input, and ends with its parent.

    python -m bpt_rl.run.cell_worker RUNNER [CORES]

Lines of JSON: jobs come in, progress and outcomes go out. What the job's code prints goes to standard error.
"""

import dataclasses
import json
import os
import queue
import sys
import threading
import time
from typing import Any, TextIO

REPORT_EVERY = 0.5
"""Seconds between two words on progress."""


def main() -> None:
    """Runs jobs until the parent closes the pipe or dies."""
    if len(sys.argv) > 2:
        # Before anything counts the cores: JAX's threads and the simulators take the share of this process.
        os.sched_setaffinity(0, [int(core) for core in sys.argv[2].split(",")])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    from bpt_rl.run.job import Job, find_runner, run_job

    runner = find_runner(sys.argv[1])
    while True:
        job = Job(**jobs.get())
        outcomes = run_job(job, _Reporter(replies), runner)
        _send(replies, {"outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]})


def _listen(jobs: "queue.SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    # The parent is gone, or wants no more: whatever the main thread is at, its cell goes on from its checkpoint.
    os._exit(0)


class _Reporter:
    def __init__(self, replies: TextIO) -> None:
        self._replies, self._last, self._words = replies, 0.0, ""

    def __call__(self, part: float, words: str) -> None:
        if words != self._words or time.monotonic() - self._last > REPORT_EVERY:
            self._last, self._words = time.monotonic(), words
            _send(self._replies, {"part": part, "words": words})


def _send(replies: TextIO, values: dict[str, Any]) -> None:
    replies.write(json.dumps(values) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
