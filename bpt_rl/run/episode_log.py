"""Rollouts of a fixed number of episodes, counted into a log."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from jaxtyping import Float, Int

from bpt_rl.agents.base import Policy
from bpt_rl.envs import tasks
from bpt_rl.envs.episodes import start_seed
from bpt_rl.run.evaluation_journal import EvaluationJournal, JournalWriter
from bpt_rl.run.rollout import OtherActionsError, Start, Transition, rollout
from bpt_rl.types import EpisodeFailure, EpisodeLog

Progress = Callable[[str, int, int], None]
"""Called with what is rolled out, episodes done and episodes in all."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogPlan:
    """What a log is to hold: chains of episodes, each chain in an environment of its own or in several."""

    task: str
    num_episodes: int
    num_chains: int
    action_repeat: int
    context: str
    """What the log is to be called: `chain`, `memoryless` or `random`."""
    start: Start
    num_parts: int = 1
    """Parts that chains act in: see `rollout`."""
    width: int = 1
    """Environments that share the episodes of a chain, a divisor of num_episodes: for a policy that knows nothing of
    the episodes before, which need not come one after another."""

    @property
    def num_environments(self) -> int:
        """Environment i plays for chain i modulo num_chains."""
        return self.num_chains * self.width

    def widened(self, most: int) -> "LogPlan":
        """Returns the same plan in as many environments as there may be at most, or in one for each chain."""
        fits = [k for k in range(1, self.num_episodes + 1) if self.num_chains * k <= most]
        width = max([1, *(k for k in fits if self.num_episodes % k == 0)])
        index, chain = np.divmod(np.arange(self.num_chains * width), self.num_chains)
        share = self.num_episodes // width
        start = dataclasses.replace(self.start, num_episodes=share, chain=chain, first_episode=index * share)
        return dataclasses.replace(self, width=width, start=start)

    @property
    def episode_steps(self) -> int:
        """Agent steps of a whole episode."""
        return -(-tasks.DOMAINS[tasks.domain_of(self.task)].episode_steps // self.action_repeat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlayedEpisode:
    """An episode as it can be simulated again: `tasks.make(task, seed, action_repeat)`, reset, these actions."""

    episode: int
    """Index within its chain."""
    seed: int
    """Of `bpt_rl.envs.tasks.make`."""
    action: Float[np.ndarray, "T A"]
    reward: Float[np.ndarray, "T"]


def play(
    policy: Policy,
    environments: VectorEnv,
    plan: LogPlan,
    *,
    report_progress: Progress | None = None,
    journal: EvaluationJournal | None = None,
) -> tuple[EpisodeLog, tuple[PlayedEpisode, PlayedEpisode]]:
    """Returns the log, and the first chain's first and last episode.

    A journal's steps that the policy would not choose any more are played again, and a warning says so.

    Args:
      policy: Its context must hold the plan's episodes.
      environments: Of the plan's task, one a chain.
      plan: What to play.
      report_progress: Told of episodes that all chains have finished.
      journal: Keeps each block of steps, and goes on behind those that it holds already.
    """
    writer = None
    if journal:
        writer = JournalWriter(
            journal, plan.context, num_environments=plan.num_environments, block_steps=plan.episode_steps
        )
    try:
        return _play(policy, environments, plan, report_progress, writer)
    except OtherActionsError as error:
        if journal is None:
            raise
        _log.warning("The %s episodes begin again: %s", plan.context, error)
        journal.forget(plan.context)
        return play(policy, environments, plan, report_progress=report_progress, journal=journal)


def _play(
    policy: Policy,
    environments: VectorEnv,
    plan: LogPlan,
    report_progress: Progress | None,
    writer: JournalWriter | None,
) -> tuple[EpisodeLog, tuple[PlayedEpisode, PlayedEpisode]]:
    began = time.perf_counter()
    count = _Count(plan)
    played = writer.played if writer else None
    for transition in rollout(policy, environments, plan.start, num_parts=plan.num_parts, played=played):
        num_finished = count.num_finished
        count.add(transition)
        if writer:
            writer.add(transition)
        if report_progress and count.num_finished > num_finished:
            report_progress(plan.context, count.num_finished, plan.num_episodes)
    return count.log(time.perf_counter() - began), count.episodes()


class _Count:
    """What the transitions so far add up to."""

    def __init__(self, plan: LogPlan) -> None:
        self._plan = plan
        self._returns = np.zeros((plan.num_chains, plan.num_episodes))
        self._num_steps = np.zeros((plan.num_chains, plan.num_episodes), np.int64)
        self._share = plan.num_episodes // plan.width
        self._finished = np.zeros(plan.num_environments, np.int64)
        self._failures: list[EpisodeFailure] = []
        self._first_chain: list[list[tuple[Any, Any]]] = [[] for _ in range(plan.num_episodes)]

    @property
    def num_finished(self) -> int:
        """Episodes that every chain has finished."""
        return int(self._finished.min()) * self._plan.width

    def add(self, transition: Transition) -> None:
        """Counts a step of some environments; those that are finished play on for nothing."""
        is_counted = self._finished[transition.environment] < self._share
        environments = transition.environment[is_counted]
        chains, episodes = self._places(environments)
        self._returns[chains, episodes] += transition.reward[is_counted]
        for environment, reason in transition.failures.items():
            for i in np.flatnonzero(environments == environment):
                chain, episode = int(chains[i]), int(episodes[i])
                step = int(self._num_steps[chain, episode])
                self._failures.append(EpisodeFailure(chain, episode, step, reason))
        self._num_steps[chains, episodes] += 1
        for i in np.flatnonzero(chains == 0):
            action, reward = transition.action[is_counted][i], transition.reward[is_counted][i]
            self._first_chain[episodes[i]].append((action, reward))
        self._finished[environments] += transition.done[is_counted]

    def _places(
        self, environments: Int[np.ndarray, "B"]
    ) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]]:
        """Returns the chains that environments play for, and their present episodes there."""
        index, chains = np.divmod(environments, self._plan.num_chains)
        return chains, index * self._share + self._finished[environments]

    def log(self, seconds: float) -> EpisodeLog:
        """Returns what has been counted."""
        plan = self._plan
        return EpisodeLog(
            returns=self._returns,
            num_steps=self._num_steps,
            context=plan.context,
            task=plan.task,
            action_repeat=plan.action_repeat,
            target_return=plan.start.target_return,
            seed=plan.start.seed,
            seconds=seconds,
            failures=tuple(sorted(self._failures, key=lambda failure: (failure.chain, failure.episode))),
        )

    def episodes(self) -> tuple[PlayedEpisode, PlayedEpisode]:
        """Returns the first chain's first and last episode."""
        return self._episode(0), self._episode(self._plan.num_episodes - 1)

    def _episode(self, index: int) -> PlayedEpisode:
        actions, rewards = zip(*self._first_chain[index], strict=True)
        seed = start_seed(self._plan.start.seed, 0, index)
        return PlayedEpisode(episode=index, seed=seed, action=np.stack(actions), reward=np.array(rewards))
