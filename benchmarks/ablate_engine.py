"""Times what a grid costs beside its cells: 1,000 of them that train nothing, then the finished grid again.

    python benchmarks/ablate_engine.py --out results/ablate_engine.json

Runs `bpt_rl.run.ablate` in a fresh process each time, cells in the local launcher's processes, so that every import,
every lock and every file is paid for; only training and evaluation are left out (`benchmarks/stub_cells.py`).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bpt_rl import config_toml
from bpt_rl.ablate_config import GridConfig
from bpt_rl.collect_config import CollectConfig
from bpt_rl.config import BuildConfig, DataConfig, TrainConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.run.collect import collect
from bpt_rl.run.records import versions, write_json

RUN = """
import sys
from pathlib import Path
from bpt_rl import config_toml
from bpt_rl.ablate_config import GridConfig
from bpt_rl.run.ablate import ablate
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.launcher_local import LocalLauncher, Slot
config = config_toml.load(GridConfig, sys.argv[1])
logs = GridFolder(Path(config.out)).logs_path
places = [Slot(environment={})] * int(sys.argv[2])
result = ablate(config, lambda jobs: LocalLauncher(places, logs, "stub_cells:play"))
assert not result.failures and len(result.cells) == int(sys.argv[3])
"""


def make_store(folder: Path) -> Path:
    """Returns a store of a few real episodes."""
    collection = CollectConfig(
        task="cartpole_balance", num_steps=6000, action_repeat=20, out=str(folder), num_workers=1
    )
    build = BuildConfig(
        source=(str(collect(collection)),),
        out=str(folder / "store.h5"),
        tasks=("cartpole_balance",),
        action_repeat=20,
        num_workers=1,
    )
    return build_store(build)


def run(grid: Path, workers: int, num_cells: int) -> float:
    """Returns the seconds of one call, the start of Python included."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent), "JAX_PLATFORMS": "cpu"}
    began = time.perf_counter()
    command = [sys.executable, "-c", RUN, str(grid), str(workers), str(num_cells)]
    subprocess.run(command, check=True, env=environment)
    return time.perf_counter() - began


def main() -> int:
    """Returns 0 if both bars are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/ablate_engine.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(
            store=str(make_store(Path(folder))), task="cartpole_balance", num_trajectories=1, batch_size=2
        )
        axes = {
            "train.data.num_trajectories": (1, 2),
            "train.data.draw": ("uniform", "return_stratified"),
            "train.seed": tuple(range(options.cells // 4)),
        }
        config = GridConfig(out=f"{folder}/grid", axes=axes, train=TrainConfig(data=data))
        grid = Path(folder) / "grid.toml"
        grid.write_text(config_toml.to_toml(config))
        num_cells = options.cells // 4 * 4
        first = run(grid, options.workers, num_cells)
        again = min(run(grid, options.workers, num_cells) for _ in range(3))
    values = {
        "command": f"python benchmarks/ablate_engine.py --cells {options.cells} --workers {options.workers}",
        "num_cells": num_cells,
        "seconds": round(first, 2),
        "milliseconds_a_cell": round(1000 * first / num_cells, 2),
        "seconds_of_the_finished_grid": round(again, 2),
        "bars": {"milliseconds_a_cell": 50, "seconds_of_the_finished_grid": 2},
        "versions": versions(),
    }
    write_json(options.out, values)
    print({name: value for name, value in values.items() if name != "versions"})
    return int(values["milliseconds_a_cell"] >= 50 or values["seconds_of_the_finished_grid"] >= 2)


if __name__ == "__main__":
    sys.exit(main())
