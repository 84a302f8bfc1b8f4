"""The launcher that a configuration asks for."""

from collections.abc import Sequence
from pathlib import Path

from bpt_rl.ablate_config import AblateConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.job import RUNNER, Job
from bpt_rl.run.launcher_local import LocalLauncher, accelerators, slots
from bpt_rl.run.launcher_ray import RayLauncher, Request
from bpt_rl.run.launchers import Launcher


def make_launcher(config: AblateConfig, jobs: Sequence[Job], *, runner: str = RUNNER) -> Launcher:
    """Returns the launcher, for no more processes than there are jobs.

    Args:
      config: Of the grid.
      jobs: That are to run.
      runner: What finishes a job, as "module:function".

    Raises:
      ImportError: If the launcher's package is not installed.
      ConnectionError: If there is no Ray cluster at the address.
      ValueError: If a job asks for more than there is.
    """
    if config.launcher == "ray":
        memory = int(config.ray_memory_gib * GIB)
        request = Request(num_cpus=config.ray_cpus, num_gpus=config.ray_gpus, memory=memory)
        return RayLauncher(config.ray_address, request, runner)
    memory = GIB
    if not config.workers and not accelerators():
        # Only here: a plan starts JAX, which would take the accelerators from the processes.
        from bpt_rl.run.ablation_plan import largest_memory

        memory = largest_memory(jobs)
    devices = max(job.num_devices for job in jobs)
    places = slots(config.workers, config.workers_per_device, job_memory=memory, job_devices=devices)
    return LocalLauncher(places[: len(jobs)], GridFolder(Path(config.out)).logs_path, runner)
