"""Every task as a dm_env: flat float32 observation, actions in [-1, 1]."""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import dm_env
import numpy as np
from dm_env import specs
from gymnasium.vector import VectorEnv
from jaxtyping import Float

from bpt_rl.envs import processes, reward_functions
from bpt_rl.envs.reports import unreported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """Sizes of a simulated body, and its tasks."""

    observation_dim: int
    action_dim: int
    physics_dim: int
    """Numbers of `physics.get_state()`: qpos, qvel and, for the quadruped, actuator activations."""
    tasks: tuple[str, ...]
    """Full names, domain first; those of the suite stand before those that ExoRL and URLB add."""
    episode_steps: int = 1000
    """Control steps of an episode; no task ends earlier."""


DOMAINS: Mapping[str, Domain] = {
    "cartpole": Domain(
        observation_dim=5,
        action_dim=1,
        physics_dim=4,
        tasks=("cartpole_balance", "cartpole_balance_sparse", "cartpole_swingup", "cartpole_swingup_sparse"),
    ),
    "walker": Domain(
        observation_dim=24,
        action_dim=6,
        physics_dim=18,
        tasks=("walker_stand", "walker_walk", "walker_run", "walker_flip"),
    ),
    "cheetah": Domain(
        observation_dim=17,
        action_dim=6,
        physics_dim=18,
        tasks=("cheetah_run", "cheetah_run_backward", "cheetah_flip", "cheetah_flip_backward"),
    ),
    "quadruped": Domain(
        observation_dim=78,
        action_dim=12,
        physics_dim=57,
        tasks=("quadruped_walk", "quadruped_run", "quadruped_stand", "quadruped_jump"),
    ),
    "point_mass_maze": Domain(
        observation_dim=4,
        action_dim=2,
        physics_dim=4,
        tasks=(
            "point_mass_maze_reach_top_left",
            "point_mass_maze_reach_top_right",
            "point_mass_maze_reach_bottom_left",
            "point_mass_maze_reach_bottom_right",
        ),
    ),
    "jaco": Domain(
        observation_dim=42,
        action_dim=9,
        physics_dim=18,
        tasks=(
            "jaco_reach_top_left",
            "jaco_reach_top_right",
            "jaco_reach_bottom_left",
            "jaco_reach_bottom_right",
        ),
        episode_steps=250,
    ),
}


def tasks_of(domain: str) -> tuple[str, ...]:
    """Returns the tasks of a domain by their full names.

    Raises:
      ValueError: If the domain is unknown.
    """
    if domain not in DOMAINS:
        raise ValueError(
            f"A domain must be one of {', '.join(DOMAINS)}; got {domain!r}. {_nearest(domain, DOMAINS)}"
        )
    return DOMAINS[domain].tasks


def domain_of(task: str) -> str:
    """Returns the domain that a task belongs to.

    Args:
      task: A named one, or in any spelling of `bpt_rl.envs.reward_functions`.

    Raises:
      FileNotFoundError: If the task names a file that is not there.
      ValueError: If the task is unknown, and the nearest known one is named, or it is malformed.
    """
    for name, domain in DOMAINS.items():
        if task in domain.tasks:
            return name
    reward_function = reward_functions.find(task)
    if reward_function:
        return reward_function.domain
    known = [task for domain in DOMAINS.values() for task in domain.tasks]
    raise ValueError(
        f"A task must be one of {', '.join(known)}, of a family like walker_speed(speed=4), or a function of "
        f"your own, FILE.py:NAME; got {task!r}. {_nearest(task, known)}"
    )


def _nearest(name: str, known: Any) -> str:
    return f"Nearest valid one: {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]!r}."


