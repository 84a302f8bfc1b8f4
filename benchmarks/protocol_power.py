"""Plants policies whose truth is known and asks the intervals of the protocols about them.

    python benchmarks/protocol_power.py --studies 2000 --out results

Takes about five minutes on one CPU core. A study is what one evaluation would log: chains of 8 episodes, of one or
more training seeds. Writes protocol_power.json and protocol_power.md; exits with 1 if `improvement` or `slope` of a
policy that never improves is covered in fewer than 93 of 100 studies. 2,000 studies err by 1% (two standard errors).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bpt_rl.run import protocols, records, statistics
from bpt_rl.types import EpisodeLog

NUM_EPISODES = 8
CHAINS = (8, 16, 32)
SEEDS = (1, 3, 5)
GAINS = ("improvement", "slope")
BAR = 0.93
SHAPES = {
    "normal": lambda g, size: g.normal(300, 60, size),
    "mostly poor, sometimes good": lambda g, size: mixture(g, size, 0.15),
    "two kinds": lambda g, size: mixture(g, size, 0.5),
    "long tail": lambda g, size: g.lognormal(3, 1, size),
    "one of 12 succeeds": lambda g, size: (g.random(size) < 1 / 12).astype(float),
}
EFFECTS = {
    "independent episodes": (0.0, 0.0, 0.0),
    "chains differ": (1.0, 0.5, 0.0),
    "seeds improve or worsen by chance": (1.0, 0.0, 0.5),
}
"""Standard deviations, in those of an episode: of a chain's level, of the logarithm of its spread, and of a seed's
own improvement about zero."""

OF_START = 0.2
"""Share of the variance that start states decide, where they do: two seeds' episodes from equal ones correlate so, as
those of walker_run do with n = 16 (0.18 to 0.31, `results/trajectory_count/cells`)."""


def mixture(generator: np.random.Generator, size: tuple[int, ...], share: float) -> np.ndarray:
    """Returns of about 500 in a share of the episodes, of about 30 in the others."""
    poor, good = generator.gamma(2, 15, size), generator.normal(500, 60, size)
    return np.where(generator.random(size) < share, good, poor)


def spread(shape: str) -> float:
    """Returns the standard deviation of an episode's return."""
    return float(SHAPES[shape](np.random.default_rng(0), (400_000,)).std())


def make_log(returns: np.ndarray) -> EpisodeLog:
    """Returns a log of these returns."""
    return EpisodeLog(
        returns=returns,
        num_steps=np.full(returns.shape, 1000, np.int64),
        context="chain",
        task="walker_run",
        action_repeat=1,
        target_return=0.0,
        seed=0,
        seconds=0.0,
    )


def studies(
    shape: str, size: tuple[int, int, int], *, effect: str = "independent episodes", gain: float = 0.0
) -> Iterator[list[EpisodeLog]]:
    """Yields the logs of each study, one a seed; `size` is studies, seeds, chains and `gain` is in deviations."""
    generator = np.random.default_rng([*shape.encode(), *effect.encode(), *size, int(1000 * gain)])
    deviation = spread(shape)
    of_level, of_scale, of_seeds = EFFECTS[effect]
    for _ in range(size[0]):
        level = of_level * generator.normal(size=(size[1], size[2], 1))
        scale = np.exp(of_scale * generator.normal(size=(size[1], size[2], 1)))
        own = gain + of_seeds * generator.normal(size=(size[1], 1, 1))
        returns = scale * SHAPES[shape](generator, (size[1], size[2], NUM_EPISODES))
        returns = returns + deviation * (level + own * np.linspace(0, 1, NUM_EPISODES))
        yield [make_log(log) for log in returns]


def coverage(num_studies: int) -> list[dict[str, Any]]:
    """Returns how often zero is covered where nothing improves."""
    rows = []
    for effect in EFFECTS:
        for shape in SHAPES:
            for num_seeds in SEEDS:
                if EFFECTS[effect][2] and num_seeds == 1:
                    continue  # One seed's interval speaks of that checkpoint, which did improve or worsen.
                for num_chains in CHAINS:
                    size = (num_studies, num_seeds, num_chains)
                    rows.append(
                        {"effect": effect, "shape": shape, "seeds": num_seeds, "chains": num_chains}
                        | shares_covered(studies(shape, size, effect=effect), GAINS)
                    )
    return rows


