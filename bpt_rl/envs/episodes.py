"""Episodes of several environments, each of which can be begun anew by itself."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bpt_rl.envs import tasks
from bpt_rl.envs.shared_arrays import Board


def start_seed(seed: int, chain: int, episode: int) -> int:
    """Returns the seed that `tasks.make` begins an episode of `make_vector` with; it depends on these three alone."""
    return int(np.random.SeedSequence([seed, chain, episode]).generate_state(1)[0])


class Part(NamedTuple):
    """Every `stride`-th environment from `first` on: those that step together while others do not."""

    first: int = 0
    stride: int = 1

    def environments(self, num_environments: int) -> Int[np.ndarray, "n"]:
        """Returns their indices among all."""
        return np.arange(self.first, num_environments, self.stride)


class Moment(NamedTuple):
    """Where in its life an environment is: after some actions of an episode."""

    environment: int
    seed: int
    chain: int
    """Whose episodes it plays: usually those of its own number."""
    episode: int
    actions: Float[np.ndarray, "t A"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What the processes of a vector environment simulate."""

    task: str
    action_repeat: int
    board: Board


class EpisodeGroup:
    """The environments of one process. Observations, rewards and ends go to the board, reasons of failures back.

    Commands: `begin` with the moments to bring environments to, and `step` with a `Part`, which begins the next
    episode where one ends.
    """

    def __init__(self, plan: GroupPlan, group: Int[np.ndarray, "n"]) -> None:
        self._environments = {int(i): tasks.make(plan.task, 0, plan.action_repeat) for i in group}
        self._moments: dict[int, Moment] = {}
        board = plan.board
        self._action, self._observation = board.action.array, board.observation.array
        self._final, self._reward, self._done = (
            board.final_observation.array,
            board.reward.array,
            board.done.array,
        )
        # dm_control takes most of a second to import; by now it is.
        from dm_control.rl.control import PhysicsError

        self._divergence = PhysicsError

    def __call__(self, command: str, payload: Any) -> dict[int, str]:
        """Returns for each environment whose simulation failed in this step the reason."""
        if command == "begin":
            for moment in payload:
                self._begin(moment)
            return {}
        members = [i for i in self._environments if i % payload.stride == payload.first]
        return {i: reason for i in members if (reason := self._step(i))}

    def _begin(self, moment: Moment) -> None:
        environment = self._environments[moment.environment]
        environment.seed(start_seed(moment.seed, moment.chain, moment.episode))
        time_step = environment.reset()
        for action in moment.actions:
            time_step = environment.step(action)
        self._moments[moment.environment] = moment
        self._observation[moment.environment] = time_step.observation

    def _step(self, i: int) -> str:
        try:
            time_step = self._environments[i].step(self._action[i])
        except self._divergence as error:
            reason = str(error)
        else:
            reason = _fault(time_step)
        if reason:
            # What came of this step is no number: the episode ends where it was before.
            self._final[i], self._reward[i], self._done[i] = self._observation[i], 0.0, True
        else:
            self._observation[i] = self._final[i] = time_step.observation
            self._reward[i], self._done[i] = time_step.reward, time_step.last()
        if self._done[i]:
            moment = self._moments[i]
            self._begin(moment._replace(episode=moment.episode + 1, actions=moment.actions[:0]))
        return reason


def _fault(time_step: Any) -> str:
    if not np.isfinite(time_step.reward):
        return f"The reward is {time_step.reward}."
    if not np.isfinite(time_step.observation).all():
        return "The observation is not finite."
    return ""
