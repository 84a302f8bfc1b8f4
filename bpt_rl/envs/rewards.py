"""The reward of any task at recorded states."""

import functools
import threading

import numpy as np
from jaxtyping import Float, Float32

from bpt_rl.envs import features as physical
from bpt_rl.envs import reward_functions, tasks


def relabel(
    task: str,
    physics: Float[np.ndarray, "T1 P"],
    action: Float[np.ndarray, "T1 A"],
    observation: Float[np.ndarray, "T1 O"] | None = None,
) -> Float32[np.ndarray, "T1"]:
    """Returns the reward that `task` gives at each step of a recorded episode.

    A formula over the physical features of each state and the action that led to it; a task that has none
    goes through the simulator. Equal to the environment's own reward to 1e-6.

    Args:
      task: Any task of the recorded body, in any spelling of `bpt_rl.envs.reward_functions`; it need not be the
        one the episode was recorded under.
      physics: State (qpos, qvel, activations) of each row, float64.
      action: In [-1, 1]; action[t] led to physics[t]. Row 0 is the dummy row and is not read.
      observation: Read only by a user's own function.

    Returns:
      One reward a row, 0 in the dummy row.

    Raises:
      FileNotFoundError: If the task names a file that is not there.
      ValueError: If the task is unknown, shapes do not fit the task's body, a value is not finite, or a user's
        own function fails.
    """
    domain = _check_episode(task, physics, action, observation)
    if reward_functions.find(task) is None:
        return relabel_by_simulation(task, physics, action, observation)
    return reward_from_features(task, physical.physical_features(domain, physics), observation, action)


def reward_from_features(
    task: str,
    features: Float[np.ndarray, "*E T1 F"],
    observation: Float[np.ndarray, "*E T1 O"] | None,
    action: Float[np.ndarray, "*E T1 A"],
) -> Float32[np.ndarray, "*E T1"]:
    """Returns the reward of each row of one episode or of a block of them, without physics.

    Args:
      task: One that has a formula.
      features: In the order of `bpt_rl.envs.features.FEATURES`, float64: in float32 the maze's reward is wrong
        by 1e-6, and sparse ones flip at their edge.
      observation: Read only by a user's own function.
      action: In [-1, 1]; action[t] led to the state of row t.

    Returns:
      One reward a row, 0 in the dummy row.

    Raises:
      ValueError: If the task has no formula, the features are not those of its domain, or a user's own function
        fails.
    """
    reward_function = reward_functions.find(task)
    if reward_function is None:
        raise ValueError(
            f"A reward from features needs a formula; {task!r} has none. Relabel it from physics."
        )
    names = physical.FEATURES[reward_function.domain]
    if features.shape[-1] != len(names):
        raise ValueError(
            f"Features of {reward_function.domain} must be {', '.join(names)}; got {features.shape[-1]} columns. "
            "Check that the store belongs to this domain."
        )
    # Row 0 holds no action, so that a function need not expect it.
    by_name = {name: features[..., 1:, i].astype(np.float64) for i, name in enumerate(names)}
    observed = None if observation is None else observation[..., 1:, :]
    reward = np.zeros(action.shape[:-1], np.float32)
    reward[..., 1:] = reward_function(by_name, observed, action[..., 1:, :].astype(np.float64))
    return reward


def relabel_by_simulation(
    task: str,
    physics: Float[np.ndarray, "T1 P"],
    action: Float[np.ndarray, "T1 A"],
    observation: Float[np.ndarray, "T1 O"] | None = None,
) -> Float32[np.ndarray, "T1"]:
    """Returns what `relabel` returns, by putting each state into dm_control's simulator and asking its task.

    Thirty times slower and more: the oracle that formulas are held to, and the way for a task without one. The
    action that led to a state is set too: the cartpole's and the maze's rewards read the control, so that the
    state alone gives a wrong one.

    Raises:
      ValueError: As `relabel`.
    """
    _check_episode(task, physics, action, observation)
    environment = _environment(task, threading.get_ident())
    simulator = environment.physics
    low, high = simulator.model.actuator_ctrlrange.T
    control = low + (high - low) / 2 * (action.astype(np.float64) + 1)
    reward = np.zeros(len(physics), np.float32)
    for t in range(1, len(physics)):
        simulator.set_state(physics[t].astype(np.float64, copy=False))
        simulator.set_control(control[t])
        simulator.forward()
        reward[t] = environment.reward()
    return reward


@functools.lru_cache(maxsize=32)
def _environment(task: str, thread: int) -> tasks.Environment:
    # Compiling a model costs as much as simulating 400 states; one a thread, since it holds the state.
    return tasks.make(task, seed=0)


def _check_episode(
    task: str,
    physics: Float[np.ndarray, "T1 P"],
    action: Float[np.ndarray, "T1_ A"],
    observation: Float[np.ndarray, "T1__ O"] | None,
) -> str:
    """Returns the domain of the task after checking that the arrays are an episode of it."""
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
    return domain


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
