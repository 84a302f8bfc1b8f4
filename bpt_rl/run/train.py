"""Training a run."""

import dataclasses

from bpt_rl.config import TrainConfig
from bpt_rl.run import records
from bpt_rl.run.open_runs import Announce, Progress
from bpt_rl.run.processes import is_first, join
from bpt_rl.run.train_seeds import train_seeds


def train(
    config: TrainConfig,
    report_progress: Progress | None = None,
    *,
    announce: Announce | None = None,
    command: str = "",
) -> records.RunFolder:
    """Trains to the configured number of steps, going on from the newest checkpoint of the run folder.

    Interrupted at any step and called again, it ends with the parameters of an uninterrupted run, bit for bit
    on the CPU.

    Where `config.mesh` names a coordinator, this waits for the other processes, each of which calls this function; the
    first writes the run folder. One that fails should end at once (`bpt_rl.run.processes.leave`).

    Args:
      config: Of the run.
      report_progress: Told of every step, or of every call of many steps, once its metrics are known to be finite.
      announce: Told what training begins with: where the data are kept, what layers keep, and why.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If the store does not exist.
      OSError: If other processes cannot be reached.
      ValueError: If configuration, store and run folder do not fit together.
      FloatingPointError: If loss, gradient or parameters stop being finite.
      OutOfMemoryError: If a step does not fit the device.
    """
    join(config.mesh)
    # What is true of one process alone is no part of the run.
    shared = dataclasses.replace(config, mesh=config.mesh.without_processes)
    if not is_first():
        report_progress = announce = None
    [folder] = train_seeds([shared], report_progress, announce=announce, command=command)
    return folder
