"""Many environments of one task, grouped into processes, behind gymnasium's vector interface."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Float32

from bpt_rl.envs import tasks

_CONNECTION_LOST = (EOFError, BrokenPipeError, ConnectionResetError)


class DMCVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """See `bpt_rl.envs.tasks.make_vector`."""

    def __init__(
        self, task: str, num_environments: int, seed: int, *, action_repeat: int, num_workers: int
    ) -> None:
        domain = tasks.DOMAINS[tasks.domain_of(task)]
        self.num_envs = num_environments
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gymnasium.spaces.Box(
            -np.inf, np.inf, (domain.observation_dim,), np.float32
        )
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (domain.action_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_environments)
        self.action_space = batch_space(self.single_action_space, num_environments)
        self._groups = np.array_split(np.arange(num_environments), num_workers)
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._needs_reset = True
        context = multiprocessing.get_context("spawn")
        seeds = _seeds(seed, num_environments)
        for k, group in enumerate(self._groups):
            ours, theirs = context.Pipe()
            arguments = (theirs, task, [seeds[i] for i in group], action_repeat)
            process = context.Process(target=_work, args=arguments, name=f"simulator-{k}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._receive()

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, "N O"], dict[str, Any]]:
        """Returns the first observation of a new episode in every environment.

        Args:
          seed: Starts every environment anew from (seed, i); None goes on drawing.
          options: There are none.

        Raises:
          ValueError: If options or a seed for each environment are passed.
        """
        if options or not (seed is None or isinstance(seed, int)):
            raise ValueError(
                f"reset takes one integer seed and no options; got {seed!r} and {options!r}. Leave them out."
            )
        seeds = [None] * self.num_envs if seed is None else _seeds(seed, self.num_envs)
        self._send("reset", [[seeds[i] for i in group] for group in self._groups])
        self._needs_reset = False
        return np.concatenate(self._receive()), {}

    def step(
        self, actions: Float[np.ndarray, "N A"]
    ) -> tuple[
        Float32[np.ndarray, "N O"],
        Float[np.ndarray, "N"],
        Bool[np.ndarray, "N"],
        Bool[np.ndarray, "N"],
        dict[str, Any],
    ]:
        """Returns observation, reward, termination (never), truncation and infos after actions in [-1, 1].

        Raises:
          ValueError: If the actions do not fit the action space or are not finite.
          RuntimeError: If the simulator fails; every process is then closed.
        """
        if self._needs_reset:
            raise gymnasium.error.ResetNeeded(
                "A vector environment must be reset before its first step. Call reset()."
            )
        if actions.shape != self.action_space.shape or not np.isfinite(actions).all():
            raise ValueError(
                f"actions must be finite and of shape {self.action_space.shape}; got shape "
                f"{actions.shape} with {np.sum(~np.isfinite(actions))} not finite. Check the policy."
            )
        self._send("step", [actions[group] for group in self._groups])
        observation, reward, done, final = (
            np.concatenate(parts) for parts in zip(*self._receive(), strict=True)
        )
        infos: dict[str, Any] = {}
        if done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(done):
                final_obs[i] = final[i]
            infos = {"final_obs": final_obs, "_final_obs": done.copy()}
        return observation, reward, np.zeros(self.num_envs, np.bool_), done, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the simulator processes."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._workers = []

    def _send(self, command: str, payloads: Sequence[Any]) -> None:
        if not self._workers:
            raise gymnasium.error.ClosedEnvironmentError(
                "A closed vector environment cannot be used. Make a new one."
            )
        for k, payload in enumerate(payloads):
            try:
                self._workers[k][1].send((command, payload))
            except _CONNECTION_LOST:
                self._raise_death(k)

    def _receive(self) -> list[Any]:
        replies = []
        for k in range(len(self._workers)):
            try:
                failure, value = self._workers[k][1].recv()
            except _CONNECTION_LOST:
                self._raise_death(k)
            if failure:
                self.close()
                raise RuntimeError(f"{self._place(k)} failed:\n{failure}")
            replies.append(value)
        return replies

    def _place(self, k: int) -> str:
        return f"Simulator process {k} (environments {self._groups[k][0]} to {self._groups[k][-1]})"

    def _raise_death(self, k: int) -> NoReturn:
        process = self._workers[k][0]
        process.join(timeout=5)
        code = process.exitcode
        self.close()
        reason = (
            f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        )
        raise RuntimeError(
            f"{self._place(k)} must live until it is closed; it ended {reason}. If memory ran out, use "
            'fewer num_workers, and start a script\'s work below `if __name__ == "__main__":`.'
        )


def _seeds(seed: int, num_environments: int) -> list[int]:
    return [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(num_environments)]


def _work(connection: Connection, task: str, seeds: list[int], action_repeat: int) -> None:
    """Runs in each process: answers (traceback or "", value) to every command until the connection closes."""
    # Ctrl-C reaches the whole process group; the parent is the one to end us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    environments: list[tasks.Environment] = []
    with contextlib.suppress(*_CONNECTION_LOST), connection:
        try:
            environments = [tasks.make(task, seed, action_repeat) for seed in seeds]
            connection.send(("", None))
            while True:
                command, payload = connection.recv()
                if command == "reset":
                    for i, seed in enumerate(payload):
                        if seed is not None:
                            environments[i].seed(seed)
                    reply: Any = np.stack([environment.reset().observation for environment in environments])
                else:
                    reply = _step(environments, payload)
                connection.send(("", reply))
        except _CONNECTION_LOST:
            raise
        except Exception:
            connection.send((f"{traceback.format_exc()}(process {os.getpid()})", None))


def _step(environments: list[tasks.Environment], actions: Float[np.ndarray, "n A"]) -> tuple[Any, ...]:
    steps = [environment.step(action) for environment, action in zip(environments, actions, strict=True)]
    final = np.stack([step.observation for step in steps])
    done = np.array([step.last() for step in steps])
    observation = final.copy()
    for i in np.flatnonzero(done):
        observation[i] = environments[i].reset().observation
    return observation, np.array([step.reward for step in steps], np.float64), done, final
