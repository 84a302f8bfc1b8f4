"""Spreading simulator work over processes."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_processes(requested: int, at_most: int) -> int:
    """Returns how many processes to use: `requested`, or one a core if that is 0, but never over `at_most`.

    Raises:
      ValueError: If `requested` is negative.
    """
    if requested < 0:
        raise ValueError(f"num_workers must not be negative; got {requested}. 0 means one a core.")
    return max(1, min(requested or len(os.sched_getaffinity(0)), at_most))


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int
) -> Generator[Result, None, None]:
    """Yields `function(item)` in the order of the items, computed in `num_workers` processes.

    Items are drawn only a few ahead of the results, so that an endless stream fits into memory. One worker
    means this process. Function, items and results must be picklable.

    Raises:
      RuntimeError: If a process dies; what `function` raises is raised as it is.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    # Spawned, not forked: JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    remaining = iter(items)
    pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context, initializer=follow_parent)
    with pool:
        try:
            pending.extend(
                pool.submit(function, item) for item in itertools.islice(remaining, 3 * num_workers)
            )
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in itertools.islice(remaining, 1))
                yield result
        except BrokenProcessPool as error:
            raise RuntimeError(
                "Every worker process must live until its work is done; one died, perhaps out of memory. "
                'Use fewer num_workers, and start a script\'s work below `if __name__ == "__main__":`.'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """Leaves Ctrl-C to this process's parent, and ends with it."""
    # Ctrl-C reaches the whole process group; the parent is the one to end the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process once its parent is gone: a killed one tells nobody, and its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
