"""What an evaluation leaves behind: one JSON object, and the lines that it is read out as."""

from collections.abc import Mapping
from typing import Any

from bpt_rl.config import TrainConfig
from bpt_rl.run import protocols
from bpt_rl.types import DataStatistics, EpisodeLog

SCHEMA = 2


def estimates(log: EpisodeLog) -> dict[str, Any]:
    """Returns every protocol's number with its interval, null where there is none, and the curve."""
    read = {name: getattr(protocols, name)(log) for name in protocols.PROTOCOLS}
    values: dict[str, Any] = {
        name: {
            "value": e.value,
            "low": e.low if e.has_interval else None,
            "high": e.high if e.has_interval else None,
        }
        for name, e in read.items()
    }
    values["curve"] = [e.value for e in protocols.curve(log)]
    return values


def data_summary(statistics: DataStatistics, trained: TrainConfig) -> dict[str, Any]:
    """Returns what a report says of the training data."""
    return {
        "source": statistics.source,
        "subset": statistics.subset,
        "subset_digest": statistics.subset_digest,
        "digest": statistics.digest,
        "mean_return": statistics.mean_return,
        "largest_return": statistics.largest_return,
        "num_episodes": statistics.num_episodes,
        "top_fraction": trained.data.top_fraction,
    }


def describe_record(record: Mapping[str, Any]) -> str:
    """Returns the numbers of an evaluation record as lines of text, each with its protocol and interval."""
    lines = [_heading(record)]
    for context, values in record["estimates"].items():
        numbers = [f"{name} {_with_interval(values[name])}" for name in ("first", "last", "mean", "max")]
        failures = record["logs"][context]["failures"]
        ended = f"  ({len(failures)} episodes ended by the simulator)" if failures else ""
        lines.append(f"  {context:<11}" + "  ".join(numbers) + ended)
    for asked in record["sweep"]:
        obtained = _with_interval(asked["estimates"]["mean"])
        lines.append(f"  asked for {asked['target_return']:.1f}: mean {obtained}")
    data = record["data"]
    lines.append(
        f"  data ({data['source']}, subset {data['subset']} {data['subset_digest'][:8]}, "
        f"{data['num_episodes']} episodes): "
        f"mean {data['mean_return']:.1f}, best {data['largest_return']:.1f}"
    )
    return "\n".join(lines)


def _heading(record: Mapping[str, Any]) -> str:
    context = record["context"]
    given = (
        f", each context begun with {context['num_trajectories']} trajectories of the data ({context['order']})"
        if context["num_trajectories"]
        else ""
    )
    is_asked = record["logs"]["chain"]["target_return"] is not None
    target = f"target {record['target_return']:.1f} ({record['target_rule']}); " if is_asked else ""
    return (
        f"{record['agent']} on {record['task']}, step {record['step']}, one training seed ({record['train_seed']}); "
        f"{record['num_chains']} chains of {record['num_episodes']} episodes{given}; {target}"
        "raw returns, 95% intervals over chains:"
    )


def _with_interval(estimate: Mapping[str, float | None]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.1f} [one chain, no interval]"
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]"