class Environment(dm_env.Environment):  # type: ignore[misc]  # dm_env carries no types
    """A simulated task with a flat observation, which holds each action for some control steps.

    Rewards of the held steps are added. An episode that ends in between ends the step.
    """

    def __init__(self, environment: Any, action_repeat: int) -> None:
        self._environment = environment
        self._action_repeat = action_repeat
        self._action_dim = environment.action_spec().shape[0]

    @property
    def physics(self) -> Any:
        """The simulator: a `dm_control.mujoco.Physics`. Ask anew after a reset, which may replace it."""
        return self._environment.physics

    @property
    def task(self) -> Any:
        """The reward and start states: a `dm_control.suite.base.Task`, or `dm_control.composer.Task` for jaco."""
        return self._environment.task

    @property
    def seconds_per_step(self) -> float:
        """Simulated time of a step, the held ones included."""
        return self._action_repeat * float(self._environment.control_timestep())

    def seed(self, seed: int) -> None:
        """Starts the draws of start states anew, as in an environment made with `seed`."""
        self.task.random.seed(seed)

    def reset(self) -> dm_env.TimeStep:
        """Returns the first time step of a new episode."""
        return _flatten(self._environment.reset())

    def step(self, action: Any) -> dm_env.TimeStep:
        """Returns the time step after `action`; the first of a new episode if the last one had ended.

        Raises:
          ValueError: If the action has another shape than the specification.
        """
        if np.shape(action) != (self._action_dim,):
            # MuJoCo would silently broadcast a single number to every actuator.
            raise ValueError(
                f"An action must have shape {(self._action_dim,)}; got {np.shape(action)}. "
                "Pass one number an actuator."
            )
        reward, discount = 0.0, 1.0
        for _ in range(self._action_repeat):
            time_step = self._environment.step(np.asarray(action))
            if time_step.first():
                return _flatten(time_step)
            reward += float(time_step.reward)
            discount *= float(time_step.discount)
            if time_step.last():
                break
        return _flatten(time_step)._replace(reward=reward, discount=discount)

    def reward(self) -> float:
        """Returns the reward of the simulator's present state and control, as one control step gives it."""
        return float(self.task.get_reward(self.physics))

    def observation_spec(self) -> specs.Array:
        """Returns the specification of the flat observation."""
        size = sum(int(np.prod(spec.shape)) for spec in self._environment.observation_spec().values())
        return specs.Array((size,), np.float32, name="observation")

    def action_spec(self) -> specs.BoundedArray:
        """Returns the specification of an action in [-1, 1]."""
        ones = np.ones(self._action_dim, np.float32)
        return specs.BoundedArray(ones.shape, np.float32, -ones, ones, name="action")

    def close(self) -> None:
        """Frees the simulator."""
        # dm_control's action_scale wrapper does not pass `close` on.
        self.physics.free()


def _flatten(time_step: dm_env.TimeStep) -> dm_env.TimeStep:
    return time_step._replace(observation=flat_observation(time_step.observation))


def flat_observation(observation: Mapping[str, Any]) -> Float[np.ndarray, "O"]:
    """Returns the suite's observation as ExoRL stores it: its entries in order, float32."""
    return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)


def make(task: str, seed: int, action_repeat: int = 1) -> Environment:
    """Returns the environment of a task.

    Args:
      task: Like "walker_run", or in any spelling of `bpt_rl.envs.reward_functions`; body and start states are
        then those of the domain's base task (`bpt_rl.envs.formula_task.BASES`).
      seed: Of the start states, in [0, 2**32). Equal seeds give equal episodes.
      action_repeat: Control steps an action is held for; an episode then has that many times fewer steps.

    Raises:
      ValueError: If the task is unknown or a number is out of range.
      ImportError: If MuJoCo is of a version that dm_control cannot work with.
    """
    domain = domain_of(task)
    if action_repeat < 1:
        raise ValueError(
            f"action_repeat must be at least 1; got {action_repeat}. 1 acts at every control step."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32); got {seed}. Choose a smaller number.")
    require_mujoco()
    with _quiet():
        from dm_control.suite.wrappers import action_scale

        environment = _load(domain, task, seed)
    return Environment(action_scale.Wrapper(environment, minimum=-1.0, maximum=1.0), action_repeat)


