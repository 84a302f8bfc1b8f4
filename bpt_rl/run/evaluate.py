"""Evaluation in DMC: chains of episodes in one context, beside the controls that give them a meaning."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from bpt_rl.agents.base import Policy
from bpt_rl.config import EvaluateConfig
from bpt_rl.envs.tasks import make_vector
from bpt_rl.envs.vector import DMCVectorEnv
from bpt_rl.run import records
from bpt_rl.run.episode_log import LogPlan, Progress, play
from bpt_rl.run.evaluated_run import EvaluatedRun
from bpt_rl.run.evaluation_journal import EvaluationJournal
from bpt_rl.run.evaluation_record import SCHEMA, data_summary, estimates
from bpt_rl.run.rollout import Start
from bpt_rl.types import EpisodeLog


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


def evaluate_run(
    path: Path,
    config: EvaluateConfig,
    *,
    environments: VectorEnv | None = None,
    command: str = "",
    report_progress: Progress | None = None,
) -> dict[str, Any]:
    """Rolls out a run's newest checkpoint and its controls, writes them into the run folder, returns the record.

    The record is one JSON object: what was rolled out, the logs by context (`chain`, `memoryless`, `random`), every
    protocol read from them, and a short log for each target of a sweep. An agent without a context of several
    episodes has no `memoryless` log: its `chain` log is one. Beside the record lies a npz file of the first chain's
    first and last episode: what `bpt_rl.envs.tasks.make` begins them with, and their actions. All but `timings` is
    the same if the evaluation is interrupted and called again: it goes on from its last finished episode.

    Args:
      path: Run folder.
      config: What to roll out.
      environments: To be used again; must fit task, action repeat and number of chains; there are then no more of them.
      command: Command line that repeats this.
      report_progress: Told of finished episodes.

    Raises:
      FileNotFoundError: If the folder is no run folder, has no checkpoint, or data for a context are missing.
      ValueError: If the agent or the data do not fit the configuration.
    """
    folder = records.RunFolder(path)
    if environments is not None:
        config = dataclasses.replace(config, max_environments=environments.num_envs)
    subject = EvaluatedRun.open(folder, config)
    target, _ = subject.target
    journal = EvaluationJournal(folder.evaluations_path, subject.journal_key())
    with _Simulated(environments, subject) as simulated:

        def logged(policy: Policy, plan: LogPlan) -> EpisodeLog:
            return journal.log(plan.context) or _play(policy, simulated, plan, report_progress, journal)

        logs = {}
        for name, policy in subject.policies().items():
            plan = subject.plan(name, target, subject.num_episodes)
            logs[name] = logged(
                policy, plan.widened(config.max_environments) if subject.forgets(name) else plan
            )
        sweep = [
            logged(subject.policy(), subject.plan(f"sweep_{i}", target * multiple, config.sweep_episodes))
            for i, multiple in enumerate(config.target_sweep)
        ]
    record = _record(subject, logs, sweep) | {"run": path.name, "command": command}
    digest = hashlib.sha256(
        json.dumps([subject.step, subject.num_episodes, repr(config)]).encode()
    ).hexdigest()[:8]
    stem = f"{subject.step:08d}_{digest}"
    journal.move_episodes(folder.evaluations_path / f"{stem}_episodes.npz")
    records.write_json(folder.evaluations_path / f"{stem}.json", record)
    journal.remove()
    return record


def _record(
    subject: EvaluatedRun, logs: Mapping[str, EpisodeLog], sweep: Sequence[EpisodeLog]
) -> dict[str, Any]:
    config, statistics, (target, rule) = subject.config, subject.statistics, subject.target
    return {
        "schema": SCHEMA,
        "agent": subject.trained.agent,
        "step": subject.step,
        "task": statistics.task,
        "num_episodes": subject.num_episodes,
        "num_chains": config.num_chains,
        "num_trajectories": subject.trained.data.num_trajectories,
        "action_repeat": statistics.action_repeat,
        "target_return": target,
        "target_rule": rule,
        "context": {
            "num_trajectories": config.num_context_trajectories,
            "order": config.context_order,
            "capacity": subject.capacity,
            "overflow": config.full_context,
        },
        "train_seed": subject.trained.seed,
        "environment_seed": subject.seed,
        "actions": "mean" if subject.sample_seed is None else "sampled",
        "data": data_summary(statistics, subject.trained),
        "logs": {name: records.log_to_json(log) for name, log in logs.items()},
        "sweep": [
            {
                "target_return": log.target_return,
                "target_multiple": multiple,
                "log": records.log_to_json(log),
                "estimates": estimates(log),
            }
            for multiple, log in zip(config.target_sweep, sweep, strict=True)
        ],
        "estimates": {name: estimates(log) for name, log in logs.items()},
        "versions": records.versions(),
        "timings": {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": {log.context: log.seconds for log in [*logs.values(), *sweep]},
        },
    }


class _Simulated(contextlib.ExitStack):
    """The environments of an evaluation: those given, or some of its own, of each number that is needed."""

    def __init__(self, given: VectorEnv | None, subject: EvaluatedRun) -> None:
        super().__init__()
        if given is not None and not isinstance(given, DMCVectorEnv):
            raise ValueError(
                f"A run must be evaluated in environments of make_vector; got {type(given).__name__}. Pass none, or "
                "call bpt_rl.run.evaluate.evaluate."
            )
        self._given, self._subject = given, subject
        self._made: dict[int, VectorEnv] = {}

    def of(self, num_environments: int) -> VectorEnv:
        """Returns so many environments."""
        if self._given is not None:
            return self._given
        if num_environments not in self._made:
            subject, statistics = self._subject, self._subject.statistics
            made = make_vector(
                statistics.task,
                num_environments,
                subject.seed,
                statistics.action_repeat,
                subject.config.num_workers,
            )
            self._made[num_environments] = self.enter_context(contextlib.closing(made))
        return self._made[num_environments]


def _play(
    policy: Policy,
    simulated: "_Simulated",
    plan: LogPlan,
    report_progress: Progress | None,
    journal: EvaluationJournal,
) -> EpisodeLog:
    environments = simulated.of(plan.num_environments)
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
