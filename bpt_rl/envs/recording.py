"""Environments in processes that record their own episodes and write them to disk."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from bpt_rl.envs import processes, tasks
from bpt_rl.envs.simulators import Simulators
from bpt_rl.types import Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingPlan:
    """What N environments in lockstep play and where each of them writes its episodes.

    Round r of episodes is one of every environment; that of environment i has the index r N + i, and its start state
    depends on (seed, index) alone.
    """

    task: str
    num_environments: int
    """N."""
    seed: int
    skill_dim: int
    """Z; above 0 the episodes get an array `skill` [T1, Z]: what each row's action followed, row 0 as row 1."""
    folder: Path
    """Receives episode_{index:06d}_{T}.npz."""
    write: Callable[[Path, Trajectory], None]
    """Writes one file whole; picklable."""

    @property
    def episode_steps(self) -> int:
        """T, control steps of an episode."""
        return tasks.DOMAINS[tasks.domain_of(self.task)].episode_steps

    def path(self, index: int) -> Path:
        """Returns the file of an episode."""
        return self.folder / f"episode_{index:06d}_{self.episode_steps}.npz"


class RecordingEnvironments:
    """N environments that step together, T steps a round. Commands are sent and their answers received apart.

    In a round: `begin`, then T times `send` and `receive`, then `save`.
    """

    def __init__(self, plan: RecordingPlan, num_workers: int) -> None:
        """Starts the simulator processes; 0 means one a core, and there are never more than environments.

        Raises:
          ValueError: If the task is unknown.
          RuntimeError: If a process fails to start.
        """
        num_workers = processes.num_processes(num_workers, plan.num_environments)
        self._simulators = Simulators(functools.partial(_Group, plan), plan.num_environments, num_workers)

    def begin(self, round_index: int) -> Float32[np.ndarray, "N O"]:
        """Returns the first observations of a round."""
        self._simulators.send("begin", [round_index] * len(self._simulators.groups))
        return self.receive()

    def send(self, action: Float32[np.ndarray, "N A"], skill: Float32[np.ndarray, "N Z"]) -> None:
        """Takes a step in all environments with actions in [-1, 1], and does not wait for it."""
        groups = self._simulators.groups
        self._simulators.send("step", [(action[group], skill[group]) for group in groups])

    def receive(self) -> Float32[np.ndarray, "N O"]:
        """Returns the observations after the step."""
        return np.concatenate(self._simulators.receive())

    def save(self) -> Float[np.ndarray, "N"]:
        """Returns the round's returns of the task, undiscounted, once every episode is on disk."""
        self._simulators.send("save", [None] * len(self._simulators.groups))
        return np.concatenate(self._simulators.receive())

    def close(self) -> None:
        """Ends the processes."""
        self._simulators.close()


@contextlib.contextmanager
def recording(plan: RecordingPlan, num_workers: int) -> Iterator[RecordingEnvironments]:
    """Yields the environments, whose processes end with the block."""
    environments = RecordingEnvironments(plan, num_workers)
    try:
        yield environments
    finally:
        environments.close()


class _Group:
    """The environments of one process and what they have done in this round."""

    def __init__(self, plan: RecordingPlan, group: Int[np.ndarray, "n"]) -> None:
        self._plan, self._group = plan, group
        domain = tasks.DOMAINS[tasks.domain_of(plan.task)]
        self._environments = [tasks.make(plan.task, 0) for _ in group]
        shape = (len(group), domain.episode_steps + 1)
        self._observation = np.zeros((*shape, domain.observation_dim), np.float32)
        self._action = np.zeros((*shape, domain.action_dim), np.float32)
        self._reward = np.zeros((*shape, 1), np.float32)
        self._physics = np.zeros((*shape, domain.physics_dim))
        self._skill = np.zeros((*shape, plan.skill_dim), np.float32)
        self._first_index = self._t = 0

    def __call__(self, command: str, payload: Any) -> Any:
        if command == "begin":
            return self._begin(payload)
        return self._step(*payload) if command == "step" else self._save()

    def _begin(self, round_index: int) -> Float32[np.ndarray, "n O"]:
        self._first_index, self._t = round_index * self._plan.num_environments, 0
        for i, environment in enumerate(self._environments):
            index = self._first_index + int(self._group[i])
            seed = np.random.SeedSequence([self._plan.seed, index]).generate_state(1)[0]
            environment.seed(int(seed))
            self._observe(i, environment.reset().observation)
        return self._observation[:, 0]

    def _step(self, action: Any, skill: Any) -> Float32[np.ndarray, "n O"]:
        self._t += 1
        self._action[:, self._t], self._skill[:, self._t] = action, skill
        for i, environment in enumerate(self._environments):
            time_step = environment.step(action[i])
            self._reward[i, self._t] = time_step.reward
            self._observe(i, time_step.observation)
        return self._observation[:, self._t]

    def _observe(self, i: int, observation: Any) -> None:
        self._observation[i, self._t] = observation
        self._physics[i, self._t] = tasks.physics_state(self._environments[i])

    def _save(self) -> Float[np.ndarray, "n"]:
        self._skill[:, 0] = self._skill[:, 1]
        for i, environment_index in enumerate(self._group):
            episode = Trajectory(
                observation=self._observation[i],
                action=self._action[i],
                reward=self._reward[i],
                discount=np.ones_like(self._reward[i]),
                physics=self._physics[i],
                extras={"skill": self._skill[i]} if self._plan.skill_dim else {},
            )
            self._plan.write(self._plan.path(self._first_index + int(environment_index)), episode)
        returns: Float[np.ndarray, "n"] = self._reward[..., 0].sum(axis=1, dtype=np.float64)
        return returns
