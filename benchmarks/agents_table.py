"""Writes the table of all agents on the same data, from the finished cells that lie in a folder; runs none.

    python benchmarks/agents_table.py --cells results/agents/cells --out results/agents

Writes table.md for people and table.csv with every number. Needs neither the data nor an accelerator: a cell's file has
the returns of its episodes. Whatever is not there yet is said to be missing.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpt_rl.run import protocols, records, statistics
from bpt_rl.types import EpisodeLog

NOTE = """\
A million steps (1,024 episodes) of `rnd` data of each domain. A number is the interquartile mean over the seeds (of
three, their mean) of each one's mean over 16 chains; brackets hold Student's 95% interval over seeds, parentheses the
seeds. `first, last, mean, max`: episodes of a context that is kept. `memoryless`: the same checkpoint, its context
cleared before each episode. `null max`: the largest of as many such episodes as a chain has, by luck alone. Agents with
one episode in context are read by their mean. All tasks: interquartile mean over seeds and tasks, where no cell is
missing; 0 is the random policy's mean and 1 the data's best episode; its interval is a bootstrap over seeds.
Differences are paired by seed, of the mean where no protocol is named, and only where no seed is missing; Student's 95%
intervals, none of them corrected for how many there are.
"""
TASKS = ("walker_stand", "walker_walk", "walker_run", "cheetah_run", "cartpole_swingup")
SEEDS = (0, 1, 2)
DASH = "–"  # noqa: RUF001


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agent:
    """Which cells a row of the table is of."""

    title: str
    name: str
    top_fraction: float = 1.0
    num_trajectories: int = 0
    """Of a chain; 0 for agents that have none."""

    def is_of(self, record: Mapping[str, Any]) -> bool:
        own = record["agent"] == self.name and record["data"]["top_fraction"] == self.top_fraction
        return own and self.num_trajectories in (0, record["num_trajectories"])

    @property
    def readings(self) -> Sequence[tuple[str, str, str]]:
        """What is rolled out, the protocol, and both in words."""
        if self.num_trajectories < 2:
            return (("chain", "mean", "mean"),)
        kept = [("chain", name, name) for name in ("first", "last", "mean", "max")]
        return (*kept, ("memoryless", "mean", "memoryless: mean"), ("memoryless", "null max", "null max"))


AGENTS = (
    Agent(title="BC", name="bc"),
    Agent(title="BC-10%", name="bc", top_fraction=0.1),
    Agent(title="DT", name="dt"),
    Agent(title="TD3+BC", name="td3_bc"),
    Agent(title="IQL", name="iql"),
    Agent(title="TD3", name="td3"),
    Agent(title="AT, n = 1", name="at", num_trajectories=1),
    Agent(title="AT, n = 4", name="at", num_trajectories=4),
    Agent(title="AT, n = 16", name="at", num_trajectories=16),
)


Reading = tuple[str, str, str]
"""An agent's title, what is rolled out, and the protocol."""


def _kept(agent: str, protocol: str = "mean") -> Reading:
    return agent, "chain", protocol


def _within(agent: str) -> dict[str, tuple[Reading, Reading]]:
    cleared: Reading = (agent, "memoryless", "mean")
    return {
        f"{agent}: last less first": (_kept(agent, "last"), _kept(agent, "first")),
        "... of its memoryless control": ((agent, "memoryless", "last"), (agent, "memoryless", "first")),
        f"{agent}: mean less memoryless mean": (_kept(agent), cleared),
        f"{agent}: max less null max": (_kept(agent, "max"), (agent, "memoryless", "null max")),
    }


