"""Recording exploratory episodes in ExoRL's layout."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bpt_rl import config_toml
from bpt_rl.agents.ornstein_uhlenbeck import OrnsteinUhlenbeckPolicy
from bpt_rl.agents.random import RandomPolicy
from bpt_rl.collect_config import CollectConfig
from bpt_rl.datasets import exorl
from bpt_rl.envs import processes, tasks
from bpt_rl.run import records
from bpt_rl.types import Trajectory

_FREE_FIELDS = ("num_steps", "num_workers", "out")
"""Fields of the configuration that no recorded episode depends on."""


def collect(config: CollectConfig, report_progress: Callable[..., None] | None = None) -> Path:
    """Returns the folder `{out}/{domain}/{algorithm}/buffer`, filled with episodes in ExoRL's layout.

    Of noise, episode i depends on the configuration and (seed, i) alone. Whole episodes that lie there already
    are kept, so that an interrupted collection goes on and a larger one adds to it; what an explorer needs
    for that, `bpt_rl.run.explore` says. The configuration is written beside the buffer, as collect.toml.

    Args:
      config: What to record, and where.
      report_progress: Called with the episodes there and their number, first for those kept; of an explorer
        with steps, their number and a note.

    Raises:
      ValueError: If the task is unknown, the action repeat does not divide an episode, or the folder holds
        episodes of another configuration.
      OSError: If an episode cannot be written, or another process collects into the folder.
    """
    domain = tasks.domain_of(config.task)
    episode_steps = tasks.DOMAINS[domain].episode_steps
    if episode_steps % config.action_repeat:
        raise ValueError(
            f"action_repeat must divide the {episode_steps} control steps of an episode; got "
            f"{config.action_repeat}. Use a divisor, like 2, 4 or 5."
        )
    buffer = Path(config.out) / domain / config.algorithm / "buffer"
    with _claimed(buffer.parent, config):
        if config.is_learning:
            # It brings JAX along, which noise does without.
            from bpt_rl.run.explore import explore

            explore(config, buffer, report_progress)
        else:
            _collect_noise(config, buffer, -(-config.num_steps // episode_steps), report_progress)
    return buffer


def _collect_noise(
    config: CollectConfig, buffer: Path, num_episodes: int, report_progress: Callable[..., None] | None
) -> None:
    episode_steps = tasks.DOMAINS[tasks.domain_of(config.task)].episode_steps
    names = [f"episode_{i:06d}_{episode_steps}.npz" for i in range(num_episodes)]
    missing = [(i, buffer / name) for i, name in enumerate(names) if not _is_whole(buffer / name)]
    done = num_episodes - len(missing)
    if report_progress:
        report_progress(done, num_episodes)
    num_workers = processes.num_processes(config.num_workers, max(1, len(missing)))
    record = functools.partial(_write, config=config)
    for _ in processes.map_in_order(record, missing, num_workers=num_workers):
        done += 1
        if report_progress:
            report_progress(done, num_episodes)


def record_episode(config: CollectConfig, index: int) -> Trajectory:
    """Returns episode `index`: every control step, with its own state and reward under `config.task`."""
    # The first seed is that of environment `index` in `make_vector`, too.
    environment_seed, policy_seed = np.random.SeedSequence([config.seed, index]).generate_state(2)
    environment = tasks.make(config.task, int(environment_seed))
    policy = _policy(config, environment.action_spec().shape[0], int(policy_seed))
    time_step = environment.reset()
    action = np.zeros(environment.action_spec().shape, np.float32)
    observations, actions = [time_step.observation], [action]
    rewards, states = [0.0], [tasks.physics_state(environment)]
    carry = policy.start(1)
    while not time_step.last():
        if (len(actions) - 1) % config.action_repeat == 0:
            carry, (action,) = policy.act(carry, time_step.observation[None], np.zeros(1))
        time_step = environment.step(action)
        observations.append(time_step.observation)
        actions.append(action)
        rewards.append(time_step.reward)
        states.append(tasks.physics_state(environment))
    environment.close()
    return Trajectory(
        observation=np.stack(observations),
        action=np.stack(actions),
        reward=_column(rewards),
        discount=_column([1.0] * len(rewards)),
        physics=np.stack(states),
    )


def _policy(config: CollectConfig, action_dim: int, seed: int) -> Any:
    if config.algorithm == "random":
        return RandomPolicy(action_dim, seed)
    return OrnsteinUhlenbeckPolicy(action_dim, seed, config.noise_decay, config.noise_scale)


def _column(values: list[float]) -> Float[np.ndarray, "T1 1"]:
    return np.array(values, np.float32)[:, None]


def _write(episode: tuple[int, Path], *, config: CollectConfig) -> None:
    index, path = episode
    exorl.write_episode(path, record_episode(config, index))


def _is_whole(path: Path) -> bool:
    try:
        exorl.read_episode(path)
    except (FileNotFoundError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _claimed(folder: Path, config: CollectConfig) -> Iterator[None]:
    """Keeps other processes out of the folder, once its episodes are known to be of this configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    # The lock is the folder's own: it leaves no file behind, and ends with this process, however that ends.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                errno.EAGAIN,
                f"One process at a time may collect into a folder; another one collects into {folder}. Wait for its "
                "end, or choose another `out`.",
            ) from error
        _check_alike(folder, config)
        yield
    finally:
        os.close(descriptor)


def _check_alike(folder: Path, config: CollectConfig) -> None:
    """Writes the configuration beside the buffer, or checks that the one there makes the same episodes."""
    path = folder / "collect.toml"
    if not path.exists():
        if any((folder / "buffer").glob("*.npz")):
            raise ValueError(
                f"A folder must hold the episodes of one collection; {folder} holds others. "
                "Choose another `out`."
            )
        records.write_atomically(path, config_toml.to_toml(config))
        return
    there = _flat(config_toml.load(CollectConfig, str(path)))
    for name, new in _flat(config).items():
        if name not in _FREE_FIELDS and there[name] != new:
            raise ValueError(
                f"A folder must hold the episodes of one collection; {folder} was collected with "
                f"{name} = {there[name]!r}, and {new!r} is asked for. Choose another `out`, or the same value."
            )


def _flat(config: CollectConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    exploration = values.pop("exploration")
    return values | {f"exploration.{name}": value for name, value in exploration.items()}
