"""The environment loop: a policy in many environments at once, step by step."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv
from jaxtyping import Bool, Float

from bpt_rl.agents.base import Policy


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


def rollout(policy: Policy, environments: VectorEnv, seed: int, target_return: float) -> Iterator[Transition]:
    """Yields transitions without end; one episode follows another in the same carry.

    Args:
      policy: Acts in every environment.
      environments: Of the SAME_STEP autoreset mode. Reset here with `seed`.
      seed: Of the environments' start states.
      target_return: Asked of every episode, less the rewards as they come; NaN asks for none.
    """
    observation, _ = environments.reset(seed=seed)
    return_to_go = np.full(environments.num_envs, target_return)
    carry = policy.start(environments.num_envs)
    while True:
        carry, action = policy.act(carry, observation, return_to_go)
        next_observation, reward, terminated, truncated, _ = environments.step(action)
        done = terminated | truncated
        yield Transition(observation, return_to_go, action, reward, done)
        carry = policy.observe(carry, reward, done)
        observation = next_observation
        return_to_go = np.where(done, target_return, return_to_go - reward)
