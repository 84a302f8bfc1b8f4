"""Chains of hindsight: trajectories ascending by return, asked for the best return among them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from bpt_rl.config import Relabel
from bpt_rl.types import Trajectory

RELATIVE_TOLERANCE = 1e-6
"""Share of the target by which a float32 sum of rewards may miss it and still count as reaching it."""
SMALLEST_RETURN = np.float32(2.0**-100)
"""Collected returns below it count as 0: float32 keeps differences of larger ones normal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """N trajectories in one sequence of T steps, without dummy rows; fields as in `PackedBatch`."""

    observation: Float[np.ndarray, "T O"]
    action: Float[np.ndarray, "T A"]
    reward: Float[np.ndarray, "T"]
    return_to_go: Float[np.ndarray, "T"]
    completion: Float[np.ndarray, "T"]
    step: Int[np.ndarray, "T"]
    episode: Int[np.ndarray, "T"]
    loss_mask: Float[np.ndarray, "T"]
    target_return: float
    """Asked of its trajectories: their largest return, unless another was given."""
    returns: Float[np.ndarray, "N"]
    """Whole-episode returns in float32, in the chain's order."""

    @property
    def num_steps(self) -> int:
        """Steps of all trajectories together."""
        return len(self.reward)


def collected_returns(reward: Float[np.ndarray, "*E T"]) -> Float32[np.ndarray, "*E T1"]:
    """Returns the reward collected before each step and, in the last entry, at the end; the first is 0.

    Summed in float64 and rounded once, so that all that follows is a single subtraction or comparison in
    float32: it has the same bits in NumPy and on an accelerator, which has no float64.

    Args:
      reward: Environment reward after each action, unscaled, without the dummy row; of one or many episodes.

    Raises:
      ValueError: If there is no step, or a reward is not finite.
    """
    if not reward.size or not np.isfinite(reward).all():
        raise ValueError(
            f"reward must hold at least one step and only finite values; got {reward.size} steps, "
            f"{np.count_nonzero(~np.isfinite(reward))} of them not finite. Check the episode with `data verify`."
        )
    collected = np.zeros((*reward.shape[:-1], reward.shape[-1] + 1), np.float32)
    collected[..., 1:] = np.cumsum(reward, axis=-1, dtype=np.float64)
    return without_subnormals(collected)


def without_subnormals(values: Float32[np.ndarray, "*any"]) -> Float32[np.ndarray, "*any"]:
    """Returns the values with 0 for those so small that a difference of two could be subnormal.

    XLA takes subnormal results for 0 where NumPy does not, and rewards far from a goal do become that small.
    """
    return np.where(np.abs(values) < SMALLEST_RETURN, np.float32(0), values)


def returns_to_go(reward: Float[np.ndarray, "T"], target: float | None = None) -> Float32[np.ndarray, "T"]:
    """Returns the reward still to be collected before each step, counting that step's own.

    The target in float32 less `collected_returns`: its error is at most 2e-7 of the larger of the two.

    Args:
      reward: Environment reward after each action, unscaled.
      target: Return asked of the whole trajectory; its own return if None. A larger target leaves a positive
        remainder at the end: that is what hindsight relabelling asks for.

    Raises:
      ValueError: If `reward` is empty or not finite.

    Source: Chen et al. 2021, section 3; Liu and Abbeel 2023, section 3.
    """
    collected = collected_returns(reward)
    asked = collected[-1:] if target is None else without_subnormals(np.array([target], np.float32))
    return np.asarray(asked - collected[:-1])


def reach_threshold(target: float, scale: float | None = None) -> float:
    """Returns the smallest collected return that counts as the target; see `reaches`."""
    return target - RELATIVE_TOLERANCE * max(1.0, abs(target if scale is None else scale))


def reaches(
    collected: Float[np.ndarray, "*any"], target: float, scale: float | None = None
) -> Bool[np.ndarray, "*any"]:
    """Returns where a collected return reaches the target, up to float32 rounding of sums of this scale.

    Args:
      collected: Rewards collected, or less what is still asked for.
      target: What is to be reached.
      scale: Size of the returns that were summed; the target's if None.
    """
    return np.asarray(collected >= reach_threshold(target, scale))


def completions(
    return_to_go: Float[np.ndarray, "B"],
    reward: Float[np.ndarray, "B"],
    done: Bool[np.ndarray, "B"],
    *,
    scale: float,
    completion: str,
) -> Bool[np.ndarray, "B"]:
    """Returns the flags of a step being played, by the rule of `build_chain`.

    Args:
      return_to_go: Asked before the step, unscaled.
      reward: Of the step.
      done: Where it ended its episode.
      scale: Size of the returns of the training data.
      completion: `per_episode` or `per_step`.
    """
    reached = reaches(-return_to_go + reward, 0.0, scale)
    return reached & done if completion == "per_episode" else reached


