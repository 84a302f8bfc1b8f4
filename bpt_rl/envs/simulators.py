"""Processes that each simulate a group of environments, and what they are asked and answer."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import gymnasium
import numpy as np
from jaxtyping import Int

from bpt_rl.envs import processes

Answer = Callable[[str, Any], Any]
"""Runs in a process: takes a command and what comes with it, returns the reply."""
_CONNECTION_LOST = (EOFError, BrokenPipeError, ConnectionResetError)


class Simulators:
    """Processes that live until they are closed; every command goes to all of them."""

    def __init__(self, make: Callable[..., Answer], num_environments: int, num_workers: int) -> None:
        """Starts the processes and waits until each has made its environments.

        Args:
          make: Called in each process with the indices of its environments; picklable.
          num_environments: Environments in all, dealt out in order.
          num_workers: Processes.

        Raises:
          RuntimeError: If a process fails to start.
        """
        self.groups = np.array_split(np.arange(num_environments), num_workers)
        self._workers: list[tuple[BaseProcess, Connection]] = []
        context = multiprocessing.get_context("spawn")
        for k, group in enumerate(self.groups):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, make, group), name=f"simulator-{k}", daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self.receive()

    def send(self, command: str, payloads: Sequence[Any]) -> None:
        """Asks every process something, each with its own payload; `receive` must follow.

        Raises:
          RuntimeError: If a process has died; all are then closed.
          ClosedEnvironmentError: If they were closed.
        """
        if not self._workers:
            raise gymnasium.error.ClosedEnvironmentError(
                "A closed vector environment cannot be used. Make a new one."
            )
        for k, payload in enumerate(payloads):
            try:
                self._workers[k][1].send((command, payload))
            except _CONNECTION_LOST:
                self._raise_death(k)

    def receive(self) -> list[Any]:
        """Returns the reply of every process.

        Raises:
          RuntimeError: If a process has failed or died; all are then closed.
        """
        replies = []
        for k in range(len(self._workers)):
            try:
                failure, value = self._workers[k][1].recv()
            except _CONNECTION_LOST:
                self._raise_death(k)
            if failure:
                self.close()
                raise RuntimeError(f"{self._place(k)} failed:\n{failure}")
            replies.append(value)
        return replies

    def close(self) -> None:
        """Ends the processes."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._workers = []

    def _place(self, k: int) -> str:
        return f"Simulator process {k} (environments {self.groups[k][0]} to {self.groups[k][-1]})"

    def _raise_death(self, k: int) -> NoReturn:
        process = self._workers[k][0]
        process.join(timeout=5)
        code = process.exitcode
        self.close()
        reason = (
            f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        )
        raise RuntimeError(
            f"{self._place(k)} must live until it is closed; it ended {reason}. If memory ran out, use "
            'fewer num_workers, and start a script\'s work below `if __name__ == "__main__":`.'
        )


def _work(connection: Connection, make: Callable[..., Answer], group: Int[np.ndarray, "n"]) -> None:
    """Runs in each process: answers (traceback or "", value) to every command until the connection closes."""
    processes.follow_parent()
    with contextlib.suppress(*_CONNECTION_LOST), connection:
        try:
            answer = make(group)
            connection.send(("", None))
            while True:
                command, payload = connection.recv()
                connection.send(("", answer(command, payload)))
        except _CONNECTION_LOST:
            raise
        except Exception:
            connection.send((f"{traceback.format_exc()}(process {os.getpid()})", None))
