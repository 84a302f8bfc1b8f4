"""Prints what one setting of a grid changes, each of its values against a first one, paired by seed; runs nothing.

python benchmarks/differences.py results/trajectory_count/table.csv train.data.num_trajectories 1
python benchmarks/differences.py results/trajectory_count/table.csv train.data.order ascending

Reads a `table.csv` that `bpt-rl ablate` wrote. Each combination of settings is compared with that of the same task and
the first value that is most like it, if it has the same seeds: a control of four trajectories with one trajectory, too.
Student's 95% intervals over seeds, none corrected for how many there are.
"""

import argparse
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from bpt_rl.run import statistics

SEED = "train.seed"
Values = Mapping[tuple[str, str], Mapping[str, float]]
"""By what was rolled out and the protocol: a value a seed."""


def read(path: Path) -> tuple[list[str], dict[tuple[str, ...], dict[tuple[str, str], dict[str, float]]]]:
    """Returns the names of the settings but the seed, the task the first, and what each combination of them brought."""
    with path.open() as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        settings = ["task", *(name for name in columns[: columns.index("agent")] if name != SEED)]
        found: dict[tuple[str, ...], dict[tuple[str, str], dict[str, float]]] = {}
        for row in reader:
            if row["protocol"] != "episode":
                values = found.setdefault(tuple(row[name] for name in settings), {})
                values.setdefault((row["rolled_out"], row["protocol"]), {})[row[SEED]] = float(row["value"])
    return settings, found


def numbers(values: Values) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yields what is compared of a setting, by name."""
    chain = {name: values["chain", name] for name in ("first", "last", "mean", "improvement")}
    yield from chain.items()
    if rises := values.get(("memoryless", "improvement")):
        # The control has the same start states: they can be harder at first than at last.
        yield "... beyond control's", {seed: chain["improvement"][seed] - rises[seed] for seed in rises}
    # Of chains of one episode the memoryless control is the chain itself.
    memoryless = values.get(("memoryless", "mean"), chain["mean"])
    yield "memoryless mean", memoryless
    yield "context adds", {seed: chain["mean"][seed] - memoryless[seed] for seed in memoryless}
    if null := values.get(("memoryless", "null_max")):
        yield "max less null max", {seed: values["chain", "max"][seed] - null[seed] for seed in null}


def interval(values: Mapping[str, float]) -> str:
    """Returns mean and interval over seeds; the values themselves of fewer than three."""
    if len(values) < 3:
        return ", ".join(f"{value:.0f}" for value in values.values())
    array = np.array(list(values.values()))
    low, high = statistics.t_interval(statistics.moment(array))
    return f"{array.mean():.0f} [{low:.0f}, {high:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("setting", help="a column of the table, like train.data.num_trajectories")
    parser.add_argument("first", help="its value that the others are compared with")
    arguments = parser.parse_args()
    settings, found = read(arguments.table)
    if arguments.setting not in settings:
        parser.error(f"a table has the settings {', '.join(settings)}; got {arguments.setting}")
    place = settings.index(arguments.setting)

    def most_like(key: tuple[str, ...]) -> Values:
        firsts = [k for k in found if k[place] == arguments.first and k[0] == key[0]]
        same = [sum(a == b for a, b in zip(k, key, strict=True)) for k in firsts]
        return found[firsts[same.index(max(same))]] if firsts else {}

    for key, values in found.items():
        print(" ".join(key))
        first = most_like(key) if key[place] != arguments.first else {}
        base = dict(numbers(first)) if first else {}
        for name, each in numbers(values):
            less = ""
            if name in base and base[name].keys() == each.keys():
                difference = {seed: value - base[name][seed] for seed, value in each.items()}
                less = f"less {arguments.first}: {interval(difference)}"
            print(f"  {name:21}{interval(each):22}{less}".rstrip())


if __name__ == "__main__":
    main()
