"""ExoRL's Jaco arm, which brings the point between its three fingers to one of four places on the table.

Arm, hand and start states are dm_control's `manipulation` parts, put together as ExoRL does: the goal is a
fixed site and is not observed. Only these parts are imported, since `labmaze` is missing on Python 3.13.

Source: Yarats et al. 2022 (ExoRL), `custom_dmc_tasks/jaco.py` of the public code.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from dm_control import composer
from dm_control.composer import initializers
from dm_control.composer.variation import distributions
from dm_control.manipulation.shared import arenas, cameras, constants, observations, robots, workspaces
from dm_control.utils import rewards

from bpt_rl.envs.reports import unreported

GOALS: Mapping[str, tuple[float, float, float]] = {
    "reach_top_left": (-0.09, 0.09, 0.001),
    "reach_top_right": (0.09, 0.09, 0.001),
    "reach_bottom_left": (-0.09, -0.09, 0.001),
    "reach_bottom_right": (0.09, -0.09, 0.001),
}
"""Position of each task's goal in metres: left is -x, top is +y, towards the arm's base."""
GOAL_RADIUS = 0.05
"""Distance in metres within which the goal is reached; as far again, the reward is a tenth."""
START = ((-0.2, -0.2, 0.02), (0.2, 0.2, 0.4))
"""Lowest and highest place, in metres, that the tool centre starts at, pointing down."""
_TIME_LIMIT = 10.0


def load(goal: str, seed: int) -> composer.Environment:
    """Returns the environment that rewards reaching `goal`, a key of `GOALS`."""
    with warnings.catch_warnings():
        # Importing composer makes Python show every deprecation, those of dm_control included.
        warnings.simplefilter("ignore", DeprecationWarning)
        task = Reach(GOALS[goal], seed)
        # The model never changes, so that it need not be compiled for each episode.
        return composer.Environment(
            task, time_limit=_TIME_LIMIT, random_state=task.random, recompile_mjcf_every_episode=False
        )


class Reach(composer.Task):  # type: ignore[misc]  # dm_control carries no types
    """Bring the tool centre to a goal: 1 within `GOAL_RADIUS`, and a Gaussian fall beyond."""

    def __init__(self, goal: tuple[float, float, float], seed: int) -> None:
        self.random = np.random.RandomState(seed)
        """Draws the start states, as in the suite's tasks."""
        self._goal = np.array(goal)
        self._arena = arenas.Standard()
        arm = robots.make_arm(observations.PERFECT_FEATURES)
        self._hand = robots.make_hand(observations.PERFECT_FEATURES)
        arm.attach(self._hand)
        self._arena.attach_offset(arm, offset=robots.ARM_OFFSET)
        self.control_timestep = constants.CONTROL_TIMESTEP
        self._start = initializers.ToolCenterPointInitializer(
            self._hand, arm, position=distributions.Uniform(*START), quaternion=workspaces.DOWN_QUATERNION
        )
        cameras.add_camera_observables(self._arena, observations.PERFECT_FEATURES, cameras.FRONT_CLOSE)
        workspaces.add_target_site(
            self._arena.mjcf_model.worldbody, GOAL_RADIUS, visible=True, rgba=constants.RED, name="goal"
        ).pos = goal

    @property
    def root_entity(self) -> Any:
        """The arena that all else is attached to."""
        return self._arena

    def initialize_episode(self, physics: Any, random_state: np.random.RandomState) -> None:
        """Closes the fingers by a random share and puts the tool centre somewhere in `START`, at rest."""
        self._hand.set_grasp(physics, close_factors=random_state.uniform())
        # Inverse kinematics reports starts that it cannot reach; another one is drawn then.
        with unreported("Failed to converge"):
            self._start(physics, random_state)

    def get_reward(self, physics: Any) -> float:
        """Returns the reward of the simulator's present state."""
        distance = np.linalg.norm(physics.bind(self._hand.tool_center_point).xpos - self._goal)
        return float(rewards.tolerance(distance, bounds=(0, GOAL_RADIUS), margin=GOAL_RADIUS))