def start_states(num_studies: int) -> list[dict[str, Any]]:
    """Returns how often zero is covered where nothing improves and a start state decides a part of a return.

    Seeds either share the start states of their chains or have their own.
    """
    rows = []
    for is_shared in (True, False):
        for num_seeds in SEEDS[1:]:
            for num_chains in (4, *CHAINS):
                found = started_studies((num_studies, num_seeds, num_chains), is_shared=is_shared)
                effect = "start states shared" if is_shared else "start states of each seed"
                rows.append(
                    {"effect": effect, "seeds": num_seeds, "chains": num_chains}
                    | shares_covered(found, GAINS)
                )
    return rows


def started_studies(size: tuple[int, int, int], *, is_shared: bool) -> Iterator[list[EpisodeLog]]:
    """Yields the logs of each study like `studies`, of normal returns in part decided by start states."""
    num_studies, num_seeds, num_chains = size
    generator = np.random.default_rng([is_shared, num_seeds, num_chains])
    for _ in range(num_studies):
        start = generator.normal(size=(1 if is_shared else num_seeds, num_chains, NUM_EPISODES))
        noise = generator.normal(size=(num_seeds, num_chains, NUM_EPISODES))
        yield [make_log(log) for log in np.sqrt(OF_START) * start + np.sqrt(1 - OF_START) * noise]


def shares_covered(
    found: Iterable[Sequence[EpisodeLog]], names: Sequence[str], truth: float = 0.0
) -> dict[str, float]:
    """Returns the share of studies whose interval holds the truth, by protocol."""
    covered = [[covers(protocols.estimate(name, logs), truth) for name in names] for logs in found]
    return dict(zip(names, np.mean(covered, axis=0).tolist(), strict=True))


def covers(found: protocols.Estimate, truth: float) -> bool:
    """Whether the truth lies in the interval, up to rounding."""
    return found.low - 1e-9 <= truth <= found.high + 1e-9


def percentile_coverage(num_studies: int) -> list[dict[str, Any]]:
    """Returns the same for a percentile bootstrap of seeds, then chains: what these intervals replaced."""
    rows = []
    generator = np.random.default_rng(1)
    cases = [
        (effect, shape, size) for effect in EFFECTS for shape in SHAPES for size in ((1, 8), (3, 8), (3, 32))
    ]
    for effect, shape, (seeds, chains) in cases:
        if EFFECTS[effect][2] and seeds == 1:
            continue
        covered = 0
        for logs in studies(shape, (num_studies, seeds, chains), effect=effect):
            gains = np.stack([protocols.per_chain("improvement", log) for log in logs])
            seed = generator.integers(seeds, size=(1000, seeds, 1))
            chain = generator.integers(chains, size=(1000, seeds, chains))
            low, high = np.percentile(gains[seed, chain].mean(axis=(1, 2)), [2.5, 97.5])
            covered += bool(low <= 0 <= high)
        rows.append(
            {"effect": effect, "shape": shape, "seeds": seeds, "chains": chains}
            | {"improvement": covered / num_studies}
        )
    return rows


def power(num_studies: int) -> list[dict[str, Any]]:
    """Returns how often a policy that improves is found to, by its gain in deviations of an episode's return."""
    rows = []
    for shape in ("normal", "mostly poor, sometimes good"):
        for num_seeds in SEEDS:
            for num_chains in CHAINS:
                for gain in (0.25, 0.5, 1.0, 2.0):
                    found = {"improvement": 0, "slope": 0}
                    for logs in studies(shape, (num_studies, num_seeds, num_chains), gain=gain):
                        for name in found:
                            found[name] += protocols.estimate(name, logs).low > 0
                    rows.append(
                        {"shape": shape, "seeds": num_seeds, "chains": num_chains, "gain": gain}
                        | {name: number / num_studies for name, number in found.items()}
                    )
    return rows


def luck(num_studies: int) -> list[dict[str, Any]]:
    """Returns how the largest of n rises where nothing improves, and how often it is taken for more than luck."""
    rows = []
    for shape, draw in SHAPES.items():
        for num_chains in CHAINS:
            for num_episodes in (1, 4, 16, 32):
                generator = np.random.default_rng([*shape.encode(), num_chains, num_episodes])
                largest, above, below = 0.0, 0, 0
                for _ in range(num_studies):
                    ours, control = (make_log(draw(generator, (num_chains, num_episodes))) for _ in range(2))
                    margin = protocols.beyond_luck([ours], [control])
                    largest += protocols.max(ours).value / num_studies
                    above, below = above + (margin.low > 1e-9), below + (margin.high < -1e-9)
                rows.append(
                    {"shape": shape, "chains": num_chains, "episodes": num_episodes, "max": largest}
                    | {"found above luck": above / num_studies, "found below luck": below / num_studies}
                )
    return rows


