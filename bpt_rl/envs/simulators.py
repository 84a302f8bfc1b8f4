"""Processes that each simulate a group of environments, and what they are asked and answer."""

import collections
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Int

from bpt_rl.envs import processes

Answer = Callable[[str, Any], Any]
"""Runs in a process: takes a command and what comes with it, returns the reply."""
Message = tuple[str, Any]
"""A command and what comes with it."""
MAX_DEATHS = 3
"""Deaths of one process, without an answer in between, after which it is not started again."""
_CONNECTION_LOST = (EOFError, BrokenPipeError, ConnectionResetError)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    unanswered: collections.deque[Message] = dataclasses.field(default_factory=collections.deque)
    """Oldest first."""
    num_deaths: int = 0
    """Of its predecessors, since one has answered."""


class Simulators:
    """Processes that live until they are closed. Each answers its commands in the order they were sent."""

    def __init__(
        self,
        make: Callable[..., Answer],
        num_environments: int,
        num_workers: int,
        *,
        revival: Callable[[int], Message] | None = None,
    ) -> None:
        """Starts the processes and waits until each has made its environments.

        Args:
          make: Called in each process with the indices of its environments; picklable.
          num_environments: Environments in all, dealt out in order.
          num_workers: Processes.
          revival: Given the number of a process that has died, returns the command that brings another one to where
            it was before the commands that it has left unanswered; these are then sent again. None raises instead.

        Raises:
          RuntimeError: If a process fails to start.
        """
        self.groups = np.array_split(np.arange(num_environments), num_workers)
        self._make, self._revival = make, revival
        self._workers = [self._start(k) for k in range(num_workers)]
        for k in range(num_workers):
            try:
                self._reply(k)
            except _CONNECTION_LOST:
                raise self._death(k) from None

    def send(self, command: str, payloads: Sequence[Any]) -> None:
        """Asks every process something, each with its own payload; `receive` must follow.

        Raises:
          RuntimeError: If a process has died and cannot be revived; all are then closed.
          ClosedEnvironmentError: If they were closed.
        """
        self._require_open()
        for k, payload in enumerate(payloads):
            self.send_to([k], command, payload)

    def send_to(self, workers: Sequence[int], command: str, payload: Any) -> None:
        """Asks some processes the same; `receive_from` must follow for each, once for each command."""
        self._require_open()
        message = (command, payload)
        # Once for all of them: the last one waits while the others are told.
        pickled = pickle.dumps(message)
        for k in workers:
            self._workers[k].unanswered.append(message)
            try:
                self._workers[k].connection.send_bytes(pickled)
            except _CONNECTION_LOST:
                # Left unanswered, it is sent again by whoever waits for the answer.
                if self._revival is None:
                    raise self._death(k) from None

    def receive(self) -> list[Any]:
        """Returns the reply of every process.

        Raises:
          RuntimeError: If a process has failed, or has died and cannot be revived; all are then closed.
        """
        return [self.receive_from(k) for k in range(len(self._workers))]

    def receive_from(self, k: int) -> Any:
        """Returns the reply of process `k` to its oldest unanswered command."""
        self._require_open()
        while True:
            try:
                value = self._reply(k)
            except _CONNECTION_LOST:
                self._revive(k)
            else:
                self._workers[k].unanswered.popleft()
                self._workers[k].num_deaths = 0
                return value

    def have_answered(self, workers: Sequence[int]) -> bool:
        """Returns whether `receive_from` would wait for none of these processes."""
        self._require_open()
        asked = select.poll()
        for k in workers:
            asked.register(self._workers[k].connection, select.POLLIN)
        return len(asked.poll(0)) == len(workers)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers = []

    def _require_open(self) -> None:
        if not self._workers:
            raise gymnasium.error.ClosedEnvironmentError(
                "A closed vector environment cannot be used. Make a new one."
            )

    def _start(self, k: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self._make, self.groups[k])
        process = context.Process(target=_work, args=arguments, name=f"simulator-{k}", daemon=True)
        process.start()
        theirs.close()
        return _Worker(process=process, connection=ours)

    def _reply(self, k: int) -> Any:
        failure, value = self._workers[k].connection.recv()
        if failure:
            self.close()
            raise RuntimeError(f"{self._place(k)} failed:\n{failure}")
        return value

    def _revive(self, k: int) -> None:
        """Replaces a process that has died, and sends the other one all that was left unanswered."""
        dead = self._workers[k]
        num_deaths = dead.num_deaths + 1
        if self._revival is None or num_deaths == MAX_DEATHS:
            raise self._death(k, num_deaths)
        how = _end_of(dead.process)
        _log.warning("%s ended %s. Another one takes up its episodes.", self._place(k), how)
        dead.connection.close()
        dead.process.close()
        worker = self._workers[k] = self._start(k)
        worker.unanswered, worker.num_deaths = dead.unanswered, num_deaths
        try:
            self._reply(k)
            for message in (self._revival(k), *worker.unanswered):
                worker.connection.send_bytes(pickle.dumps(message))
            self._reply(k)
        except _CONNECTION_LOST:
            self._revive(k)

    def _place(self, k: int) -> str:
        return f"Simulator process {k} (environments {self.groups[k][0]} to {self.groups[k][-1]})"

    def _death(self, k: int, num_deaths: int = 1) -> RuntimeError:
        how = _end_of(self._workers[k].process)
        self.close()
        times = f", {num_deaths} times in a row" if num_deaths > 1 else ""
        return RuntimeError(
            f"{self._place(k)} must live until it is closed; it ended {how}{times}. If memory ran out, use "
            'fewer num_workers, and start a script\'s work below `if __name__ == "__main__":`.'
        )


def _end_of(process: BaseProcess) -> str:
    process.join(timeout=5)
    code = process.exitcode
    if code is None:
        # Its end of the connection is closed, and yet it goes on.
        process.kill()
        process.join()
        return "its connection"
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _work(connection: Connection, make: Callable[..., Answer], group: Int[np.ndarray, "n"]) -> None:
    """Runs in each process: answers (traceback or "", value) to every command until the connection closes."""
    processes.follow_parent()
    with contextlib.suppress(*_CONNECTION_LOST), connection:
        try:
            answer = make(group)
            connection.send(("", None))
            while True:
                command, payload = pickle.loads(connection.recv_bytes())
                connection.send(("", answer(command, payload)))
        except _CONNECTION_LOST:
            raise
        except Exception:
            connection.send((f"{traceback.format_exc()}(process {os.getpid()})", None))
