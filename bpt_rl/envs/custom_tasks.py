"""Tasks that ExoRL and URLB add to bodies of the suite: the stock body and start states, another reward.

Source: Laskin et al. 2021 (URLB) and Yarats et al. 2022 (ExoRL), `custom_dmc_tasks` of their public code.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dm_control.rl import control
from dm_control.suite import cheetah, common, quadruped, walker
from dm_control.utils import rewards

FLIP_MOMENTUM = 5.0
"""Angular momentum of the whole body about the y axis, in kg m^2/s, above which a flip earns all."""
RUN_SPEED = 10.0
"""Speed of the cheetah's centre of mass in m/s above which running earns all."""
JUMP_HEIGHT = 1.0
"""Height of the quadruped's centre of mass in metres above which jumping earns all."""
_QUADRUPED_FLOOR = 10.0
"""Half the side of the drawn floor, in metres, as in the stock walk."""
_CHEETAH_FLOOR = 200.0
"""Half the length of the drawn floor, in metres; the stock one ends two metres behind the start."""


def load(task: str, seed: int) -> control.Environment:
    """Returns the environment of a task, which must be one of `TASKS`, with the task's own action range."""
    return TASKS[task](seed)


def angular_momentum(physics: Any) -> float:
    """Returns the angular momentum of a planar body about its centre of mass, y axis, in kg m^2/s.

    MuJoCo computes it only for models with a subtree velocity sensor, which walker and cheetah have.
    """
    return float(physics.named.data.subtree_angmom["torso"][1])


class WalkerFlip(walker.PlanarWalker):  # type: ignore[misc]  # dm_control carries no types
    """Turn over and over: the stand reward times (5 c + 1)/6, with c = clip(L_y / 5, 0, 1)."""

    def __init__(self, seed: int) -> None:
        # A speed of 0 makes the parent's reward that of standing.
        super().__init__(move_speed=0, random=seed)

    def get_reward(self, physics: Any) -> float:
        """Returns the reward of the simulator's present state."""
        return float(super().get_reward(physics) * (5 * _flipping(angular_momentum(physics)) + 1) / 6)


class CheetahRunBackward(cheetah.Cheetah):  # type: ignore[misc]
    """Run towards negative x: clip(-v_x / 10, 0, 1)."""

    def get_reward(self, physics: Any) -> float:
        """Returns the reward of the simulator's present state."""
        return _share(-physics.speed(), RUN_SPEED)


class CheetahFlip(cheetah.Cheetah):  # type: ignore[misc]
    """Turn over and over: clip(direction L_y / 5, 0, 1)."""

    def __init__(self, direction: int, seed: int) -> None:
        super().__init__(random=seed)
        self._direction = direction

    def get_reward(self, physics: Any) -> float:
        """Returns the reward of the simulator's present state."""
        return _flipping(self._direction * angular_momentum(physics))


class QuadrupedStand(quadruped.Move):  # type: ignore[misc]
    """Keep the torso upright: (1 + u)/2, with u the torso's upward axis."""

    def __init__(self, seed: int) -> None:
        super().__init__(desired_speed=0, random=seed)

    def get_reward(self, physics: Any) -> float:
        """Returns the reward of the simulator's present state."""
        return _upright(physics)


class QuadrupedJump(quadruped.Move):  # type: ignore[misc]
    """Keep the torso upright and the centre of mass high: (1 + u)/2 * clip((1 + z)/2, 0, 1)."""

    def __init__(self, seed: int) -> None:
        super().__init__(desired_speed=0, random=seed)

    def get_reward(self, physics: Any) -> float:
        """Returns the reward of the simulator's present state."""
        height = rewards.tolerance(
            physics.named.data.sensordata["center_of_mass"][2],
            bounds=(JUMP_HEIGHT, float("inf")),
            margin=JUMP_HEIGHT,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return _upright(physics) * float(height)


def _share(value: float, target: float) -> float:
    return float(
        rewards.tolerance(
            value, bounds=(target, float("inf")), margin=target, value_at_margin=0, sigmoid="linear"
        )
    )


def _flipping(momentum: float) -> float:
    return _share(momentum, FLIP_MOMENTUM)


def _upright(physics: Any) -> float:
    upward = physics.torso_upright()
    return float(
        rewards.tolerance(upward, bounds=(1, float("inf")), margin=2, value_at_margin=0, sigmoid="linear")
    )


def _walker(task: walker.PlanarWalker) -> control.Environment:
    physics = walker.Physics.from_xml_string(*walker.get_model_and_assets())
    return control.Environment(physics, task, time_limit=25, control_timestep=0.025)


def _cheetah(task: cheetah.Cheetah) -> control.Environment:
    physics = cheetah.Physics.from_xml_string(*cheetah.get_model_and_assets())
    # Planes are endless to the simulator; their size is only drawn.
    physics.named.model.geom_size["ground", 0] = _CHEETAH_FLOOR
    return control.Environment(physics, task, time_limit=10)


def _quadruped(task: quadruped.Move) -> control.Environment:
    model = quadruped.make_model(floor_size=_QUADRUPED_FLOOR)
    physics = quadruped.Physics.from_xml_string(model, common.ASSETS)
    return control.Environment(physics, task, time_limit=20, control_timestep=0.02)


TASKS: Mapping[str, Callable[[int], control.Environment]] = {
    "walker_flip": lambda seed: _walker(WalkerFlip(seed)),
    "cheetah_run_backward": lambda seed: _cheetah(CheetahRunBackward(random=seed)),
    "cheetah_flip": lambda seed: _cheetah(CheetahFlip(1, seed)),
    "cheetah_flip_backward": lambda seed: _cheetah(CheetahFlip(-1, seed)),
    "quadruped_stand": lambda seed: _quadruped(QuadrupedStand(seed)),
    "quadruped_jump": lambda seed: _quadruped(QuadrupedJump(seed)),
}
"""By full name: makes the environment from a seed."""
