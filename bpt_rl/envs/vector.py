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
from bpt_rl.envs.episodes import EpisodeGroup, GroupPlan, Moment, Part
from bpt_rl.envs.shared_arrays import Board
from bpt_rl.envs.simulators import Message, Simulators

Step = tuple[
    Float32[np.ndarray, "N O"],
    Float[np.ndarray, "N"],
    Bool[np.ndarray, "N"],
    Bool[np.ndarray, "N"],
    dict[str, Any],
]
"""Observation, reward, termination (never), truncation and infos."""

ALL = Part()


class DMCVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """See `bpt_rl.envs.tasks.make_vector`.

    Beside gymnasium's `reset` and `step`, environments can be brought to any moment of any episode (`begin`), and a
    part of them can step while another one does not (`send`, `receive`). A process that dies is replaced: the actions
    that its running episodes have had are played again.
    """

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
        self._seed = seed
        self._needs_reset = True
        self._pending: list[Part] = []
        self._workers: dict[Part, list[int]] = {}
        self._chain = np.arange(num_environments)
        self._episode = np.full(num_environments, -1)
        self._played: list[list[Float[np.ndarray, "A"]]] = [[] for _ in range(num_environments)]
        board = Board.make(
            num_environments, observation_dim=domain.observation_dim, action_dim=domain.action_dim
        )
        self._action, self._observation = board.action.array, board.observation.array
        self._final, self._reward, self._done = (
            board.final_observation.array,
            board.reward.array,
            board.done.array,
        )
        plan = GroupPlan(task=task, action_repeat=action_repeat, board=board)
        self._simulators = Simulators(
            functools.partial(EpisodeGroup, plan), num_environments, num_workers, revival=self._revival
        )

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, "N O"], dict[str, Any]]:
        """Returns the first observation of a new episode in every environment.

        Args:
          seed: Starts every environment with its first episode of this seed; None goes on to the next episodes.
          options: There are none.

        Raises:
          ValueError: If options or a seed for each environment are passed.
        """
        if options or not (seed is None or isinstance(seed, int)):
            raise ValueError(
                f"reset takes one integer seed and no options; got {seed!r} and {options!r}. Leave them out."
            )
        episode = self._episode + 1 if seed is None else np.zeros_like(self._episode)
        return self.begin(self._seed if seed is None else seed, episode), {}

    def begin(
        self,
        seed: int,
        episode: Int[np.ndarray, "N"],
        played: Sequence[Float[np.ndarray, "_ A"]] | None = None,
        chain: Int[np.ndarray, "N"] | None = None,
    ) -> Float32[np.ndarray, "N O"]:
        """Returns the observation of every environment in an episode of its own.

        Args:
          seed: Of the start states.
          episode: Index of each environment's episode in its chain; it starts from (seed, chain, episode) alone.
          played: Actions that each environment's episode has had; none means it just begins.
          chain: Chain whose episodes each environment plays; those of its own index if None.
        """
        while self._pending:
            self.receive(self._pending[0])
        self._seed, self._episode = seed, np.array(episode)
        self._chain = np.arange(self.num_envs) if chain is None else np.array(chain)
        self._played = [list(actions) for actions in played] if played else [[] for _ in self._episode]
        self._simulators.send("begin", [self._moments(group) for group in self._simulators.groups])
        self._simulators.receive()
        self._needs_reset = False
        return self._observation.copy()

    def step(self, actions: Float[Any, "N A"]) -> Step:
        """Returns observation, reward, termination (never), truncation and infos after actions in [-1, 1].

        Infos hold `final_obs` where episodes end, and `failure`, the reason, where the simulator ended one.

        Raises:
          ValueError: If the actions do not fit the action space or are not finite.
          RuntimeError: If a process fails, or dies again and again; every process is then closed.
        """
        self.send(actions)
        return self.receive()

    def send(self, actions: Float[Any, "n A"], part: Part = ALL) -> None:
        """Takes a step in a part of the environments and does not wait for it; `receive` must follow.

        Raises:
          ValueError: If the actions do not fit the action space or are not finite.
        """
        if self._needs_reset:
            raise gymnasium.error.ResetNeeded(
                "A vector environment must be reset before its first step. Call reset()."
            )
        actions = np.asarray(actions)
        expected = (len(part.environments(self.num_envs)), self._action.shape[1])
        if actions.shape != expected or not np.isfinite(actions).all():
            raise ValueError(
                f"actions must be finite and of shape {expected}; got shape "
                f"{actions.shape} with {np.sum(~np.isfinite(actions))} not finite. Check the policy."
            )
        self._action[part.first :: part.stride] = actions
        self._pending.append(part)
        self._simulators.send_to(self._workers_of(part), "step", part)

    def has_stepped(self, part: Part = ALL) -> bool:
        """Returns whether `receive` would not wait."""
        return self._simulators.have_answered(self._workers_of(part))

    def receive(self, part: Part = ALL) -> Step:
        """Returns what the step of a part has led to; parts are received in the order they were sent."""
        failures: dict[int, str] = {}
        for k in self._workers_of(part):
            failures |= self._simulators.receive_from(k)
        self._pending.remove(part)
        members = part.environments(self.num_envs)
        done = self._done[members]
        for i, is_done in zip(members, done, strict=True):
            if is_done:
                self._played[i] = []
                self._episode[i] += 1
            else:
                self._played[i].append(self._action[i].copy())
        infos = _infos(done, self._final[members], [failures.get(int(i), "") for i in members])
        never = np.zeros(len(members), np.bool_)
        return self._observation[members], self._reward[members], never, done, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the simulator processes."""
        self._simulators.close()

    def _workers_of(self, part: Part) -> list[int]:
        # Found once: it takes as long as to tell a process of a step.
        if part not in self._workers:
            groups = enumerate(self._simulators.groups)
            self._workers[part] = [k for k, group in groups if (group % part.stride == part.first).any()]
        return self._workers[part]

    def _moments(self, group: Int[np.ndarray, "n"]) -> list[Moment]:
        return [
            Moment(
                int(i),
                self._seed,
                int(self._chain[i]),
                int(self._episode[i]),
                np.array(self._played[i]).reshape(-1, self._action.shape[1]),
            )
            for i in group
        ]

    def _revival(self, k: int) -> Message:
        return "begin", self._moments(self._simulators.groups[k])


def _infos(
    done: Bool[np.ndarray, "n"], final: Float32[np.ndarray, "n O"], reasons: list[str]
) -> dict[str, Any]:
    """Returns infos as gymnasium lays them out: an array over all, and beside it where it counts."""
    infos: dict[str, Any] = {}
    if done.any():
        final_obs = np.full(len(done), None, dtype=object)
        for i in np.flatnonzero(done):
            final_obs[i] = final[i]
        infos |= {"final_obs": final_obs, "_final_obs": done.copy()}
    if any(reasons):
        infos |= {
            "failure": np.array(reasons, dtype=object),
            "_failure": np.array([bool(r) for r in reasons]),
        }
    return infos
