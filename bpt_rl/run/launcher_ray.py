"""Jobs as tasks of Ray Core: on a cluster that is there, or on one of this machine's own.

Ray decides where a job runs, gives it its accelerators and notices when a worker or its host is gone; the job is then
run again, from its checkpoint. The folder of the grid and the stores must lie where every host finds them under the
same path.
"""

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpt_rl.run.job import RUNNER, Job, Outcome, find_runner, run_job
from bpt_rl.run.launcher_local import MOST_JOBS
from bpt_rl.run.launchers import Ended


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What Ray holds for a job while it runs."""

    num_cpus: float = 2.0
    num_gpus: float = 0.0
    memory: int = 0
    """Bytes of the host; 0 for no request."""


class RayLauncher(contextlib.AbstractContextManager["RayLauncher"]):
    """Tasks of Ray Core."""

    num_slots = sys.maxsize
    """Ray holds what waits, and a cluster that grows by itself grows by it."""

    def __init__(self, address: str, request: Request, runner: str = RUNNER) -> None:
        """Connects to a cluster, or starts one.

        Args:
          address: Of the cluster, "auto" for the one of this machine; empty starts one that ends with the launcher.
          request: For each job.
          runner: Of the jobs, as "module:function".

        Raises:
          ImportError: If Ray is not installed.
          ConnectionError: If there is no cluster at the address.
          ValueError: If a cluster of this machine's own has less than one job asks for.
        """
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                "The launcher ray needs the extra `ray`, which is not installed. pip install 'bpt-rl[ray]', or use "
                "--launcher local."
            ) from error
        self._ray, self._runner = ray, runner
        self._running: dict[Any, Job] = {}
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            options = {} if address else {"include_dashboard": False}
            ray.init(
                address=address or "local", **options, log_to_driver=False, logging_level=logging.WARNING
            )
        if not address:
            self._check_room(request)
        # Tries are counted by the grid; Ray's own would start a job again unseen.
        held: dict[str, Any] = {"num_cpus": request.num_cpus, "num_gpus": request.num_gpus}
        held |= {"max_retries": 0, "max_calls": MOST_JOBS}
        if request.memory:
            held["memory"] = request.memory
        if request.num_gpus:
            share = f"{0.95 * min(1.0, request.num_gpus):.4f}"
            held["runtime_env"] = {"env_vars": {"XLA_PYTHON_CLIENT_MEM_FRACTION": share}}
        self._task = ray.remote(**held)(_run)
        # Ray keeps no job to its cores; it may have so many simulators.
        self._num_simulators = max(1, int(request.num_cpus))

    def start(self, job: Job) -> None:
        """Hands a job to Ray."""
        placed = dataclasses.asdict(job.with_simulators(self._num_simulators))
        reference = self._task.remote(placed, self._runner, str(Path.cwd()))
        self._running[reference] = job

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Returns the jobs that ended, waiting at most so long for one."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        # Those that ended meanwhile too.
        ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._ended(reference) for reference in ready]

    def progress(self) -> dict[str, tuple[float, str]]:
        """Returns nothing: Ray's own dashboard shows what runs where."""
        return {}

    def __exit__(self, *error: object) -> None:
        """Cancels what runs; ends the cluster if it was started here."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._is_ours:
            self._ray.shutdown()

    def _check_room(self, request: Request) -> None:
        """Refuses what this machine will never have; a cluster elsewhere may yet grow."""
        found = self._ray.cluster_resources()
        for name, asked in (("CPU", request.num_cpus), ("GPU", request.num_gpus), ("memory", request.memory)):
            if asked > found.get(name, 0):
                self.__exit__()
                raise ValueError(
                    f"A job must find what it asks Ray for; got {asked:g} of {name}, and this machine has "
                    f"{found.get(name, 0):g}. Ask for less, or name a cluster by ray_address."
                )

    def _ended(self, reference: Any) -> Ended:
        job = self._running.pop(reference)
        try:
            outcomes = [Outcome(**outcome) for outcome in self._ray.get(reference)]
        except self._ray.exceptions.RayError as error:
            # Of a lost worker or host; what the job's own code raises comes as an outcome.
            reason, *rest = str(error).splitlines() or [""]
            outcomes = job.outcomes(
                "failed", f"its worker was lost: {type(error).__name__}: {reason}", "\n".join(rest)
            )
        return Ended(job, outcomes)


def _run(job: dict[str, Any], runner: str, folder: str) -> list[dict[str, Any]]:
    """Runs on a worker; a path of the job that is not absolute counts from the folder that `ablate` was called in."""
    os.chdir(folder)
    outcomes = run_job(Job(**job), lambda part, words: None, find_runner(runner))
    return [dataclasses.asdict(outcome) for outcome in outcomes]
