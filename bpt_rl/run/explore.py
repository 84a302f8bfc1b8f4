"""Collecting with an explorer that learns: simulators step while the device learns from what they did before."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bpt_rl.agents.registry import make_explorer
from bpt_rl.collect_config import CollectConfig
from bpt_rl.datasets import exorl
from bpt_rl.envs import tasks
from bpt_rl.envs.recording import RecordingEnvironments, RecordingPlan, recording
from bpt_rl.nn.replay import ReplayState
from bpt_rl.run import records
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.exploration_step import ExplorationState, ExplorationStep

CHECKPOINT_STEPS = 50_000
"""Environment steps between checkpoints, at least; they lie at ends of rounds."""
REPORT_STEPS = 20
"""Steps of all environments between two reports of progress."""


def explore(config: CollectConfig, buffer: Path, report_progress: Callable[..., None] | None = None) -> None:
    """Fills `buffer` with the episodes of an explorer, going on from its newest checkpoint.

    All environments play one episode a round, and episodes are numbered by round, then environment. Checkpoints lie
    in `checkpoints` beside the buffer, one JSON object a round in `metrics.jsonl`. What was recorded after the newest
    checkpoint is removed and recorded again, on the CPU with the same bytes as without the interruption. The task's
    reward is recorded and reported, and no learner sees it.

    Args:
      config: What explores, and where.
      buffer: Folder of the episodes.
      report_progress: Called with environment steps done, their number and, by keyword, a note of rates.

    Raises:
      ValueError: If the folder lacks an episode that the checkpoint rests on, or the replay is too small.
      OSError: If an episode cannot be written.
      FloatingPointError: If learning diverges.
    """
    run = _Run.of(config, buffer)
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(Checkpoints(buffer.parent / "checkpoints", keep=1))
        done = saved.latest_step or 0
        _forget_after(run, done)
        if done >= run.num_rounds:
            return
        environments = stack.enter_context(recording(run.plan, config.num_workers))
        state: ExplorationState = run.step.init()
        if done:
            state = saved.restore(done, jax.eval_shape(lambda: state))
        replay = _replay_of(run, done)
        clock = _Clock(run, done, report_progress)
        for round_index in range(done, run.num_rounds):
            state, replay, line = _play_round(run, (state, replay), environments, round_index, clock)
            with run.metrics_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            is_due = run.steps_of(round_index + 1 - done) >= CHECKPOINT_STEPS
            if is_due or round_index + 1 == run.num_rounds:
                saved.save(round_index + 1, state)
                done = round_index + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What stays the same from the first step to the last."""

    config: CollectConfig
    plan: RecordingPlan
    step: ExplorationStep
    num_rounds: int
    metrics_path: Path

    @classmethod
    def of(cls, config: CollectConfig, buffer: Path) -> "_Run":
        domain = tasks.DOMAINS[tasks.domain_of(config.task)]
        sizes = (domain.observation_dim, domain.action_dim, domain.episode_steps)
        explorer = make_explorer(config.algorithm, config.exploration, *sizes[:2])  # type: ignore[arg-type]
        plan = RecordingPlan(
            task=config.task,
            num_environments=config.exploration.num_environments,
            seed=config.seed,
            skill_dim=explorer.skill_dim,
            folder=buffer,
            write=exorl.write_episode,
        )
        return cls(
            config=config,
            plan=plan,
            step=ExplorationStep(config.exploration, explorer, sizes=sizes, seed=config.seed),
            num_rounds=-(-config.num_steps // (plan.num_environments * plan.episode_steps)),
            metrics_path=buffer.parent / "metrics.jsonl",
        )

    def steps_of(self, num_rounds: int) -> int:
        """Environment steps of so many rounds."""
        return num_rounds * self.plan.num_environments * self.plan.episode_steps


class _Clock:
    """Counts steps and updates of this process, and reports them."""

    def __init__(self, run: _Run, num_rounds: int, report: Callable[..., None] | None) -> None:
        self._before = run.steps_of(num_rounds)
        self._total = run.steps_of(run.num_rounds)
        self._report = report
        self._start = time.perf_counter()
        self.steps = self.updates = 0
        self._tick()

    def count(self, steps: int, updates: int, *, is_reported: bool) -> None:
        """Adds steps and updates, and reports all so far."""
        self.steps += steps
        self.updates += updates
        if is_reported:
            self._tick()

    def rates(self, since: tuple[float, int, int] | None = None) -> Mapping[str, float]:
        """Returns environment steps and updates a second, since the start or a `mark`."""
        start, steps, updates = since or (self._start, 0, 0)
        seconds = max(time.perf_counter() - start, 1e-9)
        return {
            "steps_per_second": (self.steps - steps) / seconds,
            "updates_per_second": (self.updates - updates) / seconds,
        }

    def mark(self) -> tuple[float, int, int]:
        """Returns a moment for `rates`."""
        return time.perf_counter(), self.steps, self.updates

    def _tick(self) -> None:
        if self._report:
            rates = self.rates()
            note = (
                f"{rates['steps_per_second']:,.0f} steps/s, {rates['updates_per_second']:,.0f} updates/s"
                if self.steps
                else ""
            )
            self._report(self._before + self.steps, self._total, note=note)


def _play_round(
    run: _Run,
    states: tuple[ExplorationState, ReplayState],
    environments: RecordingEnvironments,
    round_index: int,
    clock: _Clock,
) -> tuple[ExplorationState, ReplayState, dict[str, float]]:
    """Returns the states after one episode in every environment, and its line of metrics."""
    (state, replay), step, learnt, mark = states, run.step, [], clock.mark()
    num_environments, episode_steps = run.plan.num_environments, run.plan.episode_steps
    updates_at_once = run.config.exploration.updates_at_once
    observation = environments.begin(round_index)
    skill = np.zeros((num_environments, run.plan.skill_dim), np.float32)
    for t in range(episode_steps):
        number = round_index * episode_steps + t
        if run.plan.skill_dim and step.draws_skills_at(t):
            skill = np.asarray(step.draw_skills(state, np.int32(number)))
        action, replay = step.act(state, replay, observation, skill, np.int32(number))
        # Only dispatched, and before anybody waits for the action: the device goes on to learn while the action
        # travels and the simulators step.
        is_learning = step.learns_at(number)
        if is_learning:
            state, metrics = step.learn(state, replay, np.int32(number))
            learnt.append(metrics)
        environments.send(np.asarray(action), skill)
        observation = environments.receive()
        clock.count(num_environments, is_learning * updates_at_once, is_reported=(t + 1) % REPORT_STEPS == 0)
    replay = step.remember(replay, observation, np.zeros_like(action), skill)
    returns = environments.save()
    means = mean_metrics(jax.device_get(learnt))
    line = {
        "step": run.steps_of(round_index + 1),
        "updates": step.num_updates_before((round_index + 1) * episode_steps),
        **clock.rates(mark),
        **means,
        "task_return": float(returns.mean()),
    }
    return state, replay, line


def mean_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean of each metric; of no lines nothing.

    Raises:
      FloatingPointError: If one is not finite.
    """
    means = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]} if lines else {}
    broken = [f"{name} {mean}" for name, mean in means.items() if not np.isfinite(mean)]
    if broken:
        raise FloatingPointError(
            f"What an explorer learns from must stay finite; got {', '.join(broken)}. Lower exploration.learning_rate, "
            "and collect into another `out`."
        )
    return means


def _forget_after(run: _Run, num_rounds: int) -> None:
    """Removes what was recorded after a checkpoint, so that no index is of two runs."""
    kept = num_rounds * run.plan.num_environments
    for path in run.plan.folder.glob("*.npz"):
        name = exorl.parse_name(path.name)
        if name and name[0] >= kept:
            path.unlink()
    for path in run.plan.folder.glob(".episode_*.tmp"):
        path.unlink()
    missing = [path for i in range(kept) if not (path := run.plan.path(i)).exists()]
    if missing:
        raise ValueError(
            f"The learner's checkpoint rests on the first {kept} episodes; {missing[0]} is missing. Bring it "
            "back, or begin in another `out`."
        )
    if run.metrics_path.exists():
        lines = run.metrics_path.read_text().splitlines(keepends=True)
        there = [line for line in lines if line.endswith("\n")]
        kept_lines = [line for line in there if json.loads(line)["step"] <= run.steps_of(num_rounds)]
        records.write_atomically(run.metrics_path, "".join(kept_lines))


def _replay_of(run: _Run, num_rounds: int) -> ReplayState:
    """Returns the replay as it was after the recorded rounds: the newest of them, read back."""
    replay, rows = run.step.init_replay(), run.plan.episode_steps + 1
    first = max(0, num_rounds - -(-run.step.num_slots // rows))
    replay = replay._replace(num_rows=jax.numpy.int32(first * rows))
    for round_index in range(first, num_rounds):
        for values in _rows(run, round_index):
            replay = run.step.remember(replay, *values)
    return replay


def _rows(run: _Run, round_index: int) -> Iterator[tuple[Any, Any, Any]]:
    """Yields observation, the action and the skill that followed of all environments, a step at a time."""
    first = round_index * run.plan.num_environments
    episodes = [exorl.read_episode(run.plan.path(first + i)) for i in range(run.plan.num_environments)]
    observation = np.stack([episode.observation for episode in episodes], axis=1)
    # Row t + 1 has the action and skill that followed observation t; none followed the last observation.
    action = np.stack([np.roll(episode.action, -1, axis=0) for episode in episodes], axis=1)
    no_skill = np.zeros((len(observation), 0), np.float32)
    skills = [np.roll(episode.extras.get("skill", no_skill), -1, axis=0) for episode in episodes]
    yield from zip(observation, action, np.stack(skills, axis=1), strict=True)
