"""Physical features of recorded states: the few numbers that every reward of a domain is a formula of.

A state costs a few calls into MuJoCo and no Python object of its own, 3 to 5 microseconds. Cartpole and maze are
closed forms.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from bpt_rl.envs import tasks

FEATURES: Mapping[str, tuple[str, ...]] = {
    "cartpole": ("cart_position", "cart_velocity", "pole_cosine", "pole_angular_velocity"),
    "walker": ("torso_height", "torso_upright", "horizontal_velocity", "angular_momentum"),
    "cheetah": ("torso_height", "torso_upright", "horizontal_velocity", "angular_momentum"),
    "quadruped": (
        "torso_upright",
        "torso_velocity_x",
        "torso_velocity_y",
        "torso_velocity_z",
        "centre_of_mass_height",
    ),
    "point_mass_maze": ("x", "y"),
    "jaco": ("tool_centre_x", "tool_centre_y", "tool_centre_z"),
}
"""Names of a domain's features in the order of their columns, in metres, seconds, radians and kilograms.

`torso_upright` is the upward part of the torso's own up, in [-1, 1]. `horizontal_velocity` is that of the whole
body's centre of mass, `angular_momentum` the whole body's about that centre and the y axis. `torso_velocity_*` is
measured in the torso's frame: forwards, to the left and up.
"""


def physical_features(domain: str, physics: Float[np.ndarray, "T1 P"]) -> Float[np.ndarray, "T1 F"]:
    """Returns the features of each state in the order of `FEATURES[domain]`, float64; row 0 is the reset state.

    Equal to what the simulator itself measures in that state to rounding (1e-12 of the size of its numbers).

    Args:
      domain: Like "walker".
      physics: State (qpos, qvel, activations) of each row.

    Raises:
      ValueError: If the domain is unknown or the states are not of its size.
    """
    physics = _checked(domain, physics)
    match domain:
        case "cartpole":
            return np.stack([physics[:, 0], physics[:, 2], _pole(physics)[0], physics[:, 3]], axis=1)
        case "point_mass_maze":
            return physics[:, :2].copy()
        case "quadruped":
            frame, motion, centre = _native(domain, physics)
            return np.concatenate([frame[:, 8:], motion[:, 3:], centre[:, 2:]], axis=1)
        case "jaco":
            return _native(domain, physics)[0]
        case _:
            position, frame, velocity, momentum = _native(domain, physics)
            return np.stack([position[:, 2], frame[:, 8], velocity[:, 0], momentum[:, 1]], axis=1)


def recomputed_observation(
    domain: str, physics: Float[np.ndarray, "T1 P"]
) -> tuple[Int[np.ndarray, "C"], Float32[np.ndarray, "T1 C"]]:
    """Returns the entries of the flat observation that the state alone decides, and their values at each state.

    All entries of cartpole, cheetah, point_mass_maze and walker; of the quadruped not the accelerometer, forces and
    torques (48 to 50, 54 to 77), of jaco not the torques (12 to 17): they depend on contacts and the control.

    An observation recorded with this MuJoCo agrees to float32's rounding, 1e-7 of a value's size. Another version
    adds up in another order, which moves values within 1e-5.

    Args:
      domain: Like "walker".
      physics: State (qpos, qvel, activations) of each row.

    Raises:
      ValueError: If the domain is unknown or the states are not of its size.
    """
    physics = _checked(domain, physics)
    columns = np.arange(tasks.DOMAINS[domain].observation_dim)
    match domain:
        case "cartpole":
            values = [physics[:, :1], np.stack(_pole(physics), axis=1), physics[:, 2:]]
        case "point_mass_maze":
            values = [physics]
        case "cheetah":
            values = [physics[:, 1:]]
        case "walker":
            frames, position = _native("walker_bodies", physics)
            values = [
                frames.reshape(-1, 9)[:, [0, 2]].reshape(len(physics), -1),
                position[:, 2:],
                physics[:, 9:],
            ]
        case "quadruped":
            frame, motion, _ = _native(domain, physics)
            columns = np.r_[0:48, 51:54]
            values = [physics[:, 7:23], physics[:, 29:], motion[:, 3:], frame[:, 8:], motion[:, :3]]
        case _:
            position, frame = _native(domain, physics)
            columns = np.r_[0:12, 18:42]
            angles = physics[:, :6, None]
            turns = np.concatenate([np.sin(angles), np.cos(angles)], axis=2).reshape(-1, 12)
            values = [turns, physics[:, 9:15], physics[:, 6:9], physics[:, 15:], position, frame]
    return columns, np.concatenate(values, axis=1).astype(np.float32)


def _checked(domain: str, physics: Float[np.ndarray, "T1 P"]) -> Float[np.ndarray, "T1 P"]:
    tasks.tasks_of(domain)
    size = tasks.DOMAINS[domain].physics_dim
    if physics.shape[1] != size:
        raise ValueError(
            f"physics of {domain} must have shape [T+1, {size}]; got {list(physics.shape)}. "
            "Check that the episode belongs to this domain."
        )
    return physics.astype(np.float64, copy=False)


def _pole(physics: Float[np.ndarray, "T1 4"]) -> tuple[Float[np.ndarray, "T1"], Float[np.ndarray, "T1"]]:
    """Returns cosine and sine of the pole's angle as MuJoCo does, from half of it: sparse rewards have an edge."""
    cosine, sine = np.cos(physics[:, 1] / 2), np.sin(physics[:, 1] / 2)
    return cosine**2 - sine**2, 2 * cosine * sine


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pass:
    """What is called for each state, and what is then read: views into the simulator's own arrays."""

    model: Any
    data: Any
    calls: tuple[Callable[[Any, Any], None], ...]
    views: tuple[np.ndarray, ...]


