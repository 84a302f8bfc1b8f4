"""The maths of every reward: vectorised formulas over physical features, observation and action.

A formula takes `features` (name to float64 array of shape [...]), `observation` [..., O] and `action` [..., A] in
[-1, 1], all of the state that the action led to, and returns the reward [...].

Source: the tasks of dm_control's suite; the custom tasks of URLB (Laskin et al. 2021) and ExoRL (Yarats et al. 2022).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Features = Mapping[str, Numbers]
Formula = Callable[[Features, np.ndarray | None, np.ndarray], np.ndarray]
Sigmoid = Literal[
    "gaussian", "hyperbolic", "long_tail", "reciprocal", "cosine", "linear", "quadratic", "tanh_squared"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number that a family of tasks takes."""

    least: float
    most: float
    unit: str
    smallest: float = 0.0
    """Least absolute value: a speed of 0 has no direction and no margin."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks of one formula that differ in numbers."""

    domain: str
    formula: Callable[..., Numbers]
    """Takes the parameters by keyword beside what every formula takes."""
    parameters: Mapping[str, Parameter]
    """In the order of the canonical spelling."""


def tolerance(
    x: Float[np.ndarray, "..."],
    *,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: float = 0.0,
    sigmoid: Sigmoid = "gaussian",
    value_at_margin: float = 0.1,
) -> Numbers:
    """Returns 1 where x lies within the bounds and less the further away it is; dm_control's function of that name.

    Args:
      x: Any quantity; bounds and margin have its unit.
      bounds: Lowest and highest value that earn 1, both included.
      margin: Distance from the bounds at which the result is `value_at_margin`; with 0 it is 0 outside.
      sigmoid: Shape of the fall.
      value_at_margin: In (0, 1); 0 as well for cosine, linear and quadratic.

    Raises:
      ValueError: If the bounds are not in order, or margin or value_at_margin is out of range.
    """
    low, high = bounds
    least = 0 if sigmoid in ("cosine", "linear", "quadratic") else np.nextafter(0, 1)
    if not (low <= high and margin >= 0 and least <= value_at_margin < 1):
        raise ValueError(
            "tolerance needs bounds in order, margin >= 0 and value_at_margin in (0, 1); got "
            f"{bounds}, {margin} and {value_at_margin} for {sigmoid}. Change them."
        )
    within = (low <= x) & (x <= high)
    if margin == 0:
        return np.where(within, 1.0, 0.0)
    distance = np.where(x < low, low - x, x - high) / margin
    return np.where(within, 1.0, _fall(np.where(within, 0.0, distance), value_at_margin, sigmoid))


def _fall(distance: Numbers, value_at_1: float, sigmoid: Sigmoid) -> Numbers:
    """Returns 1 at distance 0 and `value_at_1` at distance 1."""
    match sigmoid:
        case "gaussian":
            return np.exp(math.log(value_at_1) * np.square(distance))
        case "hyperbolic":
            # 1 / cosh(z), written so that it does not overflow far away.
            shrunk: Numbers = np.exp(-math.acosh(1 / value_at_1) * distance)
            return 2 * shrunk / (1 + shrunk * shrunk)
        case "long_tail":
            return 1 / ((1 / value_at_1 - 1) * np.square(distance) + 1)
        case "reciprocal":
            return 1 / ((1 / value_at_1 - 1) * distance + 1)
        case "cosine":
            angle = np.minimum(math.acos(2 * value_at_1 - 1) * distance, np.pi)
            return (1 + np.cos(angle)) / 2
        case "linear":
            return np.maximum(1 - (1 - value_at_1) * distance, 0.0)
        case "quadratic":
            return np.maximum(1 - (1 - value_at_1) * np.square(distance), 0.0)
        case "tanh_squared":
            return 1 - np.square(np.tanh(math.atanh(math.sqrt(1 - value_at_1)) * distance))