def levels(num_studies: int) -> list[dict[str, Any]]:
    """Returns how often the true mean return is covered: not promised, since returns may be skewed."""
    rows = []
    for shape, draw in SHAPES.items():
        truth = float(draw(np.random.default_rng(2), (4_000_000,)).mean())
        for num_seeds in SEEDS:
            for num_chains in CHAINS:
                found = studies(shape, (num_studies, num_seeds, num_chains))
                rows.append(
                    {"shape": shape, "seeds": num_seeds, "chains": num_chains}
                    | shares_covered(found, ("last", "mean"), truth)
                )
    return rows


def aggregates(num_studies: int) -> list[dict[str, Any]]:
    """Returns how often the truth is covered by the statistics over seeds and tasks, scores being normal."""
    rows = []
    generator = np.random.default_rng(3)
    for num_seeds in (3, 5, 10):
        for num_tasks in (1, 6):
            covered = {"interquartile mean": 0, "probability of improvement": 0}
            for _ in range(num_studies):
                ours, theirs = generator.normal(size=(2, num_seeds, num_tasks))
                ours = ours + 1
                low, high = statistics.stratified_interval(statistics.interquartile_mean, ours)
                covered["interquartile mean"] += low <= 1 <= high
                low, high = statistics.probability_of_improvement(ours, theirs)[1]
                covered["probability of improvement"] += low <= 0.76025 <= high
            rows.append(
                {"seeds": num_seeds, "tasks": num_tasks}
                | {name: number / num_studies for name, number in covered.items()}
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as Markdown: one row a kind of policy, one column a size of the study."""
    sizes = ("seeds", "chains", "episodes", "tasks")
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        size = ", ".join(f"{name} {row[name]}" for name in sizes if name in row)
        kind = ", ".join(cell(name, v) for name, v in row.items() if name in ("effect", "shape", "gain"))
        shown = [cell(name, v) for name, v in row.items() if name not in (*sizes, "effect", "shape", "gain")]
        lines.setdefault(kind, {})[size] = " / ".join(shown)
    columns = list(dict.fromkeys(size for line in lines.values() for size in line))
    read = " / ".join(name for name in rows[0] if name not in (*sizes, "effect", "shape", "gain"))
    head = [read, *columns]
    body = [[kind, *(line.get(size, "") for size in columns)] for kind, line in lines.items()]
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body)) + "\n"


def cell(name: str, value: float | str) -> str:
    """Returns a share in per cent, other numbers as they are."""
    if isinstance(value, float):
        if name == "gain":
            return f"gain {value:g}"
        return f"{value:.3g}" if name == "max" else f"{100 * value:.1f}%"
    return str(value)


def main() -> int:
    """Returns 0 if the intervals hold what `protocols` promises."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    number = options.studies
    found = {
        "Zero is covered where nothing improves": coverage(number),
        f"Zero is covered where start states decide {OF_START:.0%} of the variance": start_states(number),
        "The same by a percentile bootstrap": percentile_coverage(number // 2),
        "An improvement is found": power(number),
        "The largest of n where nothing improves": luck(number),
        "The true mean return is covered": levels(number),
        "Truth is covered by statistics over seeds and tasks": aggregates(number // 2),
    }
    planted = found["Zero is covered where nothing improves"]
    worst = min(min(row["improvement"], row["slope"]) for row in planted)
    command = f"python benchmarks/protocol_power.py --studies {number}"
    lines = [
        f"Command: `{command}`. Chains of {NUM_EPISODES} episodes; smallest coverage {100 * worst:.1f}%.\n"
    ]
    lines += [f"## {title}\n\n{table(rows)}" for title, rows in found.items()]
    values = {"command": command, "studies": number, "smallest coverage": worst, **found}
    records.write_json(options.out / "protocol_power.json", values | {"versions": records.versions()})
    records.write_atomically(options.out / "protocol_power.md", "\n".join(lines))
    print(f"smallest coverage {100 * worst:.1f}%, bar {100 * BAR:.0f}%")
    return 0 if worst >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