def _load(domain: str, task: str, seed: int) -> Any:
    # dm_control takes most of a second to import, so that each module with a simulator waits until here.
    reward_function = None if task in DOMAINS[domain].tasks else reward_functions.find(task)
    if reward_function:
        from bpt_rl.envs import formula_task

        environment = _load(domain, formula_task.BASES[domain], seed)
        formula_task.replace_reward(environment, reward_function)
        return environment
    name = task.removeprefix(f"{domain}_")
    if domain == "jaco":
        from bpt_rl.envs import jaco

        return jaco.load(name, seed)
    if domain == "point_mass_maze":
        from bpt_rl.envs import point_mass_maze

        return point_mass_maze.load(name, seed)
    from bpt_rl.envs import custom_tasks

    if task in custom_tasks.TASKS:
        return custom_tasks.load(task, seed)
    from dm_control import suite

    return suite.load(domain, name, task_kwargs={"random": seed})


def make_vector(
    task: str, num_environments: int, seed: int, action_repeat: int = 1, num_workers: int = 0
) -> VectorEnv[Any, Any, Any]:
    """Returns N environments of a task that step together.

    Observations are float32 [N, O], rewards float64 [N]. An episode ends by truncation; that step already
    returns the first observation of the next one, and `infos["final_obs"]` holds the last of the old. So does an
    episode that the simulator breaks off because its state is no number any more; `infos["failure"]` says why.
    A process that dies is replaced, and plays the running episodes again up to where they were.

    Args:
      task: Like "walker_run", or any other that `make` takes; each process loads the file of FILE.py:NAME.
      num_environments: N.
      seed: The start of episode e of environment i depends on (seed, i, e) alone, however the N are grouped.
      action_repeat: Control steps an action is held for.
      num_workers: Simulator processes; 0 means one a core, and there are never more than environments.

    Raises:
      ValueError: If the task is unknown or a number is out of range, or the task is a function that only this
        process knows.
      ImportError: If MuJoCo is of a version that dm_control cannot work with.
      RuntimeError: If a simulator process fails to start.
    """
    # It imports this module.
    from bpt_rl.envs.vector import DMCVectorEnv

    domain_of(task)
    if reward_functions.is_of_this_process(task):
        raise ValueError(
            "Simulator processes must be able to load a reward function; "
            f"{task!r} is registered in this process only. Write the task as FILE.py:{task}."
        )
    require_mujoco()
    if num_environments < 1 or action_repeat < 1:
        raise ValueError(
            "num_environments and action_repeat must be at least 1; got "
            f"{num_environments} and {action_repeat}. 1 environment with action_repeat 1 is the least."
        )
    num_workers = processes.num_processes(num_workers, num_environments)
    return DMCVectorEnv(task, num_environments, seed, action_repeat=action_repeat, num_workers=num_workers)


def physics_state(environment: Environment) -> Float[np.ndarray, "P"]:
    """Returns the simulator's state (qpos, qvel, activations) as ExoRL stores it: a float64 copy."""
    return np.array(environment.physics.get_state(), np.float64)


def require_mujoco() -> None:
    """Checks the installed MuJoCo without importing it.

    Raises:
      ImportError: If it is of a version that dm_control cannot work with.
    """
    installed = importlib.metadata.version("mujoco")
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is None or not (3, 17) <= tuple(map(int, numbers.groups())) < (4, 0):
        raise ImportError(
            f"dm_control works with mujoco>=3.17,<4; mujoco {installed} is installed. "
            'Run: pip install "mujoco>=3.17,<4".'
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what importing dm_control and compiling its models say and a user can do nothing about."""
    with unreported("settotalmass"), warnings.catch_warnings():
        # Looking for a display that a machine without a screen does not have.
        warnings.filterwarnings("ignore", module="glfw")
        yield
