"""Training several seeds of one configuration at once, in one compiled program."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bpt_rl.config import TrainConfig
from bpt_rl.config_toml import flat
from bpt_rl.run import records
from bpt_rl.run.open_runs import Announce, Progress
from bpt_rl.run.train_chains import train_chains
from bpt_rl.run.train_td import train_td
from bpt_rl.td_config import TD_AGENTS


def train_seeds(
    configs: Sequence[TrainConfig],
    report_progress: Progress | None = None,
    *,
    announce: Announce | None = None,
    command: str = "",
) -> list[records.RunFolder]:
    """Trains each configuration in its run folder, all seeds in each gradient step, and returns the folders.

    Each folder ends as training its configuration alone leaves it, numbers equal but for float32 rounding: a seed
    draws its own parameters, batches and noise. Small agents, which keep a device waiting, are so trained faster;
    the device holds the episodes once, and parameters and activations of every seed.

    Called again after an interruption, it goes on from the newest checkpoints: seeds at the same step go on
    together; those behind are first brought to where the others are. The same seeds so end with the same bits on the
    CPU wherever all were interrupted at the same step; trained with others or alone, equal but for rounding.

    Args:
      configs: They differ in seed and run only, and no two agree in either.
      report_progress: Told of every step, or of every call of many steps, once its metrics are known to be finite.
      announce: Told what each training begins with.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If the store does not exist.
      ValueError: If configurations, store and run folders do not fit together.
      FloatingPointError: If loss, gradient or parameters of a seed stop being finite; it names the seed. Those of the
        others stay at their newest checkpoints.
      OutOfMemoryError: If a step does not fit the device.
    """
    _check(configs)
    trainer = train_td if configs[0].agent in TD_AGENTS else train_chains
    return trainer(configs, report_progress, announce=announce, command=command)


def _check(configs: Sequence[TrainConfig]) -> None:
    if not configs:
        raise ValueError("Training needs a configuration at least; got none. Name a seed.")
    first = flat(dataclasses.asdict(configs[0]))
    for config in configs[1:]:
        other = flat(dataclasses.asdict(config))
        for name in first.keys() - {"seed", "run"}:
            if first[name] != other[name]:
                raise ValueError(
                    f"Seeds that are trained at once differ in seed and run alone; got {name} {first[name]!r} and "
                    f"{other[name]!r}. Train them one after another."
                )
    folders = [Path(config.run).absolute() for config in configs]
    for name, values in (("seed", [config.seed for config in configs]), ("run", folders)):
        value, count = collections.Counter(values).most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"Each seed is trained once, in a run folder of its own; got {name} {value} {count} times. "
                "Name each once."
            )
    if len(configs) > 1 and "wandb" in configs[0].logger:
        raise ValueError(
            "Weights & Biases takes one run of a process; got logger wandb with several seeds at once. Leave it out, "
            "or train them one after another."
        )