def build_chain(
    trajectories: Sequence[Trajectory],
    task: str,
    *,
    relabel: Relabel = "chain_maximum",
    expected: Sequence[Float[np.ndarray, "_"]] | None = None,
    completion: Literal["per_episode", "per_step"] = "per_episode",
    loss_on: Literal["all", "last"] = "all",
    windows: Sequence[slice] | None = None,
    target_return: float | None = None,
    order: Literal["ascending", "given"] = "ascending",
) -> Chain:
    """Returns the trajectories as one chain of hindsight.

    Args:
      trajectories: To be ordered by `order`.
      task: Which of `Trajectory.task_reward` counts.
      relabel: Ask every trajectory for the chain's largest return, or each for its own, or each step for what was
        to be expected of it.
      expected: With expected_return, the return-to-go of each step of each trajectory, as given; flags are then those
        of its own return.
      completion: Flag the last step of an episode whose return reaches its target, or each step from which on
        the collected return reaches it. The flag follows the reward of its step, so it never tells the future.
      loss_on: Trajectories whose actions are to be predicted: all, or the last (best) alone.
      windows: Steps kept of each trajectory, as given. Returns, returns-to-go, steps and flags stay those of
        the whole episode, so a window means what it means in the middle of an evaluated episode.
      target_return: Asked of every trajectory instead of the chain's largest return: what an evaluation asks for.
      order: Ascending by return, ties in the order given, as the paper has it; or all in the order given.

    Raises:
      ValueError: If there is no trajectory, the task has no relabelled reward, a window exceeds its episode, or a
        target is given where each trajectory is asked for its own return.

    Source: Liu and Abbeel 2023, section 3.
    """
    if not trajectories:
        raise ValueError("A chain must hold at least one trajectory; got none. Draw some from a store.")
    if target_return is not None and relabel != "chain_maximum":
        raise ValueError(
            f"relabel = {relabel} asks each trajectory for its own return; got target_return {target_return}. "
            "Leave it out, or relabel by chain_maximum."
        )
    if (expected is not None) != (relabel == "expected_return"):
        raise ValueError(
            f"Expected returns-to-go are what relabel = expected_return asks for; got relabel {relabel} "
            f"{'without' if expected is None else 'and'} expected. Give both or neither."
        )
    rewards = [_task_reward(trajectory, task) for trajectory in trajectories]
    # As the store has them: summed in float64, dummy row included, and rounded.
    returns = np.array([reward.sum(dtype=np.float64) for reward in rewards], np.float32)
    places = np.argsort(returns, kind="stable") if order == "ascending" else np.arange(len(returns))
    asked = float(returns.max()) if target_return is None else float(target_return)
    pieces = []
    for episode, i in enumerate(places):
        num_steps = trajectories[i].num_steps
        target = asked if relabel == "chain_maximum" else float(returns[i])
        counts = loss_on == "all" or episode == len(places) - 1
        piece = _steps(trajectories[i], rewards[i][1:], target, completion) | {
            "episode": np.full(num_steps, episode, np.int32),
            "loss_mask": np.full(num_steps, counts, np.float32),
        }
        if expected is not None:
            piece["return_to_go"] = np.asarray(expected[i][:num_steps], np.float32)
        if windows is not None:
            piece = {name: array[_checked(windows[i], num_steps)] for name, array in piece.items()}
        pieces.append(piece)
    fields = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return Chain(**fields, target_return=asked, returns=returns[places])


def _steps(
    trajectory: Trajectory, reward: Float[np.ndarray, "T"], target: float, completion: str
) -> dict[str, np.ndarray]:
    reached = collected_returns(reward)[1:] >= np.float32(reach_threshold(target))
    if completion == "per_episode":
        reached[:-1] = False
    return {
        "observation": trajectory.observation[:-1],
        "action": trajectory.action[1:],
        "reward": reward,
        "return_to_go": returns_to_go(reward, target),
        "completion": reached.astype(np.float32),
        "step": np.arange(trajectory.num_steps, dtype=np.int32),
    }


def _task_reward(trajectory: Trajectory, task: str) -> Float[np.ndarray, "T1"]:
    if task not in trajectory.task_reward:
        known = ", ".join(trajectory.task_reward) or "none"
        raise ValueError(
            f"A chain needs trajectories relabelled for its task; got {task!r}, and there is reward for: {known}. "
            "Read them from a store built with that task."
        )
    return trajectory.task_reward[task]


def _checked(window: slice, num_steps: int) -> slice:
    if not 0 <= window.start < window.stop <= num_steps:
        raise ValueError(
            f"A window must lie within its episode; got steps {window.start} to {window.stop} of an episode of "
            f"{num_steps}. Use a shorter window, or leave out the shorter episodes."
        )
    return window
