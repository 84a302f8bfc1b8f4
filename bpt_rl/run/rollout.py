"""The environment loop: a policy in many environments at once, step by step."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv
from jaxtyping import Bool, Float, Int

from bpt_rl.agents.base import Policy
from bpt_rl.datasets.chains import Chain
from bpt_rl.envs.episodes import Part
from bpt_rl.envs.vector import DMCVectorEnv, Step

ACTION_TOLERANCE = 1e-4
"""Recorded actions and those of the same policy, computed anew, may differ by so much: on some devices sums come out
differently from one process to the next."""


class OtherActionsError(ValueError):
    """A policy does not choose the actions that were recorded of it."""


class Transition(NamedTuple):
    """One step of B environments."""

    observation: Float[np.ndarray, "B O"]
    """Before the action."""
    return_to_go: Float[np.ndarray, "B"]
    """Return still asked of the episode before the action."""
    action: Float[np.ndarray, "B A"]
    reward: Float[np.ndarray, "B"]
    done: Bool[np.ndarray, "B"]
    """Where this step ended its episode; the next transition begins another."""
    environment: Int[np.ndarray, "B"]
    """Index of each of the B."""
    failures: Mapping[int, str]
    """Of environments whose simulator ended the episode in this step: index and reason. Such a step pays nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Played:
    """The first T steps of N environments, as `rollout` yielded them before: `rollout` goes on from there."""

    observation: Float[np.ndarray, "T N O"]
    action: Float[np.ndarray, "T N A"]
    reward: Float[np.ndarray, "T N"]
    done: Bool[np.ndarray, "T N"]
    failures: Mapping[tuple[int, int], str]
    """By step and environment."""

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.reward)

    def transition(self, t: int, part: "_Part") -> Transition:
        """Returns step `t` of a part of the environments."""
        members = part.members
        failures = {int(i): self.failures[t, i] for i in members if (t, i) in self.failures}
        return Transition(
            observation=self.observation[t, members],
            return_to_go=part.return_to_go,
            action=self.action[t, members],
            reward=self.reward[t, members],
            done=self.done[t, members],
            environment=members,
            failures=failures,
        )

    def running(self) -> tuple[Int[np.ndarray, "N"], list[Float[np.ndarray, "_ A"]]]:
        """Returns each environment's episode and the actions that it has had in it."""
        ends = [np.flatnonzero(done) for done in self.done.T]
        begins = [int(end[-1]) + 1 if len(end) else 0 for end in ends]
        actions = [self.action[begin:, i] for i, begin in enumerate(begins)]
        return np.array([len(end) for end in ends]), actions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How environments and policy begin."""

    seed: int
    """Of the environments' start states."""
    target_return: float = math.nan
    """Asked of every episode, less the rewards as they come; NaN asks for none."""
    contexts: Sequence[Chain] | None = None
    """What each environment's context holds before its first episode; None for nothing."""
    num_episodes: int | None = None
    """Episodes after which an environment is finished; a part goes on until all of its own are. None never ends."""
    chain: Int[np.ndarray, "N"] | None = None
    """Chain whose episodes each environment plays; its own index if None."""
    first_episode: Int[np.ndarray, "N"] | None = None
    """Index in its chain of the first episode of each environment; 0 if None."""


class _Part:
    """Environments that act in one call of the policy, and their carry."""

    def __init__(self, policy: Policy, members: Int[np.ndarray, "B"], start: Start) -> None:
        self._policy, self._start = policy, start
        self._num_finished = np.zeros(len(members), np.int64)
        self.members = members
        if start.contexts is None:
            self._carry = policy.start(len(members))
        else:
            self._carry = policy.start(len(members), [start.contexts[i] for i in members])
        self.return_to_go = np.full(len(members), start.target_return)

    @property
    def is_over(self) -> bool:
        limit = self._start.num_episodes
        return limit is not None and bool((self._num_finished >= limit).all())

    def act(self, observation: Float[np.ndarray, "B O"]) -> Float[Any, "B A"]:
        self._carry, action = self._policy.act(self._carry, observation, self.return_to_go)
        return action

    def observe(self, reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]) -> None:
        self._num_finished += done
        if not self.is_over:
            self._carry = self._policy.observe(self._carry, reward, done)
        self.return_to_go = np.where(done, self._start.target_return, self.return_to_go - reward)


