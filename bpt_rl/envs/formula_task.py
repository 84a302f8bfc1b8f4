"""Simulated tasks whose reward is a formula: of a family, or a user's own function.

Body, start states and length of an episode are those of a base task of the domain.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from bpt_rl.envs import features, tasks
from bpt_rl.envs.reward_functions import RewardFunction

BASES: Mapping[str, str] = {
    "cartpole": "cartpole_swingup",
    "walker": "walker_run",
    "cheetah": "cheetah_run",
    "quadruped": "quadruped_run",
    "point_mass_maze": "point_mass_maze_reach_top_left",
    "jaco": "jaco_reach_top_left",
}
"""Task of each domain that gives body and start states: the cartpole hangs, the mass starts at the top left."""


def replace_reward(environment: Any, reward_function: RewardFunction) -> None:
    """Makes an environment of dm_control's suite or composer pay `reward_function` instead of its own reward."""
    # An attribute of the object hides the method of its class: both kinds of environment ask their task.
    environment.task.get_reward = FormulaReward(task=environment.task, reward_function=reward_function)
    # The base task's goal is not that of the formula, so that no picture may show it.
    if reward_function.domain == "point_mass_maze":
        environment.physics.named.model.site_rgba["goal", 3] = 0
    if reward_function.domain == "jaco":
        environment.task.root_entity.mjcf_model.find("site", "goal").rgba = (0, 0, 0, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormulaReward:
    """The reward of a formula in the simulator's present state."""

    task: Any
    """Gives the observation: a `dm_control.suite.base.Task` or a `dm_control.composer.Task`."""
    reward_function: RewardFunction

    def __call__(self, physics: Any) -> float:
        """Returns what `bpt_rl.envs.rewards.relabel` gives this state and the control that led to it.

        Raises:
          ValueError: If a user's own function fails.
        """
        domain = self.reward_function.domain
        state = np.array(physics.get_state(), np.float64)
        measured = features.physical_features(domain, state[None])
        low, high = physics.model.actuator_ctrlrange.T
        action = 2 * (np.array(physics.control()) - low) / (high - low) - 1
        # The package's own formulas read none.
        observation = self._observation(physics)[None] if self.reward_function.origin else None
        by_name = {name: measured[:, i] for i, name in enumerate(features.FEATURES[domain])}
        return float(self.reward_function(by_name, observation, action[None])[0])

    def _observation(self, physics: Any) -> Float[np.ndarray, "O"]:
        if hasattr(self.task, "get_observation"):
            return tasks.flat_observation(self.task.get_observation(physics))
        observables = self.task.observables.items()
        return tasks.flat_observation({name: measure(physics) for name, measure in observables})