DIFFERENCES: Sequence[tuple[str, Reading, Reading]] = (
    *(
        (f"{ours} less {theirs}", _kept(ours), _kept(theirs))
        for ours, theirs in (
            ("BC-10%", "BC"),
            ("DT", "BC"),
            ("TD3+BC", "BC"),
            ("IQL", "BC"),
            ("TD3", "BC"),
            ("AT, n = 1", "BC"),
            ("AT, n = 1", "BC-10%"),
            ("AT, n = 4", "AT, n = 1"),
            ("AT, n = 16", "AT, n = 1"),
            ("AT, n = 16", "AT, n = 4"),
            ("AT, n = 4", "BC"),
            ("AT, n = 16", "BC"),
        )
    ),
    ("AT, n = 16, last less AT, n = 1", _kept("AT, n = 16", "last"), _kept("AT, n = 1")),
    *((title, *pair) for agent in ("AT, n = 4", "AT, n = 16") for title, pair in _within(agent).items()),
)
"""Of the mean where no protocol is named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
    """What the seeds of one agent came to on one task."""

    by_seed: Mapping[int, float]
    """Each seed's mean over its chains."""

    @property
    def middle(self) -> float:
        """The interquartile mean over the seeds; of three, their mean."""
        return float(statistics.interquartile_mean(self._scores))

    @property
    def interval(self) -> statistics.Interval:
        """Student's over the seeds; none of one."""
        return statistics.t_interval(statistics.moment(self._scores[:, 0]))

    @property
    def resampled(self) -> statistics.Interval:
        """The bootstrap interval of the interquartile mean: of three seeds too short."""
        return statistics.stratified_interval(statistics.interquartile_mean, self._scores)

    @property
    def _scores(self) -> np.ndarray:
        return np.array([[value] for _, value in sorted(self.by_seed.items())])


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Returns the evaluation records of a folder's cells."""
    return [json.loads(path.read_text())["record"] for path in sorted(folder.glob("*.json"))]


