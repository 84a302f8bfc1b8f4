"""The work of a job: training and evaluating cells; the runner of `bpt-rl ablate`."""

import dataclasses
import platform
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from gymnasium.vector import VectorEnv

from bpt_rl import config_toml
from bpt_rl.config import EvaluateConfig, TrainConfig
from bpt_rl.run.evaluate import evaluate_run
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.job import Job, Report
from bpt_rl.run.records import RunFolder
from bpt_rl.run.train_seeds import train_seeds
from bpt_rl.td_config import TD_AGENTS

TRAINING_SHARE = 0.8
"""Of a job, as its progress is shown."""


def train_and_evaluate(job: Job, report: Report, *, environments: VectorEnv | None = None) -> None:
    """Trains what is not trained and evaluates what is not evaluated.

    Args:
      job: Of which some cells may be finished.
      report: Told of progress.
      environments: For the evaluations, to be used again; made for each if None.
    """
    folder, before = GridFolder(Path(job.out)), _peak_memory()
    configs = []
    for training in job.trainings:
        config = config_toml.from_mapping(TrainConfig, training["config"])
        configs.append(dataclasses.replace(config, run=str(folder.run_folder(config.run).path)))
    report(0.0, "starts")

    def told(step: int, total: int, _: Mapping[str, float]) -> None:
        report(TRAINING_SHARE * step / total, "trains")

    train_seeds(configs, told, command=job.command)
    peak = _peak_memory()
    # A process that has had a larger cell cannot tell.
    memory = peak if peak > before else None
    done = folder.finished()
    for config, training in zip(configs, job.trainings, strict=True):
        costs = _training_costs(config, len(configs)) | {"peak_memory_bytes": memory, **_place()}
        for asked in training["evaluations"]:
            if asked["address"] not in done:
                report(TRAINING_SHARE, "evaluates")
                evaluate = config_toml.from_mapping(EvaluateConfig, asked["config"])
                record = evaluate_run(
                    Path(config.run), evaluate, environments=environments, command=job.command
                )
                seconds = sum(record["timings"]["seconds"].values())
                values = {"run": Path(config.run).name, "training": training["address"], "record": record}
                folder.write_result(
                    asked["address"], values | {"costs": costs | {"evaluation_seconds": seconds}}
                )


def _training_costs(config: TrainConfig, num_together: int) -> dict[str, Any]:
    """Returns what the steps that made the parameters took; those that an interruption undid do not count."""
    metrics = RunFolder(Path(config.run)).metrics()
    is_td = config.agent in TD_AGENTS
    seconds, last = 0.0, 0.0
    for line in metrics:
        amount = line["step"] if is_td else line["tokens"]
        seconds += (amount - last) / line["updates_per_second" if is_td else "tokens_per_second"]
        last = amount
    final = metrics[-1] if metrics else {}
    return {
        "gradient_steps": final.get("step", 0),
        "tokens": None if is_td else final.get("tokens", 0.0),
        "training_seconds": seconds,
        "trained_together": num_together,
    }


def _peak_memory() -> int:
    """Returns the most bytes that this process has ever had: of the accelerator, or of the host without one."""
    statistics = None if jax.default_backend() == "cpu" else jax.local_devices()[0].memory_stats()
    if statistics:
        return int(statistics["peak_bytes_in_use"])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _place() -> dict[str, str]:
    return {"host": platform.node(), "device": jax.devices()[0].device_kind}
