"""Runs the demo on several seeds, holds it to its bar, and writes what it measured.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --runs runs/demo_seeds --out results

Takes six to eight minutes a seed on two CPU cores; a seed whose report lies there already is only read. The bar: in
every seed, the Agentic Transformer's mean return over the last episodes of its chains is above twice the
uniform-random policy's and above the mean return of its training data. Writes demo_seeds.json and demo_seeds.md;
exits with 1 if a seed misses the bar.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bpt_rl.run import protocols
from bpt_rl.run.records import RunFolder, log_from_json, write_atomically, write_json

AGENTS = {
    "AT, 4 trajectories": "cells/at_*_n4_seed{seed}-*",
    "AT, 2 trajectories": "cells/at_*_n2_seed{seed}-*",
    "AT, 1 trajectory": "cells/at_*_n1_seed{seed}-*",
    "DT": "dt",
    "BC-10%": "bc",
}


def run_seed(seed: int, folder: Path) -> float | None:
    """Runs the demo of one seed unless its report is there; returns the seconds it took."""
    if (folder / "report.html").is_file():
        return None
    command = [sys.executable, "-m", "bpt_rl", "demo", "--seed", str(seed), "--out", str(folder)]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def run_folder(folder: Path, pattern: str, seed: int) -> RunFolder:
    """Returns the one run of a demo whose folder is named like this."""
    [path] = folder.glob(pattern.format(seed=seed))
    return RunFolder(path)


def read_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Returns the numbers of one seed, each a mean over chains with its 95% interval."""
    rows: dict[str, Any] = {}
    for title, name in AGENTS.items():
        record = run_folder(folder, name, seed).evaluations()[-1]
        logs = {context: log_from_json(log) for context, log in record["logs"].items()}
        rows[title] = {
            "first": estimate("first", logs["chain"]),
            "last": estimate("last", logs["chain"]),
            "mean": estimate("mean", logs["chain"]),
        }
        if "memoryless" in logs:
            rows[title]["last, memoryless control"] = estimate("last", logs["memoryless"])
        if title == "AT, 4 trajectories":
            rows["uniform random"] = {"mean": estimate("mean", logs["random"])}
            rows["data"] = {"mean": {"value": record["data"]["mean_return"]}}
            sample = {"chains": record["num_chains"], "episodes a chain": record["num_episodes"]}
    last = rows["AT, 4 trajectories"]["last"]["value"]
    bar = max(2 * rows["uniform random"]["mean"]["value"], rows["data"]["mean"]["value"])
    trained = run_folder(folder, AGENTS["AT, 4 trajectories"], seed).versions()
    del trained["command"]  # the one above repeats it
    return {
        "seed": seed,
        "sample": sample,
        "returns": rows,
        "bar": bar,
        "meets_bar": last > bar,
        "versions": trained,
    }


def estimate(name: str, log: Any) -> dict[str, float]:
    """Returns a protocol's estimate as plain numbers."""
    found = getattr(protocols, name)(log)
    return {"value": found.value, "low": found.low, "high": found.high}


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown, one column a seed."""
    head = ["return of an episode", *(f"seed {result['seed']}" for result in results)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for title, protocol in [
        (title, protocol) for title, found in results[0]["returns"].items() for protocol in found
    ]:
        cells = [cell(result["returns"][title][protocol]) for result in results]
        lines.append("| " + " | ".join([f"{title}: {protocol}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def cell(value: dict[str, float]) -> str:
    """Returns a number with its interval, if it has one."""
    interval = f" [{value['low']:.0f}, {value['high']:.0f}]" if "low" in value else ""
    return f"{value['value']:.0f}{interval}"


def main() -> int:
    """Returns 0 if every seed meets the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        folder = options.runs / str(seed)
        seconds = run_seed(seed, folder)
        results.append(read_seed(seed, folder) | ({"seconds": round(seconds)} if seconds else {}))
    command = f"python benchmarks/demo_seeds.py --seeds {' '.join(map(str, options.seeds))}"
    write_json(options.out / "demo_seeds.json", {"command": command, "seeds": results})
    write_atomically(options.out / "demo_seeds.md", table(results))
    print(table(results))
    return 0 if all(result["meets_bar"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
