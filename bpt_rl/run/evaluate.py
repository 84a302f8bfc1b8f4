"""Evaluation in DMC: chains of episodes in one context, beside the controls that give them a meaning."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gymnasium.vector import VectorEnv

from bpt_rl.agents.base import Agent, Params, Policy
from bpt_rl.agents.random import RandomPolicy
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import EvaluateConfig, TrainConfig
from bpt_rl.datasets.minari_source import UNSIMULATED
from bpt_rl.envs.tasks import make_vector
from bpt_rl.envs.vector import DMCVectorEnv
from bpt_rl.run import protocols, records
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.episode_log import LogPlan, Progress, play
from bpt_rl.run.evaluation_journal import EvaluationJournal
from bpt_rl.run.render import render_episode
from bpt_rl.run.rollout import Start
from bpt_rl.run.step import init_state, make_optimizer
from bpt_rl.types import DataStatistics, EpisodeLog

SCHEMA = 2


def evaluate(
    policy: Policy,
    task: str,
    num_episodes: int,
    num_chains: int,
    *,
    seed: int = 0,
    target_return: float = math.nan,
    action_repeat: int = 1,
    context: str = "chain",
    environments: VectorEnv | None = None,
    report_progress: Progress | None = None,
) -> EpisodeLog:
    """Returns the log of `num_chains` chains of `num_episodes` episodes, rolled out in parallel.

    Args:
      policy: Its context must hold `num_episodes` episodes.
      task: Like "walker_run".
      num_episodes: Episodes played one after another in one context (n).
      num_chains: Chains, each in an environment of its own.
      seed: Of the environments; the same seed gives every policy the same first start states.
      target_return: Asked of each episode; NaN for a policy that asks for none.
      action_repeat: Control steps an action is held for, as in training.
      context: What the log is to be called: `chain`, `memoryless` or `random`.
      environments: Made by `make_vector` with `num_chains` environments, to be used again; made here if None.
      report_progress: Told of every finished episode of the first chain.

    Raises:
      ValueError: If a number is not positive or the task is unknown.
    """
    if num_episodes < 1 or num_chains < 1:
        raise ValueError(
            f"num_episodes and num_chains must be positive; got {num_episodes} and {num_chains}. Use at least 1."
        )
    plan = LogPlan(
        task=task,
        num_episodes=num_episodes,
        num_chains=num_chains,
        action_repeat=action_repeat,
        context=context,
        start=Start(seed=seed, target_return=target_return, num_episodes=num_episodes),
    )
    with contextlib.ExitStack() as stack:
        if environments is None:
            environments = stack.enter_context(
                contextlib.closing(make_vector(task, num_chains, seed, action_repeat))
            )
        return play(policy, environments, plan, report_progress=report_progress)[0]


def check_simulated(source: str) -> None:
    """Checks that a store's source is not a Minari dataset whose task has no simulator here.

    Raises:
      ValueError: If it is one.
    """
    if source.startswith(UNSIMULATED):
        raise ValueError(
            "A run can be evaluated only where its task can be simulated; there is no simulator for the Minari "
            f"dataset {source.removeprefix(UNSIMULATED)}. Give `bpt_rl.run.evaluate.evaluate` environments of yours."
        )


def load_params(folder: records.RunFolder) -> tuple[Agent, Params, int]:
    """Returns the agent of a run, its newest parameters and their gradient step.

    Raises:
      FileNotFoundError: If the folder is no run folder or holds no complete checkpoint.
      ValueError: If the checkpoint belongs to another architecture than the folder's configuration.
    """
    config = folder.config()
    agent = make_agent(config, folder.statistics())
    optimizer = make_optimizer(config.optimizer)
    template = jax.eval_shape(lambda: init_state(agent, optimizer, config.seed))
    with Checkpoints(folder.checkpoints_path, config.keep_checkpoints) as saved:
        if saved.latest_step is None:
            raise FileNotFoundError(
                f"A run must have a complete checkpoint to be evaluated; {folder.path} has none. "
                "Run the same `bpt-rl train` command again: it goes on from where it was."
            )
        state = saved.restore(saved.latest_step, template)
        return agent, state.params, saved.latest_step


def target_of(config: EvaluateConfig, statistics: DataStatistics) -> tuple[float, str]:
    """Returns the target return and the rule it came from, in words."""
    if config.target == "largest":
        base, rule = statistics.largest_return, "largest return in the data"
    else:
        base = float(np.quantile(statistics.returns, config.target_quantile))
        rule = f"{config.target_quantile} quantile of the data's returns"
    suffix = "" if config.target_multiple == 1 else f", times {config.target_multiple}"
    return base * config.target_multiple, rule + suffix


def sample_seed_of(config: EvaluateConfig, trained: TrainConfig) -> int | None:
    """Returns the seed of drawn actions; None where the mean is taken."""
    return config.seed if config.sample and trained.model.action_distribution == "gaussian" else None


def num_episodes_of(config: EvaluateConfig, trained: TrainConfig) -> int:
    """Returns the episodes of a chain: as asked; else for `at` those of training, for the others 4."""
    return config.num_episodes or (trained.data.num_trajectories if trained.agent == "at" else 4)


def evaluate_run(
    path: Path,
    config: EvaluateConfig,
    *,
    environments: VectorEnv | None = None,
    command: str = "",
    report_progress: Progress | None = None,
) -> dict[str, Any]:
    """Rolls out a run's newest checkpoint and its controls, writes them into the run folder, returns the record.

    The record is one JSON object: what was rolled out, the logs by context (`chain`, `memoryless`, `random`) and
    every protocol read from them. An agent without a context of several episodes has no `memoryless` log: its
    `chain` log is one. Beside the record lies a npz file of the first chain's first and last episode: what
    `bpt_rl.envs.tasks.make` begins them with, and their actions. All but `timings` is the same if the evaluation is
    interrupted and called again: it goes on from its last finished episode.

    Args:
      path: Run folder.
      config: What to roll out.
      environments: To be used again; must fit task, action repeat and number of chains.
      command: Command line that repeats this.
      report_progress: Told of finished episodes.
    """
    folder = records.RunFolder(path)
    trained, statistics = folder.config(), folder.statistics()
    check_simulated(statistics.source)
    agent, params, step = load_params(folder)
    num_episodes = num_episodes_of(config, trained)
    target, rule = target_of(config, statistics)
    sample_seed = sample_seed_of(config, trained)
    policies = {"chain": agent.policy(params, num_episodes=num_episodes, sample_seed=sample_seed)}
    if config.memoryless and trained.agent == "at" and num_episodes > 1:
        policies["memoryless"] = agent.policy(
            params, num_episodes=num_episodes, clear_context=True, sample_seed=sample_seed
        )
    if config.random:
        policies["random"] = RandomPolicy(statistics.action_dim, config.seed)

    def plan_of(context: str) -> LogPlan:
        is_asked = context != "random" and trained.agent != "bc"
        target_return = target if is_asked else math.nan
        return LogPlan(
            task=statistics.task,
            num_episodes=num_episodes,
            num_chains=config.num_chains,
            action_repeat=statistics.action_repeat,
            context=context,
            start=Start(seed=config.seed, target_return=target_return, num_episodes=num_episodes),
            # What draws its actions draws for all chains at once.
            num_parts=1 if context == "random" or sample_seed is not None else min(2, config.num_chains),
        )

    key = _journal_key(config, trained, statistics, num_episodes=num_episodes, params=params)
    journal = EvaluationJournal(folder.evaluations_path, key)
    logs = {}
    with _environments(environments, statistics, config) as simulated:
        for context, policy in policies.items():
            logs[context] = journal.log(context) or _play(
                policy, simulated, plan_of(context), report_progress, journal
            )
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "agent": trained.agent,
        "run": path.name,
        "step": step,
        "task": statistics.task,
        "num_episodes": num_episodes,
        "num_chains": config.num_chains,
        "num_trajectories": trained.data.num_trajectories,
        "action_repeat": statistics.action_repeat,
        "target_return": target,
        "target_rule": rule,
        "context": {"num_trajectories": 0, "order": "none", "overflow": "refuse"},
        "train_seed": trained.seed,
        "environment_seed": config.seed,
        "actions": "mean" if sample_seed is None else "sampled",
        "data": _data_summary(statistics, trained),
        "logs": {context: records.log_to_json(log) for context, log in logs.items()},
        "sweep": [],
        "estimates": {context: _estimates(log) for context, log in logs.items()},
        "versions": records.versions(),
        "command": command,
        "timings": {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": {context: log.seconds for context, log in logs.items()},
        },
    }
    digest = hashlib.sha256(json.dumps([record["step"], num_episodes, repr(config)]).encode()).hexdigest()[:8]
    stem = f"{step:08d}_{digest}"
    journal.move_episodes(folder.evaluations_path / f"{stem}_episodes.npz")
    records.write_json(folder.evaluations_path / f"{stem}.json", record)
    journal.remove()
    return record


@contextlib.contextmanager
def _environments(
    given: VectorEnv | None, statistics: DataStatistics, config: EvaluateConfig
) -> Iterator[VectorEnv]:
    """Yields the environments given, or makes some once they are needed."""
    if given is not None:
        if not isinstance(given, DMCVectorEnv):
            raise ValueError(
                f"A run must be evaluated in environments of make_vector; got {type(given).__name__}. Pass none, or "
                "call bpt_rl.run.evaluate.evaluate."
            )
        yield given
        return
    made = make_vector(
        statistics.task, config.num_chains, config.seed, statistics.action_repeat, config.num_workers
    )
    with contextlib.closing(made):
        yield made


def _play(
    policy: Policy,
    environments: VectorEnv,
    plan: LogPlan,
    report_progress: Progress | None,
    journal: EvaluationJournal,
) -> EpisodeLog:
    log, (first, last) = play(policy, environments, plan, report_progress=report_progress, journal=journal)
    if plan.context == "chain":
        journal.keep_episodes(
            task=plan.task,
            action_repeat=plan.action_repeat,
            chain=0,
            target_return=plan.start.target_return,
            **{f"first_{name}": value for name, value in vars(first).items()},
            **{f"last_{name}": value for name, value in vars(last).items()},
        )
    journal.finish(plan.context, log)
    return log


def _journal_key(
    config: EvaluateConfig,
    trained: TrainConfig,
    statistics: DataStatistics,
    *,
    num_episodes: int,
    params: Params,
) -> dict[str, Any]:
    """Returns all that the numbers of an evaluation depend on; in how many processes it runs does not count."""
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        weights.update(np.asarray(leaf).tobytes())
    return {
        "parameters": weights.hexdigest(),
        "evaluate": repr(dataclasses.replace(config, num_workers=0)),
        "train": repr(trained),
        "num_episodes": num_episodes,
        "data": [statistics.task, statistics.action_repeat, statistics.digest, statistics.subset_digest],
        "versions": records.versions(),
        "device": jax.devices()[0].device_kind,
        "schema": SCHEMA,
    }


def describe_record(record: Mapping[str, Any]) -> str:
    """Returns the numbers of an evaluation record as lines of text, each with its protocol and interval."""
    data = record["data"]
    lines = [
        f"{record['agent']} on {record['task']}, step {record['step']}, one training seed ({record['train_seed']}); "
        f"{record['num_chains']} chains of {record['num_episodes']} episodes; target {record['target_return']:.1f} "
        f"({record['target_rule']}); raw returns, 95% intervals over chains:"
    ]
    for context, estimates in record["estimates"].items():
        values = [f"{name} {_with_interval(estimates[name])}" for name in ("first", "last", "mean", "max")]
        failures = record["logs"][context]["failures"]
        ended = f"  ({len(failures)} episodes ended by the simulator)" if failures else ""
        lines.append(f"  {context:<11}" + "  ".join(values) + ended)
    lines.append(
        f"  data ({data['source']}, subset {data['subset']} {data['subset_digest'][:8]}, "
        f"{data['num_episodes']} episodes): "
        f"mean {data['mean_return']:.1f}, best {data['largest_return']:.1f}"
    )
    return "\n".join(lines)


def _with_interval(estimate: Mapping[str, float | None]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.1f} [one chain, no interval]"
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]"


def _data_summary(statistics: DataStatistics, trained: TrainConfig) -> dict[str, Any]:
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


def _estimates(log: EpisodeLog) -> dict[str, Any]:
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


def render_run(path: Path, config: EvaluateConfig) -> str:
    """Renders one episode of a run's newest checkpoint beside its evaluations; returns what came of it."""
    folder = records.RunFolder(path)
    statistics = folder.statistics()
    agent, params, step = load_params(folder)
    target, _ = target_of(config, statistics)
    sentence = render_episode(
        agent.policy(params, sample_seed=sample_seed_of(config, folder.config())),
        statistics.task,
        seed=config.seed,
        action_repeat=statistics.action_repeat,
        return_to_go=target,
        path=folder.evaluations_path / f"{step:08d}.gif",
    )
    records.write_atomically(folder.evaluations_path / "rendering.txt", sentence + "\n")
    return sentence
