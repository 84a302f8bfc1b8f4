"""Jobs in processes of this machine, each bound to its device or to its share of the cores.

A process takes job after job, so that imports and compiled programs are paid for once. One that dies, of whatever,
takes its job alone with it, and another takes its place.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bpt_rl.datasets import capacity
from bpt_rl.run.job import RUNNER, Job, Outcome
from bpt_rl.run.launchers import Ended

LAST_LINES = 30
"""Lines of a dead process's log that are kept with its failure."""
MOST_JOBS = 100
"""Of one process: what compiled programs leave behind of memory goes with it."""
GRACE = 10.0
"""Seconds that a process has to end once its pipe is closed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """What one process has for itself."""

    environment: Mapping[str, str]
    """Variables beside those of this process."""
    cores: tuple[int, ...] = ()
    """Numbers of its cores; none for all."""


def accelerators() -> list[str]:
    """Returns the numbers of the NVIDIA GPUs that JAX would use, without starting JAX, which would take them."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return []


def slots(workers: int, workers_per_device: int, *, job_memory: int, job_devices: int = 1) -> list[Slot]:
    """Returns what each process gets.

    Args:
      workers: Processes; 0 for `workers_per_device` an accelerator, or, without any, for as many as find two cores
        and `job_memory` each.
      workers_per_device: Processes that share an accelerator; its memory is divided among them.
      job_memory: Bytes of the host that a process without an accelerator may need.
      job_devices: Accelerators that a job's training is shared among, if there are any.

    Raises:
      ValueError: If there are accelerators, but fewer than a job needs.
    """
    if gpus := accelerators():
        if job_devices > len(gpus):
            raise ValueError(
                f"Work shared among devices must find them; got {job_devices} by train.mesh or evaluate.mesh and "
                f"{len(gpus)} on this machine. Lower train.mesh.* and evaluate.mesh.*."
            )
        groups = [
            ",".join(gpus[i : i + job_devices]) for i in range(0, len(gpus) - job_devices + 1, job_devices)
        ]
        number = workers or len(groups) * workers_per_device
        share = f"{float(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')) / workers_per_device:.4f}"
        variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": share}
        if (pinned := os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB")) is not None:
            variables["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] = str(max(1, int(pinned) // number))
        places = [group for group in groups for _ in range(workers_per_device)]
        environments = [variables | {"CUDA_VISIBLE_DEVICES": places[k % len(places)]} for k in range(number)]
    else:
        room = max(1, capacity.measure().host // job_memory)
        number = workers or max(1, min(len(os.sched_getaffinity(0)) // 2, room))
        environments = [{} for _ in range(number)]
    cores = sorted(os.sched_getaffinity(0))
    if number == 1 or number > len(cores):
        return [Slot(environment=environment) for environment in environments]
    return [
        Slot(environment=environment, cores=tuple(cores[k::number]))
        for k, environment in enumerate(environments)
    ]


class _Worker:
    def __init__(self, slot: Slot, runner: str, log_path: Path, compiled: str) -> None:
        self.log_path, self.slot = log_path, slot
        self.job: Job | None = None
        self.num_jobs = 0
        self.last = (0.0, "starts")
        self._received = b""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bpt_rl.run.cell_worker", runner]
        if slot.cores:
            command.append(",".join(map(str, slot.cores)))
        environment = {"JAX_COMPILATION_CACHE_DIR": compiled} | dict(os.environ) | dict(slot.environment)
        with log_path.open("wb") as log:
            # In a session of its own: Ctrl-C is for the parent, which takes its processes down.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    @property
    def replies(self) -> IO[bytes]:
        stream = self.process.stdout
        if stream is None:
            raise OSError("A worker must have a pipe; it has none. Report this.")
        return stream

    def messages(self) -> list[dict[str, Any]] | None:
        """Returns what has come since; None if nothing will any more."""
        # Not readline, which would leave a second line where select does not see it.
        block = os.read(self.replies.fileno(), 1 << 16)
        *lines, self._received = (self._received + block).split(b"\n")
        return [json.loads(line) for line in lines] if block else None

    def send(self, job: Job) -> None:
        self.job, self.last = job, (0.0, "starts")
        self.num_jobs += 1
        stream = self.process.stdin
        # A process that died meanwhile is noticed by the end of its replies.
        with contextlib.suppress(BrokenPipeError):
            if stream is not None:
                stream.write((json.dumps(dataclasses.asdict(job)) + "\n").encode())
                stream.flush()

    def death(self) -> tuple[str, str]:
        code = self.process.wait()
        name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
        lines = self.log_path.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return f"its process ended with {name}{hint} (log: {self.log_path})", "\n".join(lines)

    def stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalLauncher(contextlib.AbstractContextManager["LocalLauncher"]):
    """Processes of this machine."""

    def __init__(self, places: Sequence[Slot], logs_path: Path, runner: str = RUNNER) -> None:
        """Starts no process before there is a job for it.

        Args:
          places: One a process.
          logs_path: Folder of their logs.
          runner: Of the jobs, as "module:function".
        """
        self._free, self._logs_path, self._runner = list(places), logs_path, runner
        self._idle: list[_Worker] = []
        self._number, self._num_started = len(self._free), 0
        self._selector = selectors.DefaultSelector()
        # Programs of this grid, compiled by one process and read by the others.
        self._compiled = tempfile.TemporaryDirectory(prefix="bpt_rl_compiled_")

    @property
    def num_slots(self) -> int:
        """Processes."""
        return self._number

    def start(self, job: Job) -> None:
        """Gives a job to a process without one, which is started if need be."""
        worker = self._idle.pop() if self._idle else self._started()
        worker.send(job)

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Returns the jobs that ended, waiting at most so long for one."""
        ended = []
        for key, _ in self._selector.select(seconds):
            worker: _Worker = key.data
            messages = worker.messages()
            if messages is None:
                ended += self._bury(worker)
            for values in messages or ():
                if "outcomes" in values:
                    ended += self._settle(worker, [Outcome(**outcome) for outcome in values["outcomes"]])
                else:
                    worker.last = values["part"], values["words"]
        return ended

    def _settle(self, worker: _Worker, outcomes: Sequence[Outcome]) -> list[Ended]:
        job, worker.job = worker.job, None
        # After an error nobody knows what a process still holds of its device.
        has_failed = any(outcome.state == "failed" for outcome in outcomes)
        if has_failed or worker.num_jobs >= MOST_JOBS:
            self._bury(worker)
        else:
            self._idle.append(worker)
        return [Ended(job, outcomes)] if job else []

    def progress(self) -> dict[str, tuple[float, str]]:
        """Returns the last that each busy process told."""
        workers = [key.data for key in self._selector.get_map().values()]
        return {worker.job.name: worker.last for worker in workers if worker.job is not None}

    def __exit__(self, *error: object) -> None:
        """Ends all processes; what they were at goes on from its checkpoint another time."""
        workers = [key.data for key in self._selector.get_map().values()]
        for worker in workers:
            if worker.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    worker.process.stdin.close()
        for worker in workers:
            worker.stop()
        self._selector.close()
        self._compiled.cleanup()

    def _started(self) -> _Worker:
        self._num_started += 1
        path = self._logs_path / f"{os.getpid()}_{self._num_started}.log"
        worker = _Worker(self._free.pop(0), self._runner, path, self._compiled.name)
        self._selector.register(worker.replies, selectors.EVENT_READ, worker)
        return worker

    def _bury(self, worker: _Worker) -> list[Ended]:
        self._selector.unregister(worker.replies)
        self._free.append(worker.slot)
        job, worker.job = worker.job, None
        if job is None:
            worker.stop()
            if worker in self._idle:
                self._idle.remove(worker)
            return []
        # Whoever closes its replies has died or is about to.
        error, details = worker.death()
        worker.stop()
        return [Ended(job, job.outcomes("failed", error, details))]