def cells_of(agent: Agent, task: str, cells: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Returns an agent's records on a task by seed.

    Raises:
      ValueError: If two cells have the same seed, or cells differ in data, steps or episodes.
    """
    own = [record for record in cells if record["task"] == task and agent.is_of(record)]
    found = {record["train_seed"]: record for record in own}
    kinds = {
        (r["data"]["digest"], r["step"], r["num_episodes"], r["num_chains"], r["target_rule"]) for r in own
    }
    if len(found) < len(own) or len(kinds) > 1:
        raise ValueError(
            f"Cells of one agent and task must differ in their seed alone; got {len(own)} of {agent.title} on {task} "
            f"with {len(found)} seeds and {len(kinds)} settings. Leave out those of another grid."
        )
    return dict(sorted(found.items()))


def read(record: Mapping[str, Any], rolled_out: str, protocol: str) -> float:
    """Returns a protocol's mean over the chains of a cell."""
    log: EpisodeLog = records.log_from_json(record["logs"][rolled_out])
    if protocol == "null max":
        return float(protocols.null_max(log, record["num_episodes"]))
    return float(protocols.per_chain(protocol, log).mean())


def number(own: Mapping[int, Mapping[str, Any]], rolled_out: str, protocol: str) -> Number | None:
    """Returns a number of the cells of an agent on a task; None without any."""
    return Number(by_seed={s: read(r, rolled_out, protocol) for s, r in own.items()}) if own else None


def references(task: str, cells: Sequence[Mapping[str, Any]]) -> statistics.References:
    """Returns the returns of random actions and of the data's best episode.

    The random policy is the one whose log holds the most episodes.
    """
    own = [record for record in cells if record["task"] == task]
    data = {(r["data"]["digest"], r["data"]["mean_return"], r["data"]["largest_return"]) for r in own}
    if len(data) != 1:
        raise ValueError(f"Agents must be compared on the same data; got {len(data)} kinds of {task}.")
    logs = [records.log_from_json(r["logs"]["random"]) for r in own if "random" in r["logs"]]
    longest = max(logs, key=lambda log: log.returns.size)
    return statistics.References(
        zero=float(protocols.mean(longest)),
        zero_name="random policy's mean",
        one=own[0]["data"]["largest_return"],
        one_name="data's best episode",
    )


def over_tasks(
    numbers: Sequence[Number | None], scales: Sequence[statistics.References]
) -> tuple[float, statistics.Interval] | None:
    """Returns the interquartile mean over seeds and tasks, on the scale of the tasks; None if a cell is missing."""
    whole = [n for n in numbers if n is not None and set(n.by_seed) == set(SEEDS)]
    if len(whole) < len(scales):
        return None
    raw = np.array([[n.by_seed[seed] for n in whole] for seed in SEEDS])
    scores = statistics.NormalizedScores(raw=raw, references=scales).scores
    middle = float(statistics.interquartile_mean(scores))
    return middle, statistics.stratified_interval(statistics.interquartile_mean, scores)


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table as Markdown."""
    scales = [references(task, cells) for task in TASKS]
    lines = [row(["", *TASKS, "all tasks"]), row(["---"] * (len(TASKS) + 2))]
    means = [next(r for r in cells if r["task"] == task)["data"]["mean_return"] for task in TASKS]
    for title, values in (
        ("data: mean", means),
        ("data: best", [scale.one for scale in scales]),
        ("random: mean", [scale.zero for scale in scales]),
    ):
        lines.append(row([title, *(f"{value:.0f}" for value in values), ""]))
    for agent in AGENTS:
        own = [cells_of(agent, task, cells) for task in TASKS]
        for rolled_out, protocol, words in agent.readings:
            numbers = [number(some, rolled_out, protocol) for some in own]
            middle = over_tasks(numbers, scales)
            lines.append(row([f"{agent.title}: {words}", *map(cell_text, numbers), normalised_text(middle)]))
    return "\n".join(lines) + "\n"


def difference(ours: Number | None, theirs: Number | None) -> Number | None:
    """Returns a difference of each seed; None unless both have all seeds."""
    if ours is None or theirs is None or not set(ours.by_seed) == set(theirs.by_seed) == set(SEEDS):
        return None
    return Number(by_seed={seed: ours.by_seed[seed] - theirs.by_seed[seed] for seed in SEEDS})


def difference_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Returns the differences as Markdown."""
    by_title = {agent.title: agent for agent in AGENTS}
    lines = [row(["difference", *TASKS]), row(["---"] * (len(TASKS) + 1))]
    for title, *readings in DIFFERENCES:
        found = []
        for task in TASKS:
            ours, theirs = (
                number(cells_of(by_title[name], task, cells), rolled_out, protocol)
                for name, rolled_out, protocol in readings
            )
            found.append(difference(ours, theirs))
        lines.append(row([title, *map(difference_text, found)]))
    return "\n".join(lines) + "\n"


def difference_text(found: Number | None) -> str:
    if found is None:
        return DASH
    low, high = found.interval
    return f"{found.middle:+.0f} [{low:+.0f}, {high:+.0f}]"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell_text(found: Number | None) -> str:
    """Returns a number, its interval and below it each seed's; which seeds, if some are missing."""
    if found is None:
        return "missing"
    low, high = found.interval
    bounds = "" if math.isnan(low) else f" [{low:.0f}, {high:.0f}]"
    seeds = ", ".join(f"{value:.0f}" for value in found.by_seed.values())
    partly = "" if set(found.by_seed) == set(SEEDS) else f"; {len(found.by_seed)} of {len(SEEDS)} seeds"
    return f"{found.middle:.0f}{bounds}<br>({seeds}{partly})"


def normalised_text(found: tuple[float, statistics.Interval] | None) -> str:
    return DASH if found is None else f"{found[0]:.2f} [{found[1][0]:.2f}, {found[1][1]:.2f}]"


def rows(cells: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields every number of the table."""
    for task in TASKS:
        for agent in AGENTS:
            own = cells_of(agent, task, cells)
            for rolled_out, protocol, _ in agent.readings if own else ():
                found = number(own, rolled_out, protocol)
                assert found is not None
                some = next(iter(own.values()))
                yield {
                    "task": task,
                    "agent": agent.title,
                    "rolled_out": rolled_out,
                    "protocol": protocol,
                    "num_seeds": len(found.by_seed),
                    "interquartile_mean": found.middle,
                    **bounds("t", found.interval),
                    **bounds("bootstrap", found.resampled),
                    **{f"seed_{seed}": found.by_seed.get(seed) for seed in SEEDS},
                    "num_chains": some["num_chains"],
                    "num_episodes": some["num_episodes"],
                    "step": some["step"],
                    "target_return": some["target_return"] if agent.name in ("at", "dt") else None,
                    "data_mean": some["data"]["mean_return"],
                    "data_best": some["data"]["largest_return"],
                    "random_mean": references(task, cells).zero,
                    "subset": some["data"]["subset"],
                    "digest": some["data"]["digest"],
                }


def bounds(name: str, interval: statistics.Interval) -> dict[str, float | None]:
    return {
        f"{name}_{end}": None if math.isnan(v) else v
        for end, v in zip(("low", "high"), interval, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=Path, default=Path("results/agents/cells"))
    parser.add_argument("--out", type=Path, default=Path("results/agents"))
    options = parser.parse_args()
    cells = read_cells(options.cells)
    found = list(rows(cells))
    head = "Command: `python benchmarks/agents_table.py`. Raw returns of an episode, undiscounted, action repeat 1.\n"
    records.write_atomically(
        options.out / "table.md", f"{head}\n{table(cells)}\n{difference_table(cells)}\n{NOTE}"
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    records.write_atomically(options.out / "table.csv", text.getvalue())
    print(f"{table(cells)}\n{difference_table(cells)}")


if __name__ == "__main__":
    main()
