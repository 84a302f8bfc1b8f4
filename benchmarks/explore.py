"""Collecting with an explorer against its floors: environment steps alone, updates alone, and both together.

    python benchmarks/explore.py --out explore.json
    python benchmarks/explore.py --task cartpole_swingup --exploration.num-environments 20 \
        --exploration.hidden-dim 64 --exploration.batch-size 64

takes the options of `bpt-rl data collect` (walker and rnd unless told otherwise, always two rounds of episodes; `--out`
names a JSON file). "Environments alone" is a round of uniform actions by the same processes, episodes written. "Updates
alone" are those of a round, one compiled call after the other, with no environments. "Together" is the last round of a
collection, which compiles nothing: it can be no faster than the slower of the two, and the last line is the share of
that which it reaches. On a CPU both share the cores, and the share says little.
"""

import dataclasses
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from bpt_rl.agents.registry import make_explorer
from bpt_rl.collect_config import CollectConfig
from bpt_rl.datasets import exorl
from bpt_rl.envs import processes, tasks
from bpt_rl.envs.recording import RecordingPlan, recording
from bpt_rl.run.collect import collect
from bpt_rl.run.exploration_step import ExplorationStep


def environments_alone(config: CollectConfig, folder: Path) -> float:
    """Returns environment steps a second."""
    num_environments = config.exploration.num_environments
    plan = RecordingPlan(
        task=config.task,
        num_environments=num_environments,
        seed=config.seed,
        skill_dim=0,
        folder=folder,
        write=exorl.write_episode,
    )
    action_dim = tasks.DOMAINS[tasks.domain_of(config.task)].action_dim
    shape = (plan.episode_steps, num_environments, action_dim)
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    with recording(plan, config.num_workers) as environments:
        start = time.perf_counter()
        environments.begin(0)
        for action in actions:
            environments.send(action, np.zeros((num_environments, 0), np.float32))
            environments.receive()
        environments.save()
        return actions[..., 0].size / (time.perf_counter() - start)


def updates_alone(config: CollectConfig) -> float:
    """Returns gradient steps a second."""
    exploration, domain = config.exploration, tasks.DOMAINS[tasks.domain_of(config.task)]
    sizes = (domain.observation_dim, domain.action_dim, domain.episode_steps)
    explorer = make_explorer(config.algorithm, exploration, *sizes[:2])
    step = ExplorationStep(exploration, explorer, sizes=sizes, seed=config.seed)
    state, replay = step.init(), step.init_replay()
    replay = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), replay)
    replay = replay._replace(num_rows=np.int32(domain.episode_steps))
    calls = max(1, domain.episode_steps // exploration.update_every)
    state, _ = jax.block_until_ready(step.learn(state, replay, np.int32(0)))
    start = time.perf_counter()
    for number in range(calls):
        state, _ = step.learn(state, replay, np.int32(number))
    jax.block_until_ready(state)
    return calls * exploration.updates_at_once / (time.perf_counter() - start)


def together(config: CollectConfig, folder: Path) -> dict[str, Any]:
    """Returns the metrics of the last round of a collection."""
    buffer = collect(dataclasses.replace(config, out=str(folder)))
    return json.loads((buffer.parent / "metrics.jsonl").read_text().splitlines()[-1])


def main(config: CollectConfig) -> None:
    exploration = config.exploration
    episode_steps = tasks.DOMAINS[tasks.domain_of(config.task)].episode_steps
    config = dataclasses.replace(config, num_steps=2 * exploration.num_environments * episode_steps)
    with tempfile.TemporaryDirectory() as folder:
        environments = environments_alone(config, Path(folder) / "alone")
        updates = updates_alone(config)
        last = together(config, Path(folder))
    floor = min(environments, updates * exploration.steps_per_update)
    record = {
        "device": jax.devices()[0].device_kind,
        "processes": processes.num_processes(config.num_workers, exploration.num_environments),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "config": dataclasses.asdict(config),
        "environments_alone_steps_per_second": environments,
        "updates_alone_per_second": updates,
        "together_steps_per_second": last["steps_per_second"],
        "together_updates_per_second": last["updates_per_second"],
        "share_of_the_floor": last["steps_per_second"] / floor,
    }
    print(json.dumps(record, indent=1))
    if config.out.endswith(".json"):
        Path(config.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(CollectConfig, default=CollectConfig(task="walker_stand", algorithm="rnd")))