def _native(name: str, physics: Float[np.ndarray, "T1 P"]) -> list[Float[np.ndarray, "T1 _"]]:
    """Returns each view of a pass, flat, at every state."""
    native = _pass(name, threading.get_ident())
    model, data, calls = native.model, native.data, native.calls
    positions = np.ascontiguousarray(physics[:, : model.nq])
    velocities = np.ascontiguousarray(physics[:, model.nq : model.nq + model.nv])
    qpos, qvel = data.qpos, data.qvel
    found = [np.empty((len(physics), view.size)) for view in native.views]
    copies = list(zip(found, native.views, strict=True))
    for t in range(len(physics)):
        qpos[:] = positions[t]
        qvel[:] = velocities[t]
        for call in calls:
            call(model, data)
        for values, view in copies:
            values[t] = view
    return found


@functools.lru_cache(maxsize=64)
def _pass(name: str, thread: int) -> _Pass:
    # One a thread, since it holds the state.
    import mujoco

    model = _model("walker" if name == "walker_bodies" else name)
    data = mujoco.MjData(model)
    positions = (mujoco.mj_kinematics,)
    velocities = (*positions, mujoco.mj_comPos, mujoco.mj_comVel)
    views: tuple[np.ndarray, ...]
    if name == "jaco":
        tool = data.site("jaco_arm/jaco_hand/pinchsite")
        return _Pass(model=model, data=data, calls=positions, views=(tool.xpos, tool.xmat))
    torso = data.body("torso")
    if name == "walker_bodies":
        return _Pass(model=model, data=data, calls=positions, views=(data.xmat[1:].reshape(-1), torso.xpos))
    if name == "quadruped":
        measure, motion = _sensor_motion(model)
        views = (torso.xmat, motion, torso.subtree_com)
        return _Pass(model=model, data=data, calls=(*velocities, measure), views=views)
    views = (torso.xpos, torso.xmat, torso.subtree_linvel, torso.subtree_angmom)
    return _Pass(model=model, data=data, calls=(*velocities, mujoco.mj_subtreeVel), views=views)


def _sensor_motion(model: Any) -> tuple[Callable[[Any, Any], None], Float[np.ndarray, "6"]]:
    """Returns a call that measures as velocimeter and gyro do, and what it fills: angular, then linear velocity."""
    import mujoco

    site = int(model.sensor("velocimeter").objid[0])
    motion = np.zeros(6)

    def measure(model: Any, data: Any) -> None:
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_SITE, site, motion, 1)

    return measure, motion


@functools.cache
def _model(domain: str) -> Any:
    """Returns the compiled body, which all threads share: nothing here writes into it."""
    environment = tasks.make(tasks.tasks_of(domain)[0], seed=0)
    return environment.physics.model.ptr