def _at_least(x: Numbers, target: float, value_at_margin: float) -> Numbers:
    """Returns 1 from `target` upwards, `value_at_margin` a whole target below it, linear between."""
    return tolerance(
        x,
        bounds=(target, math.inf),
        margin=target,
        sigmoid="linear",
        value_at_margin=value_at_margin,
    )


def _along(speed: float, velocity: Numbers) -> Numbers:
    return velocity if speed > 0 else -velocity


def _walker_height(features: Features, observation: object, action: Numbers, *, height: float) -> Numbers:
    standing = tolerance(features["torso_height"], bounds=(height, math.inf), margin=height / 2)
    return (3 * standing + (1 + features["torso_upright"]) / 2) / 4


def _walker_speed(features: Features, observation: object, action: Numbers, *, speed: float) -> Numbers:
    # The suite's margin of half the speed with value 0.5 is the same line.
    moving = _at_least(_along(speed, features["horizontal_velocity"]), abs(speed), 0.0)
    return _walker_height(features, observation, action, height=1.2) * (5 * moving + 1) / 6


def _walker_spin(features: Features, observation: object, action: Numbers, *, momentum: float) -> Numbers:
    spinning = _at_least(_along(momentum, features["angular_momentum"]), abs(momentum), 0.0)
    return _walker_height(features, observation, action, height=1.2) * (5 * spinning + 1) / 6


def _cheetah_speed(features: Features, observation: object, action: Numbers, *, speed: float) -> Numbers:
    return _at_least(_along(speed, features["horizontal_velocity"]), abs(speed), 0.0)


def _cheetah_spin(features: Features, observation: object, action: Numbers, *, momentum: float) -> Numbers:
    return _at_least(_along(momentum, features["angular_momentum"]), abs(momentum), 0.0)


def _quadruped_stand(features: Features, observation: object, action: Numbers) -> Numbers:
    return (1 + features["torso_upright"]) / 2


def _quadruped_speed(
    features: Features, observation: object, action: Numbers, *, speed: float, heading: float
) -> Numbers:
    angle = math.radians(heading)
    velocity = features["torso_velocity_x"] * math.cos(angle) + features["torso_velocity_y"] * math.sin(angle)
    return _quadruped_stand(features, observation, action) * _at_least(velocity, speed, 0.5)


def _quadruped_height(features: Features, observation: object, action: Numbers, *, height: float) -> Numbers:
    return _quadruped_stand(features, observation, action) * _at_least(
        features["centre_of_mass_height"], height, 0.5
    )


def _cartpole_position(
    features: Features, observation: object, action: Numbers, *, position: float
) -> Numbers:
    upright = (1 + features["pole_cosine"]) / 2
    centred = tolerance(features["cart_position"], bounds=(position, position), margin=2)
    small_control = tolerance(action[..., 0], margin=1, sigmoid="quadratic", value_at_margin=0)
    small_velocity = tolerance(features["pole_angular_velocity"], margin=5)
    return upright * (4 + small_control) / 5 * (1 + small_velocity) / 2 * (1 + centred) / 2


def _cartpole_sparse(features: Features, observation: object, action: Numbers) -> Numbers:
    centred = tolerance(features["cart_position"], bounds=(-0.25, 0.25))
    return centred * tolerance(features["pole_cosine"], bounds=(0.995, 1))


def _point_mass_maze_reach(
    features: Features, observation: object, action: Numbers, *, x: float, y: float
) -> Numbers:
    distance = np.hypot(features["x"] - x, features["y"] - y)
    near = tolerance(distance, bounds=(0, 0.015), margin=0.015)
    small_control: Numbers = tolerance(action, margin=1, sigmoid="quadratic", value_at_margin=0).mean(axis=-1)
    return near * (4 + small_control) / 5


def _jaco_reach(
    features: Features, observation: object, action: Numbers, *, x: float, y: float, z: float
) -> Numbers:
    apart = [features[f"tool_centre_{axis}"] - goal for axis, goal in (("x", x), ("y", y), ("z", z))]
    distance = np.sqrt(apart[0] ** 2 + apart[1] ** 2 + apart[2] ** 2)
    return tolerance(distance, bounds=(0, 0.05), margin=0.05)


