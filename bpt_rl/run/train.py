"""Training a run."""

from bpt_rl.config import TrainConfig
from bpt_rl.run import records
from bpt_rl.run.open_runs import Announce, Progress
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

    Args:
      config: Of the run.
      report_progress: Told of every step, or of every call of many steps, once its metrics are known to be finite.
      announce: Told what training begins with: where the data are kept, what layers keep, and why.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If the store does not exist.
      ValueError: If configuration, store and run folder do not fit together.
      FloatingPointError: If loss, gradient or parameters stop being finite.
      OutOfMemoryError: If a step does not fit the device.
    """
    [folder] = train_seeds([config], report_progress, announce=announce, command=command)
    return folder
