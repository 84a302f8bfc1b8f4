"""Processes that train one run together: how they meet, what they agree on, and how they end."""

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bpt_rl.mesh_config import CLUSTER, MeshConfig, check_shares
from bpt_rl.run import records

HEARTBEAT_SECONDS = 60
"""A process that is not heard of for so long is dead, and JAX ends the others."""
MEETING_SECONDS = 300
"""Until all must have come."""
_POLL_SECONDS = 0.5
_SIGNS = ("Gloo", "NCCL", "coordination service")
"""What errors hold that come of a process that is gone."""


def join(mesh: MeshConfig) -> None:
    """Waits until all processes that the mesh speaks of are there; from then on JAX counts the devices of all.

    One process is all there is without a coordinator, unless the caller has initialised `jax.distributed`. If others do
    not come, this process says so and ends, with status 2: JAX could only abort it.

    Raises:
      OSError: If the port is taken.
      ValueError: If no cluster tells who they are, or they cannot share the devices.
    """
    if mesh.coordinator and not jax.distributed.is_initialized():
        # It swallows SIGTERM, with which clusters end a process.
        jax.config.update("jax_enable_preemption_service", False)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        given: dict[str, Any] = {}
        if mesh.coordinator != CLUSTER:
            given = {"coordinator_address": mesh.coordinator, "num_processes": mesh.num_processes}
            given |= {"process_id": mesh.process_id, "cluster_detection_method": "deactivate"}
            if mesh.process_id == 0:
                _check_port(mesh)
        give_up = threading.Timer(MEETING_SECONDS, _give_up, [mesh])
        give_up.start()
        try:
            jax.distributed.initialize(
                **given,
                initialization_timeout=2 * MEETING_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except ValueError as error:
            raise ValueError(
                f"mesh.coordinator {CLUSTER!r} needs a cluster that tells who takes part; got none that JAX knows "
                f"({error}). Start it by Slurm or mpirun, or give mesh.coordinator, num_processes and process_id."
            ) from error
        finally:
            give_up.cancel()
    check_shares(mesh.num_devices, jax.process_count())


def _check_port(mesh: MeshConfig) -> None:
    """Refuses a port that is taken, at which JAX would crash."""
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("::", int(mesh.coordinator.rpartition(":")[2])))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"The first process listens at mesh.coordinator; got {mesh.coordinator!r}, whose port is taken on this "
                "host. Name another one to all processes."
            ) from error


def _give_up(mesh: MeshConfig) -> None:
    print(
        f"bpt-rl: All processes must meet at mesh.coordinator within {MEETING_SECONDS} s; got {mesh.coordinator!r}, "
        "where not all came. Start every process, each under its own number, and see that all reach that port.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def is_first() -> bool:
    """Returns whether this process is the one that writes and reports."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, in their order; all must call it, and none goes on before all have."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([content.size], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths.tolist(), strict=True)]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Lets a stage succeed in all processes or fail in all; nothing inside may wait for other processes.

    Raises:
      ValueError: If it failed in another process; it says why. Where it failed here, that is raised.
    """
    try:
        yield
    except Exception as error:
        gathered(f"{error}" or type(error).__name__)
        raise
    failures = gathered("")
    if any(failures):
        index = next(i for i, failure in enumerate(failures) if failure)
        raise ValueError(f"Process {index} of {len(failures)} cannot train: {failures[index]}")


def check_alike(values: Mapping[str, Any]) -> None:
    """Refuses to go on if processes were not given the same.

    Args:
      values: What must be the same, as JSON has it, by name.

    Raises:
      ValueError: If something is not; in all processes.
    """
    first, *others = gathered(dict(values))
    for index, other in enumerate(others, 1):
        for name in first:
            if first[name] != other[name]:
                raise ValueError(
                    f"All processes train one configuration on one store; got {name} {first[name]!r} in process 0 and "
                    f"{other[name]!r} in process {index}. Start all with the same command but for mesh.process_id."
                )


@contextlib.contextmanager
def ending_together(folder: Path) -> Iterator[None]:
    """Ends all processes when one fails, with its sentence, wherever the others wait for it.

    All enter it at once. A process that is killed leaves no sentence: JAX ends the others when it misses it.

    Args:
      folder: Of the run.

    Raises:
      ValueError: If they do not all see the folder.
    """
    count, mine = jax.process_count(), jax.process_index()
    if count == 1:
        yield
        return
    start = gathered(secrets.token_hex(8))[0]
    notes = _Notes(paths=[folder / f".process_{i}_of_{count}.failed" for i in range(count)], start=start)
    with agreed():
        if is_first():
            notes.write(mine, "")
    with agreed():
        notes.check_seen()
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(notes, is_over), daemon=True).start()
    try:
        yield
    except BaseException as error:
        is_over.set()
        lost = _lost(notes, error)
        if lost:
            raise OSError(lost) from error
        with contextlib.suppress(OSError):
            notes.write(mine, f"{error}" or type(error).__name__)
        raise
    finally:
        is_over.set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Notes:
    """Why processes ended, each in a file of its own."""

    paths: list[Path]
    start: str
    """Tells notes of this start from those of earlier ones."""

    def write(self, index: int, reason: str) -> None:
        records.write_atomically(self.paths[index], f"{self.start}\n{reason}")

    def check_seen(self) -> None:
        """Refuses a folder without the note with which the first process began.

        Raises:
          ValueError: If it is not there.
        """
        first = self.paths[0]
        for _ in range(20):
            with contextlib.suppress(OSError):
                if first.read_text(encoding="utf-8").startswith(self.start):
                    return
            time.sleep(_POLL_SECONDS)
        raise ValueError(
            f"All processes must see the run folder; got {first.parent}, which is another one here than where the "
            "first writes. Name a folder on storage that they share."
        )

    def read(self) -> str:
        """Returns which process has ended and why; nothing if none has said so."""
        for index, path in enumerate(self.paths):
            with contextlib.suppress(OSError):
                start, _, reason = path.read_text(encoding="utf-8").partition("\n")
                if start == self.start and reason:
                    return f"process {index} of {len(self.paths)} has ended: {reason}"
        return ""


def _watch(notes: _Notes, is_over: threading.Event) -> None:
    while not is_over.wait(_POLL_SECONDS):
        failure = notes.read()
        if failure and not is_over.is_set():
            print(f"bpt-rl: {failure}", file=sys.stderr)
            leave(2)


def _lost(notes: _Notes, error: BaseException) -> str:
    """Returns a sentence on the process that this one lost, if that is the error."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or not any(sign in str(error) for sign in _SIGNS):
        return ""
    # Its connections may close before its reason is to be read.
    for _ in range(4):
        if failure := notes.read():
            return failure
        time.sleep(_POLL_SECONDS)
    reason = str(error).strip().splitlines()[0]
    return f"another process has ended without a word ({reason}). The same commands go on from the last checkpoint."


def leave(status: int, error: BaseException | None = None) -> None:
    """Ends this process at once if there are others: JAX would wait for them, and they wait for this one.

    Args:
      status: With which it ends.
      error: Whose traceback is shown.
    """
    if jax.distributed.is_initialized():
        if error:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
