"""Many environments of one task, grouped into processes, behind gymnasium's vector interface."""

import functools
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Float32, Int

from bpt_rl.envs import tasks
from bpt_rl.envs.simulators import Simulators


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
        self._needs_reset = True
        make = functools.partial(_Group, task, _seeds(seed, num_environments), action_repeat)
        self._simulators = Simulators(make, num_environments, num_workers)

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
        self._simulators.send("reset", [[seeds[i] for i in group] for group in self._simulators.groups])
        self._needs_reset = False
        return np.concatenate(self._simulators.receive()), {}

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
        self._simulators.send("step", [actions[group] for group in self._simulators.groups])
        observation, reward, done, final = (
            np.concatenate(parts) for parts in zip(*self._simulators.receive(), strict=True)
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
        self._simulators.close()


def _seeds(seed: int, num_environments: int) -> list[int]:
    return [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(num_environments)]


class _Group:
    """The environments of one process."""

    def __init__(self, task: str, seeds: list[int], action_repeat: int, group: Int[np.ndarray, "n"]) -> None:
        self._environments = [tasks.make(task, seeds[i], action_repeat) for i in group]

    def __call__(self, command: str, payload: Any) -> Any:
        if command == "step":
            return _step(self._environments, payload)
        for environment, seed in zip(self._environments, payload, strict=True):
            if seed is not None:
                environment.seed(seed)
        return np.stack([environment.reset().observation for environment in self._environments])


def _step(environments: list[tasks.Environment], actions: Float[np.ndarray, "n A"]) -> tuple[Any, ...]:
    steps = [environment.step(action) for environment, action in zip(environments, actions, strict=True)]
    final = np.stack([step.observation for step in steps])
    done = np.array([step.last() for step in steps])
    observation = final.copy()
    for i in np.flatnonzero(done):
        observation[i] = environments[i].reset().observation
    return observation, np.array([step.reward for step in steps], np.float64), done, final