_SIGNED_SPEED = Parameter(least=-100, most=100, unit="m/s, negative for backwards", smallest=0.01)
_MOMENTUM = Parameter(least=-100, most=100, unit="kg m^2/s, negative for the other way round", smallest=0.01)
_METRES = functools.partial(Parameter, unit="m")

FAMILIES: Mapping[str, Family] = {
    name: Family(domain=domain, formula=formula, parameters=parameters)
    for domain, name, formula, parameters in (
        ("cartpole", "cartpole_position", _cartpole_position, {"position": _METRES(least=-1.8, most=1.8)}),
        ("cheetah", "cheetah_speed", _cheetah_speed, {"speed": _SIGNED_SPEED}),
        ("cheetah", "cheetah_spin", _cheetah_spin, {"momentum": _MOMENTUM}),
        (
            "jaco",
            "jaco_reach",
            _jaco_reach,
            {
                "x": _METRES(least=-1, most=1),
                "y": _METRES(least=-1, most=1),
                "z": _METRES(least=0, most=1.5),
            },
        ),
        (
            "point_mass_maze",
            "point_mass_maze_reach",
            _point_mass_maze_reach,
            {"x": _METRES(least=-0.3, most=0.3), "y": _METRES(least=-0.3, most=0.3)},
        ),
        ("quadruped", "quadruped_height", _quadruped_height, {"height": _METRES(least=0.01, most=10)}),
        (
            "quadruped",
            "quadruped_speed",
            _quadruped_speed,
            {
                "speed": Parameter(least=0.01, most=100, unit="m/s"),
                "heading": Parameter(least=-180, most=180, unit="degrees from forward to the left"),
            },
        ),
        ("walker", "walker_height", _walker_height, {"height": _METRES(least=0.01, most=10)}),
        ("walker", "walker_speed", _walker_speed, {"speed": _SIGNED_SPEED}),
        ("walker", "walker_spin", _walker_spin, {"momentum": _MOMENTUM}),
    )
}
"""Families of tasks by name; parameters in the order of their canonical spelling."""


def _corners(reach: Callable[..., Numbers], distance: float, **rest: float) -> dict[str, Formula]:
    return {
        f"reach_{side}_{end}": functools.partial(reach, x=x, y=y, **rest)
        for side, y in (("top", distance), ("bottom", -distance))
        for end, x in (("left", -distance), ("right", distance))
    }


NAMED: Mapping[str, Mapping[str, Formula]] = {
    "cartpole": {
        "balance": functools.partial(_cartpole_position, position=0),
        "balance_sparse": _cartpole_sparse,
        "swingup": functools.partial(_cartpole_position, position=0),
        "swingup_sparse": _cartpole_sparse,
    },
    "cheetah": {
        "run": functools.partial(_cheetah_speed, speed=10),
        "run_backward": functools.partial(_cheetah_speed, speed=-10),
        "flip": functools.partial(_cheetah_spin, momentum=5),
        "flip_backward": functools.partial(_cheetah_spin, momentum=-5),
    },
    "jaco": _corners(_jaco_reach, 0.09, z=0.001),
    "point_mass_maze": _corners(_point_mass_maze_reach, 0.15),
    "quadruped": {
        "walk": functools.partial(_quadruped_speed, speed=0.5, heading=0),
        "run": functools.partial(_quadruped_speed, speed=5, heading=0),
        "stand": _quadruped_stand,
        "jump": functools.partial(_quadruped_height, height=1),
    },
    "walker": {
        "stand": functools.partial(_walker_height, height=1.2),
        "walk": functools.partial(_walker_speed, speed=1),
        "run": functools.partial(_walker_speed, speed=8),
        "flip": functools.partial(_walker_spin, momentum=5),
    },
}
"""Formula of every named task, by domain and name within the domain."""