class _Lockstep:
    """Environments of any maker as those that a rollout asks: all step at once, when the answer is asked for."""

    def __init__(self, environments: VectorEnv) -> None:
        self._environments = environments

    def begin(self, seed: int, episode: Any, played: Any, chain: Any) -> Float[np.ndarray, "N O"]:
        return np.asarray(self._environments.reset(seed=seed)[0])

    def send(self, actions: Float[np.ndarray, "N A"], part: Part) -> None:
        self._actions = actions

    def has_stepped(self, part: Part) -> bool:
        return True

    def receive(self, part: Part) -> Step:
        return self._environments.step(self._actions)


def rollout(
    policy: Policy,
    environments: VectorEnv,
    start: Start,
    *,
    num_parts: int = 1,
    played: Played | None = None,
) -> Iterator[Transition]:
    """Yields transitions; one episode follows another in the same carry.

    Environments may act in several parts: while a device computes one part's actions, the simulators of the others
    step, and this process looks after those that have stepped.
    Each part is then a call of the policy with a carry of its own, and yields transitions of its own, in turn. A
    policy that takes the mean acts in a part as in all of them; one that draws may draw otherwise.

    Args:
      policy: Acts in every environment.
      environments: Of the SAME_STEP autoreset mode; begun here.
      start: What they and the policy begin with.
      num_parts: Parts; more than one is for the environments of `make_vector`.
      played: What this rollout has yielded before: it is yielded again, without simulators. The policy sees the
        recorded observations and rewards and must choose the recorded actions.

    Raises:
      OtherActionsError: If it chooses others.
      ValueError: If environments of another maker are to act in parts or to go on.
    """
    num_environments = environments.num_envs
    if not isinstance(environments, DMCVectorEnv) and (num_parts > 1 or played or start.chain is not None):
        raise ValueError(
            "Only environments of make_vector can act in parts, go on where others were or share a chain; got "
            f"{type(environments).__name__}. Use num_parts=1, nothing played and each its own chain."
        )
    simulated = environments if isinstance(environments, DMCVectorEnv) else _Lockstep(environments)
    places = [Part(first, num_parts) for first in range(num_parts)]
    parts = {place: _Part(policy, place.environments(num_environments), start) for place in places}
    if played:
        yield from _replay(parts.values(), played)
    episode, actions = played.running() if played else (np.zeros(num_environments, np.int64), None)
    if start.first_episode is not None:
        episode = episode + start.first_episode
    first = simulated.begin(start.seed, episode, actions, start.chain)
    yield from _play(simulated, parts, first)


def _replay(parts: Iterable[_Part], played: Played) -> Iterator[Transition]:
    for t in range(played.num_steps):
        for part in parts:
            if part.is_over:
                continue
            transition = played.transition(t, part)
            action = np.asarray(part.act(transition.observation))
            difference = np.abs(action - transition.action).max()
            if not difference <= ACTION_TOLERANCE:
                raise OtherActionsError(
                    "A rollout goes on only where its policy chooses the actions that it chose before; at step "
                    f"{t} they differ by {difference:.3g}. Begin it again."
                )
            yield transition
            part.observe(transition.reward, transition.done)


def _play(
    simulated: DMCVectorEnv | _Lockstep, parts: Mapping[Part, _Part], first: Float[np.ndarray, "N O"]
) -> Iterator[Transition]:
    observation: dict[Part, Any] = {}
    action: dict[Part, Any] = {}
    choosing: collections.deque[Part] = collections.deque()
    stepping: collections.deque[Part] = collections.deque()

    def choose(place: Part, seen: Float[np.ndarray, "B O"]) -> None:
        observation[place], action[place] = seen, parts[place].act(seen)
        choosing.append(place)

    for place, part in parts.items():
        if not part.is_over:
            choose(place, first[part.members])
    while choosing or stepping:
        if not stepping or (choosing and not simulated.has_stepped(stepping[0])):
            place = choosing.popleft()
            action[place] = np.asarray(action[place])
            simulated.send(action[place], place)
            stepping.append(place)
            continue
        place = stepping.popleft()
        part = parts[place]
        after, reward, terminated, truncated, infos = simulated.receive(place)
        done = terminated | truncated
        failed = np.flatnonzero(infos.get("_failure", False))
        yield Transition(
            observation=observation[place],
            return_to_go=part.return_to_go,
            action=action[place],
            reward=reward,
            done=done,
            environment=part.members,
            failures={int(part.members[i]): infos["failure"][i] for i in failed},
        )
        part.observe(reward, done)
        if not part.is_over:
            choose(place, after)
