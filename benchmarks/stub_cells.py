"""Runners of cells that train nothing: what is left of a grid's time is the engine's own.

`play` finishes each cell with made-up returns, drawn from its task, seed and number of trajectories, after
$STUB_SECONDS; each cell that it plays is a line of $STUB_LOG. The others die or fail as their names say.
"""

import functools
import os
import signal
import time
import zlib
from pathlib import Path

import numpy as np

from bpt_rl.datasets.store import Store
from bpt_rl.run import records
from bpt_rl.run.evaluation_record import SCHEMA, estimates
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.job import Job, Report
from bpt_rl.types import EpisodeLog


def play(job: Job, report: Report) -> None:
    """Finishes the cells, also those that are finished: who runs a job twice is found out."""
    folder = GridFolder(Path(job.out))
    for training in job.trainings:
        for asked in training["evaluations"]:
            report(0.5, "plays")
            if path := os.environ.get("STUB_LOG"):
                with Path(path).open("a") as file:
                    file.write(f"{asked['address']} {os.getpid()}\n")
            time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
            record = made_up(training["config"], asked)
            values = {"run": training["config"]["run"], "training": training["address"], "record": record}
            folder.write_result(asked["address"], values | {"costs": COSTS})


COSTS = {
    "gradient_steps": 6,
    "tokens": 1200.0,
    "training_seconds": 1.5,
    "trained_together": 1,
    "evaluation_seconds": 0.5,
    "peak_memory_bytes": 2**30,
    "device": "none",
    "host": "none",
}


@functools.cache
def digest_of(path: str) -> str:
    """Returns what a store is known by."""
    with Store.open(path) as store:
        return store.digest


def made_up(config: dict, asked: dict) -> dict:
    """Returns an evaluation record of returns that grow with the trajectories in context, less so if shuffled."""
    count = asked["config"]["num_episodes"] or config["data"]["num_trajectories"]
    drawn_from = f"{config['data']['task']} {count} {config['seed']}"
    generator = np.random.default_rng(zlib.crc32(drawn_from.encode()))
    logs = {}
    learnt = 10.0 if config["data"]["order"] == "ascending" else 4.0
    for context, gain in (("chain", learnt), ("memoryless", 0.0), ("random", 0.0)):
        if context == "memoryless" and count == 1:
            continue
        level = 20.0 if context == "random" else 40.0
        returns = level + gain * np.arange(count) + generator.normal(size=(4, count))
        logs[context] = EpisodeLog(
            task=config["data"]["task"],
            context=context,
            returns=returns,
            num_steps=np.full((4, count), 50),
            action_repeat=20,
            target_return=float("nan") if context == "random" else 100.0,
            seed=1_000_000,
            failures=(),
        )
    return {
        "schema": SCHEMA,
        "agent": config["agent"],
        "step": 6,
        "task": config["data"]["task"],
        "num_episodes": count,
        "num_chains": 4,
        "num_trajectories": config["data"]["num_trajectories"],
        "action_repeat": 20,
        "target_return": 100.0,
        "target_rule": "largest return in the data",
        "context": {"num_trajectories": 0, "order": "none", "capacity": count, "overflow": "refuse"},
        "train_seed": config["seed"],
        "environment_seed": 1_000_000,
        "actions": "mean",
        "data": {
            "source": "made up",
            "subset": "full",
            "subset_digest": "5" * 64,
            "digest": digest_of(config["data"]["store"]),
            "mean_return": 30.0,
            "largest_return": 100.0,
            "num_episodes": 6,
            "top_fraction": 1.0,
        },
        "logs": {name: records.log_to_json(log) for name, log in logs.items()},
        "sweep": [],
        "estimates": {name: estimates(log) for name, log in logs.items()},
        "versions": {"packages": {"jax": "0.11.2"}, "python": "3.11.7", "git_commit": "abc123"},
        "timings": {"created": "2026-01-01T00:00:00+00:00", "seconds": dict.fromkeys(logs, 0.5)},
        "run": config["run"],
        "command": "bpt-rl ablate made-up",
    }


def die_once(job: Job, report: Report) -> None:
    """Plays, but a process that meets a cell of seed 1 for the first time is killed by then."""
    mark = Path(job.out) / f"died_{job.trainings[0]['address']}"
    if job.trainings[0]["config"]["seed"] == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    play(job, report)


def die(job: Job, report: Report) -> None:
    """Plays, but cells of seed 1 kill whoever runs them."""
    if any(training["config"]["seed"] == 1 for training in job.trainings):
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    play(job, report)


def fail(job: Job, report: Report) -> None:
    """Plays, but cells of seed 1 raise."""
    if any(training["config"]["seed"] == 1 for training in job.trainings):
        raise FloatingPointError("seed 1 never ends well")
    play(job, report)
