"""Relabelling by formulas against dm_control: states a second of one core, and the largest error for every task.

    python benchmarks/relabel.py --out results/relabel.json

takes about a minute. Speeds are medians over runs in which the ways of relabelling take turns, in seconds of this
thread's processor time, so that other load on the machine meets all alike and waiting does not count:

  formulas       `rewards.relabel`: physical features, then the formula
  features       the first part alone
  stored         `rewards.reward_from_features`: the formula alone, over a block of 100 episodes, as for a built store
  simulator      `rewards.relabel_by_simulation`: set state and control, one forward pass, the task's own reward
  ExoRL's loop   the same with the simulator reset for each state, as ExoRL's code relabels

Errors are against the rewards that fresh environments paid, over every named task of the domain: in episodes of
uniform-random actions, and in wild states (fallen, folded beyond the joints' limits, fast, near the goals), which are
those of the tests.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bpt_rl.envs import features, rewards, tasks

RECORDERS = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tests" / "envs" / "conftest.py"))
NUM_SLOW_STATES = 200
NUM_STORED_EPISODES = 100
NUM_FAST_EPISODES = 10
"""Relabelled one after another, as a store is built: the first finds its code in no cache."""
WAYS = ("formulas", "features", "stored", "simulator", "ExoRL's loop")


def relabel_as_exorl(environment: tasks.Environment, physics: np.ndarray, action: np.ndarray) -> np.ndarray:
    simulator = environment.physics
    low, high = simulator.model.actuator_ctrlrange.T
    reward = np.zeros(len(physics), np.float32)
    for t in range(1, len(physics)):
        with simulator.reset_context():
            simulator.set_state(physics[t])
            simulator.set_control(low + (high - low) / 2 * (action[t].astype(np.float64) + 1))
        reward[t] = environment.reward()
    return reward


def seconds_per_state(ways: dict[str, tuple[Callable[[], Any], int]], num_runs: int) -> dict[str, float]:
    """Returns the median of each way, from its function and the number of states that it relabels."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(num_runs + 1):
        for name, (function, num_states) in ways.items():
            began = time.thread_time()
            function()
            if run:  # The first run compiles models.
                seconds[name].append((time.thread_time() - began) / num_states)
    return {name: statistics.median(values) for name, values in seconds.items()}


def speeds(domain: str, num_runs: int) -> dict[str, float]:
    """Returns states a second of each way, for whole episodes of the domain's first task."""
    task = tasks.tasks_of(domain)[0]
    num_states = tasks.DOMAINS[domain].episode_steps
    recorded = RECORDERS["record"](task, num_steps=num_states)
    physics, action = recorded.physics, recorded.action
    slow = slice(0, NUM_SLOW_STATES + 1)
    environment = tasks.make(task, seed=0)
    environment.reset()
    measured, observation, block_action = (
        np.repeat(values[None], NUM_STORED_EPISODES, axis=0)
        for values in (features.physical_features(domain, physics), recorded.observation, action)
    )
    seconds = seconds_per_state(
        {
            "formulas": (
                lambda: [rewards.relabel(task, physics, action) for _ in range(NUM_FAST_EPISODES)],
                num_states * NUM_FAST_EPISODES,
            ),
            "features": (
                lambda: [features.physical_features(domain, physics) for _ in range(NUM_FAST_EPISODES)],
                num_states * NUM_FAST_EPISODES,
            ),
            "stored": (
                lambda: rewards.reward_from_features(task, measured, observation, block_action),
                num_states * NUM_STORED_EPISODES,
            ),
            "simulator": (
                lambda: rewards.relabel_by_simulation(task, physics[slow], action[slow]),
                NUM_SLOW_STATES,
            ),
            "ExoRL's loop": (
                lambda: relabel_as_exorl(environment, physics[slow], action[slow]),
                NUM_SLOW_STATES,
            ),
        },
        num_runs,
    )
    environment.close()
    return {name: 1 / value for name, value in seconds.items()}


def largest_error(domain: str, recorder: str, num_states: int) -> float:
    errors = []
    for task in tasks.tasks_of(domain):
        recorded = RECORDERS[recorder](task, num_states, 1)
        relabelled = rewards.relabel(task, recorded.physics, recorded.action, recorded.observation)
        errors.append(np.abs(relabelled - recorded.reward).max())
    return float(max(errors))


def measure(domain: str, num_runs: int, num_states: int) -> dict[str, Any]:
    speed = speeds(domain, num_runs)
    return {
        "states_per_second": {name: round(value) for name, value in speed.items()},
        "times_simulator": round(speed["formulas"] / speed["simulator"], 1),
        "times_exorl_loop": round(speed["formulas"] / speed["ExoRL's loop"], 1),
        "tasks": list(tasks.tasks_of(domain)),
        "largest_error": {
            "random": largest_error(domain, "record", min(num_states, tasks.DOMAINS[domain].episode_steps)),
            "wild": largest_error(domain, "record_wild", num_states),
        },
    }


def table_of(rows: dict[str, Any]) -> Table:
    table = Table(title="Relabelling, states a second of one core")
    table.add_column("domain")
    headings: Sequence[str] = (*WAYS, "x simulator", "x ExoRL", "error, random", "error, wild")
    for heading in headings:
        table.add_column(heading, justify="right")
    for domain, row in rows.items():
        table.add_row(
            domain,
            *(f"{row['states_per_second'][way]:,}" for way in WAYS),
            f"{row['times_simulator']:.0f}",
            f"{row['times_exorl_loop']:.0f}",
            *(f"{row['largest_error'][kind]:.0e}" for kind in ("random", "wild")),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="runs that medians are taken over")
    parser.add_argument("--states", type=int, default=500, help="states a task that errors are taken over")
    parser.add_argument("--domains", nargs="+", default=list(tasks.DOMAINS), choices=list(tasks.DOMAINS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = {domain: measure(domain, options.runs, options.states) for domain in options.domains}
    Console(width=140).print(table_of(rows))
    if options.out:
        packages = {name: importlib.metadata.version(name) for name in ("mujoco", "dm_control", "numpy")}
        record = {
            "command": f"python benchmarks/relabel.py --runs {options.runs} --states {options.states}",
            "python": platform.python_version(),
            "versions": packages,
            "load_average_before": round(load, 2),
            "cores": os.cpu_count(),
            "domains": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
