"""ExoRL's point mass in a maze: a plus of walls in a square, one goal in each corner room.

Walls, mass, actuators, start states and rewards are ExoRL's. One thing differs: ExoRL draws the start from
NumPy's global generator, so that its seeds do not repeat an episode; here it is drawn from the task's own.

Source: Yarats et al. 2022 (ExoRL), `custom_dmc_tasks/point_mass_maze.py` of the public code and its model.
"""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
from dm_control import mujoco
from dm_control.rl import control
from dm_control.suite import base, common
from dm_control.utils import rewards

GOALS: Mapping[str, tuple[float, float]] = {
    "reach_top_left": (-0.15, 0.15),
    "reach_top_right": (0.15, 0.15),
    "reach_bottom_left": (-0.15, -0.15),
    "reach_bottom_right": (0.15, -0.15),
}
"""Position of each task's goal in metres: left is -x, top is +y."""
GOAL_RADIUS = 0.015
"""Distance in metres within which the goal is reached; as far again, the reward is a tenth."""
START = ((-0.29, -0.15), (0.15, 0.29))
"""Ranges of x and y, in metres, that an episode starts in: the outer corner of the top left room."""
_TIME_LIMIT = 20.0

# The planes stand where the joints' limits stop the mass; the two bars reach 0.18 m from the centre and leave
# a passage at each outer wall. Full control of one actuator moves the mass at 0.1 m/s in the end.
_MODEL = """
<mujoco model="point mass maze">
  <include file="./common/skybox.xml"/>
  <include file="./common/visual.xml"/>
  <include file="./common/materials.xml"/>
  <option timestep="0.02"/>
  <worldbody>
    <light pos="0 0 1"/>
    <camera name="above" pos="0 0 0.75"/>
    <geom name="floor" type="plane" size="0.3 0.3 0.1" material="grid"/>
    <geom name="wall_left" type="plane" pos="-0.3 0 0.02" zaxis="1 0 0" size="0.02 0.3 0.02" material="decoration"/>
    <geom name="wall_bottom" type="plane" pos="0 -0.3 0.02" zaxis="0 1 0" size="0.3 0.02 0.02" material="decoration"/>
    <geom name="wall_right" type="plane" pos="0.3 0 0.02" zaxis="-1 0 0" size="0.02 0.3 0.02" material="decoration"/>
    <geom name="wall_top" type="plane" pos="0 0.3 0.02" zaxis="0 -1 0" size="0.3 0.02 0.02" material="decoration"/>
    <geom name="bar_across" type="box" pos="0 0 0.02" size="0.18 0.02 0.02" material="decoration"/>
    <geom name="bar_along" type="box" pos="0 0 0.02" size="0.02 0.18 0.02" material="decoration"/>
    <site name="goal" pos="{goal} 0.01" size="{radius}" material="target"/>
    <body name="mass" pos="0 0 0.01">
      <joint name="x" type="slide" axis="1 0 0" limited="true" range="-0.29 0.29" damping="1"/>
      <joint name="y" type="slide" axis="0 1 0" limited="true" range="-0.29 0.29" damping="1"/>
      <geom name="mass" type="sphere" size="0.01" mass="0.3" material="self"/>
    </body>
  </worldbody>
  <actuator>
    <motor name="x" joint="x" gear="0.1" ctrllimited="true" ctrlrange="-1 1"/>
    <motor name="y" joint="y" gear="0.1" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""


def load(goal: str, seed: int) -> control.Environment:
    """Returns the environment that rewards reaching `goal`, a key of `GOALS`."""
    position = " ".join(map(str, GOALS[goal]))
    model = _MODEL.format(goal=position, radius=GOAL_RADIUS)
    physics = mujoco.Physics.from_xml_string(model, common.ASSETS)
    return control.Environment(physics, Reach(GOALS[goal], seed), time_limit=_TIME_LIMIT)


class Reach(base.Task):  # type: ignore[misc]  # dm_control carries no types
    """Move the mass to a goal and stay there with little control.

    The reward is near * (4 + q)/5: near is 1 within `GOAL_RADIUS` and falls off like a Gaussian, q is the mean
    over both actuators of 1 - control^2.
    """

    def __init__(self, goal: tuple[float, float], seed: int) -> None:
        super().__init__(random=seed)
        self._goal = np.array(goal)

    def initialize_episode(self, physics: Any) -> None:
        """Puts the mass at rest somewhere in `START`."""
        for joint, (low, high) in enumerate(START):
            physics.data.qpos[joint] = self.random.uniform(low, high)
        super().initialize_episode(physics)

    def get_observation(self, physics: Any) -> dict[str, Any]:
        """Returns position [2] in metres and velocity [2] in metres a second."""
        return collections.OrderedDict(position=physics.position(), velocity=physics.velocity())

    def get_reward(self, physics: Any) -> float:
        """Returns the reward of the simulator's present state and control."""
        distance = np.linalg.norm(physics.named.data.geom_xpos["mass", :2] - self._goal)
        near = rewards.tolerance(distance, bounds=(0, GOAL_RADIUS), margin=GOAL_RADIUS)
        small_control = rewards.tolerance(physics.control(), margin=1, value_at_margin=0, sigmoid="quadratic")
        return float(near * (4 + small_control.mean()) / 5)
