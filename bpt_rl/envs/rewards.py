"""The reward of any task at recorded states."""

import functools
import threading

import numpy as np
from jaxtyping import Float

from bpt_rl.envs import tasks


def relabel(
    task: str,
    physics: Float[np.ndarray, "T1 P"],
    action: Float[np.ndarray, "T1 A"],
    observation: Float[np.ndarray, "T1 O"] | None = None,
) -> Float[np.ndarray, "T1"]:
    """Returns the reward that `task` gives at each step of a recorded episode, float32.

    Each state is put into the simulator together with the action that led to it: the cartpole's reward reads
    the control, so that the state alone gives a wrong one. Equal to the environment's own reward to 1e-6.

    Args:
      task: Any task of the recorded body; it need not be the one the episode was recorded under.
      physics: State (qpos, qvel, activations) of each row, float64.
      action: In [-1, 1]; action[t] led to physics[t]. Row 0 is the dummy row and is not read.
      observation: Not needed by the simulator; only its rows are checked.

    Returns:
      One reward a row, 0 in the dummy row.

    Raises:
      ValueError: If the task is unknown, shapes do not fit the task's body, or a value is not finite.
    """
    domain = tasks.domain_of(task)
    sizes = tasks.DOMAINS[domain]
    _check("physics", physics, sizes.physics_dim, domain)
    _check("action", action, sizes.action_dim, domain)
    columns = {"physics": physics, "action": action}
    if observation is not None:
        _check("observation", observation, sizes.observation_dim, domain)
        columns["observation"] = observation
    if len({len(values) for values in columns.values()}) > 1:
        rows = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise ValueError(
            f"All arrays of an episode must have the same number of rows; got {rows}. Cut them alike."
        )
    return _simulate(task, physics, action)


def _check(name: str, values: Float[np.ndarray, "T1 D"], size: int, domain: str) -> None:
    if values.shape[1] != size or len(values) < 1:
        raise ValueError(
            f"{name} of {domain} must have shape [T+1, {size}]; got {list(values.shape)}. "
            "Check that the episode belongs to this domain."
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{name} must be finite; got {values[bad[0]][~np.isfinite(values[bad[0]])][0]} in row {bad[0]}. "
            "Leave this episode out."
        )


def _simulate(
    task: str, physics: Float[np.ndarray, "T1 P"], action: Float[np.ndarray, "T1 A"]
) -> Float[np.ndarray, "T1"]:
    environment = _environment(task, threading.get_ident())
    simulator = environment.physics
    low, high = simulator.model.actuator_ctrlrange.T
    control = low + (high - low) / 2 * (action.astype(np.float64) + 1)
    reward = np.zeros(len(physics), np.float32)
    for t in range(1, len(physics)):
        simulator.set_state(physics[t].astype(np.float64, copy=False))
        simulator.set_control(control[t])
        simulator.forward()
        reward[t] = environment.task.get_reward(simulator)
    return reward


@functools.lru_cache(maxsize=32)
def _environment(task: str, thread: int) -> tasks.Environment:
    # Compiling a model costs as much as relabelling 400 states; one a thread, since it holds the state.
    return tasks.make(task, seed=0)
