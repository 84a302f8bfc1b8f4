"""Episodes of agent steps from episodes of control steps."""

import numpy as np
from jaxtyping import Float

from bpt_rl.types import Trajectory


def merge(trajectory: Trajectory, action_repeat: int) -> Trajectory:
    """Returns an episode of agent steps: every `action_repeat` control steps made one.

    Observation, action, physics, features and extras are those after the last control step, rewards are added and
    discounts multiplied.

    Raises:
      ValueError: If the episode is not whole agent steps, or an action changes within one.
    """
    if action_repeat == 1:
        return trajectory
    if trajectory.num_steps % action_repeat:
        raise ValueError(
            f"action_repeat must divide the steps of an episode; got {action_repeat} and "
            f"{trajectory.num_steps}. Use a divisor."
        )
    held = trajectory.action[1:].reshape(-1, action_repeat, trajectory.action.shape[1])
    changed = np.flatnonzero((held != held[:, -1:]).any(axis=(1, 2)))
    if changed.size:
        raise ValueError(
            f"An action must be held for action_repeat = {action_repeat} control steps; it changes within "
            f"rows {changed[0] * action_repeat + 1} to {(changed[0] + 1) * action_repeat}. Use that "
            "of the data's collection, or 1."
        )

    def total(values: Float[np.ndarray, "T1 ..."]) -> Float[np.ndarray, "_ ..."]:
        sums = values[1:].reshape(-1, action_repeat, *values.shape[1:]).sum(axis=1, dtype=np.float64)
        return np.concatenate([values[:1], sums.astype(values.dtype)])

    rows = slice(None, None, action_repeat)
    num_rows = trajectory.num_steps + 1
    discount = trajectory.discount[1:].reshape(-1, action_repeat, 1).prod(axis=1)
    return Trajectory(
        observation=trajectory.observation[rows],
        action=trajectory.action[rows],
        reward=total(trajectory.reward),
        discount=np.concatenate([trajectory.discount[:1], discount]),
        physics=trajectory.physics[rows],
        features=None if trajectory.features is None else trajectory.features[rows],
        task_reward={task: total(values) for task, values in trajectory.task_reward.items()},
        extras={k: v[rows] if v.ndim and len(v) == num_rows else v for k, v in trajectory.extras.items()},
    )
