"""Kills a grid of real cells ten times at random, then a node of a Ray cluster under it: is the table the same?

    python benchmarks/ablate_kills.py --out results/ablate_kills.json

Collects a few cartpole episodes and trains four small Agentic Transformers (1 and 2 trajectories, two seeds). Once
undisturbed; once with SIGKILL ten times, each time of `bpt-rl ablate` or of one of its processes, and the same command
again; once through Ray on two nodes of one machine, one of which is killed in the middle of a cell. The three tables
must agree to the byte. Some minutes on two cores; the Ray part needs the extra `ray`.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bpt_rl import config_toml
from bpt_rl.ablate_config import GridConfig
from bpt_rl.collect_config import CollectConfig
from bpt_rl.config import BuildConfig, DataConfig, EvaluateConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.run.ablate import ablate
from bpt_rl.run.collect import collect
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.records import versions, write_json

TASK = "cartpole_swingup"


def grid_of(folder: Path) -> GridConfig:
    """Returns the grid, after recording its data."""
    collection = CollectConfig(
        task="cartpole_balance", num_steps=6000, action_repeat=20, out=str(folder), num_workers=1
    )
    build = BuildConfig(
        source=(str(collect(collection)),),
        out=str(folder / "store.h5"),
        tasks=(TASK,),
        action_repeat=20,
        num_workers=1,
    )
    model = ModelConfig(layout="fused", embed_dim=32, num_layers=2, activations="keep")
    train = TrainConfig(
        checkpoint_every=20,
        data=DataConfig(store=str(build_store(build)), task=TASK, batch_size=4),
        model=model,
        optimizer=OptimizerConfig(num_steps=200, warmup_steps=10, learning_rate=1e-3),
    )
    axes = {"train.data.num_trajectories": (1, 2), "train.seed": (0, 1)}
    evaluate = EvaluateConfig(num_chains=4, num_workers=1)
    return GridConfig(name="grid", axes=axes, train=train, evaluate=evaluate)


def table(out: Path, config: GridConfig) -> bytes:
    """Returns the table of a grid that was run into a folder."""
    return GridFolder(out, config.name).table_path.read_bytes()


def command(grid: Path, out: Path) -> list[str]:
    """Returns the command line of a grid in a folder of its own."""
    return [sys.executable, "-m", "bpt_rl", "ablate", str(grid), "--out", str(out)]


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.is_file() else []


def killed(
    grid: Path, out: Path, num_kills: int, generator: random.Random, *, longest: float
) -> list[dict[str, Any]]:
    """Returns what was killed when, at most `longest` seconds after it began, when the grid has ended at last."""
    kills: list[dict[str, Any]] = []
    while True:
        process = subprocess.Popen(command(grid, out), start_new_session=True)
        while len(kills) < num_kills and process.poll() is None:
            seconds = generator.uniform(2, longest)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                workers = children(process.pid)
                is_worker = bool(workers) and generator.random() < 0.5
                os.kill(workers[0] if is_worker else process.pid, signal.SIGKILL)
                done = len(GridFolder(out).finished())
                kills.append(
                    {
                        "after": round(seconds, 2),
                        "killed": "worker" if is_worker else "ablate",
                        "finished": done,
                    }
                )
                print(kills[-1], flush=True)
                if not is_worker:
                    process.wait()
        # A grid that ended before its kills were spent is begun again, in a folder that is emptied.
        if process.wait() == 0:
            if len(kills) >= num_kills:
                return kills
            for path in (out / "results").glob("*.json"):
                path.unlink()


def on_ray(config: GridConfig) -> dict[str, Any]:
    """Runs a grid on two nodes, one of which dies in the middle of a cell; returns what happened."""
    from bpt_rl.run.launcher_ray import RayLauncher, Request

    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    found: dict[str, Any] = {}

    def kill() -> None:
        # Both nodes are at a cell once there are two run folders with a line of metrics and no result yet.
        cells = Path(config.out) / "cells"
        while len(list(cells.glob("*/metrics.jsonl"))) < 2:
            time.sleep(0.1)
        time.sleep(1)
        found.update(finished=len(GridFolder(Path(config.out)).finished()), begun=len(list(cells.iterdir())))
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    launchers: list[RayLauncher] = []

    def make_launcher(jobs: Sequence[Any]) -> RayLauncher:
        launchers.append(RayLauncher(cluster.address, Request(num_cpus=1)))
        return launchers[0]

    try:
        result = ablate(config, make_launcher)
    finally:
        killer.join()
        cluster.shutdown()
    return found | {"nodes": 2, "failed": len(result.failures)}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns seconds and result."""
    began = time.perf_counter()
    result = function()
    return round(time.perf_counter() - began, 1), result


def main() -> int:
    """Returns 0 if every table is the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/ablate_kills.json"))
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = grid_of(folder)
        grid = folder / "grid.toml"
        grid.write_text(config_toml.to_toml(config))
        whole, _ = timed(lambda: subprocess.run(command(grid, folder / "whole"), check=True))
        expected = table(folder / "whole", config)
        generator = random.Random(options.seed)
        # Time enough to finish a cell now and then.
        longest = max(20.0, 0.4 * whole)
        seconds, kills = timed(
            lambda: killed(grid, folder / "killed", options.kills, generator, longest=longest)
        )
        values: dict[str, Any] = {
            "command": f"python benchmarks/ablate_kills.py --kills {options.kills} --seed {options.seed}",
            "rows": len(expected.splitlines()) - 1,
            "undisturbed": {"seconds": whole},
            "killed": {
                "seconds": seconds,
                "kills": kills,
                "same_table": table(folder / "killed", config) == expected,
            },
        }
        if not options.no_ray:
            out = folder / "ray"
            seconds, found = timed(lambda: on_ray(GridConfig(**{**vars(config), "out": str(out)})))
            same = table(out, config) == expected
            values["ray_node_killed"] = {"seconds": seconds, **found, "same_table": same}
    write_json(options.out, values | {"versions": versions()})
    print(values)
    parts = [values["killed"], values.get("ray_node_killed", {"same_table": True})]
    return 0 if all(part["same_table"] for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
