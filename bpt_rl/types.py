"""The shape legend and the structures that travel between rooms.

Axis letters, used in every annotation and as suffixes inside maths:
  B  rows of a batch, or environments      T  time (steps)        S  sequence (tokens)
  D  embedding                             H  query heads         K  one head
  N  trajectories of a chain               O  observation         A  action
  P  physics (qpos, qvel)                  R  stored reward columns
  F  physical features                     E  episodes of a store
  Z  entries of a skill

`T1` stands for T+1: ExoRL's row 0 is the dummy reset row (zero action, zero reward), and transition
t = 1..T is (observation[t-1], action[t], reward[t], discount[t], observation[t]).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

LAYOUTS: Mapping[str, int] = {
    "return_state_action_reward": 4,
    "return_state_action": 3,
    "state_action_reward": 3,
    "fused": 1,
    "fused_without_return": 1,
}
"""Tokens a step of each token layout."""
WITHOUT_RETURN = ("state_action_reward", "fused_without_return")
"""Layouts in which neither return-to-go nor completion enters the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One recorded episode in ExoRL's alignment: T+1 rows, row 0 the dummy reset row."""

    observation: Float[np.ndarray, "T1 O"]
    action: Float[np.ndarray, "T1 A"]
    """In [-1, 1]; action[t] led from observation[t-1] to observation[t]."""
    reward: Float[np.ndarray, "T1 R"]
    """As stored in the file. It usually belongs to another task: read `task_reward` instead."""
    discount: Float[np.ndarray, "T1 1"]
    physics: Float[np.ndarray, "T1 P"]
    """float64 (qpos, qvel) that goes with observation[t]."""
    features: Float[np.ndarray, "T1 F"] | None = None
    """float64 physical features (`bpt_rl.envs.features`) of each state; None for an episode read from an npz file."""
    task_reward: Mapping[str, Float[np.ndarray, "T1"]] = dataclasses.field(default_factory=dict)
    """Relabelled reward by task, 0 in row 0. Empty for an episode read from an npz file."""
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Further arrays of the file: the skill of DIAYN, APS and SMM."""

    @property
    def num_steps(self) -> int:
        """T: transitions, without the dummy row."""
        return len(self.observation) - 1


class Transition(NamedTuple):
    """A batch of n-step transitions that an explorer learns from; a pytree."""

    observation: Float[Any, "B O"]
    action: Float[Any, "B A"]
    """In [-1, 1]; the first of the n."""
    discount: Float[Any, "B"]
    """Of the value of `next_observation`: the discount factor to the power n."""
    next_observation: Float[Any, "B O"]
    """After n steps."""
    skill: Float[Any, "B Z"]
    """That the policy followed at the first of the steps; Z is 0 for an explorer without skills."""


class PackedBatch(NamedTuple):
    """Chains of trajectories packed into B rows of T steps; a pytree, one entry a step.

    Steps stand in time order; a chain lies whole in one row. Padding has segment_ids 0, loss_mask 0 and
    zeros elsewhere. A model lays each step out as one or more tokens (`LAYOUTS`).
    """

    observation: Float[Any, "B T O"]
    """Before the action of its step, unnormalised."""
    action: Float[Any, "B T A"]
    reward: Float[Any, "B T"]
    """Follows the action of its step, unscaled."""
    return_to_go: Float[Any, "B T"]
    """Target return less the rewards before this step, unscaled."""
    completion: Float[Any, "B T"]
    """1 where, after this step, the trajectory has reached the chain's target return."""
    step: Int[Any, "B T"]
    """Step within its episode, from 0."""
    episode: Int[Any, "B T"]
    """Index of the trajectory within its chain, from 0."""
    segment_ids: Int[Any, "B T"] | None
    """1, 2, ... for the chains of a row; 0 for padding. None says that each row is one chain, padding behind it: a
    causal model then needs to tell nothing apart, and faster attention can be used."""
    loss_mask: Float[Any, "B T"]
    """1 where the action is to be predicted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """What an agent must know of its data: sizes and scales. Written into the run folder as JSON."""

    task: str
    observation_mean: tuple[float, ...]
    observation_std: tuple[float, ...]
    action_dim: int
    action_repeat: int
    """Simulator control steps an action is held for."""
    episode_steps: int
    """Longest episode, in agent steps."""
    returns: tuple[float, ...]
    """Return of every episode, ascending, unscaled."""
    reward_abs_max: float
    num_episodes: int
    source: str
    """Folder or archive the episodes came from."""
    subset: str
    """Name of the subset of the source."""
    subset_digest: str
    """SHA-256 of the names of its episodes."""
    digest: str
    """Store digest."""

    @property
    def observation_dim(self) -> int:
        """Length of an observation."""
        return len(self.observation_mean)

    @property
    def largest_return(self) -> float:
        """Return of the best episode."""
        return self.returns[-1]

    @property
    def mean_return(self) -> float:
        """Mean return of the data."""
        return float(np.mean(self.returns))


@dataclasses.dataclass(frozen=True)
class EpisodeFailure:
    """An episode that the simulator ended: its state was no longer a number, or out of all bounds."""

    chain: int
    episode: int
    """Index within its chain."""
    step: int
    """Agent step within the episode that had no result."""
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeLog:
    """Every return of a rollout: C chains of n episodes each. All protocols are read from it."""

    returns: Float[np.ndarray, "C n"]
    """Undiscounted raw return of each episode, in the order it was played within its chain."""
    num_steps: Int[np.ndarray, "C n"]
    """Agent steps of each episode."""
    context: str
    """`chain`: one context over the n episodes; `memoryless`: context cleared before each; `random`: no model."""
    task: str
    action_repeat: int
    target_return: float
    """Return asked of each episode; NaN where the policy asks for none."""
    seed: int
    """Seed of the environments."""
    seconds: float = float("nan")
    """Wall time of the rollout, compilation included. No part of what was found: the JSON form leaves it out."""
    failures: tuple[EpisodeFailure, ...] = ()
    """Episodes that the simulator ended; their returns and steps are those up to then."""
