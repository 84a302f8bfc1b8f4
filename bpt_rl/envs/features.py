"""Physical features of recorded states: the few numbers that every reward of a domain is a formula of.

MuJoCo's own functions measure them, one call for many states (`bpt_rl.envs.replicas`): one to two microseconds a
state. Cartpole and maze are closed forms.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Float32, Int

from bpt_rl.envs import tasks
from bpt_rl.envs.replicas import replicas

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

    Equal to what the simulator itself measures in that state.

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
            frame, motion, centre = _quadruped(physics)
            return np.concatenate([frame[:, 8:], motion[:, 3:], centre[:, 2:]], axis=1)
        case "jaco":
            return _jaco(physics)[0]
        case _:
            position, frame, velocity, momentum = _planar(domain, physics)
            return np.stack([position[:, 2], frame[:, 8], velocity[:, 0], momentum[:, 1]], axis=1)


def recomputed_observation(
    domain: str, physics: Float[np.ndarray, "T1 P"]
) -> tuple[Int[np.ndarray, "C"], Float32[np.ndarray, "T1 C"]]:
    """Returns the entries of the flat observation that the state alone decides, and their values at each state.

    All entries of cartpole, cheetah, point_mass_maze and walker; of the quadruped not the accelerometer, forces and
    torques (48 to 50, 54 to 77), of jaco not the torques (12 to 17): they depend on contacts and the control.

    An observation recorded with the same MuJoCo agrees to float32's rounding, 2.4e-7 of a value's size. Versions may
    add up in another order: allow for 1e-5.

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
            position, frame = _walker_bodies(physics)
            orientations = frame[:, :, [0, 2]].reshape(len(physics), -1)
            values = [orientations, position[:, 0, 2:], physics[:, 9:]]
        case "quadruped":
            frame, motion, _ = _quadruped(physics)
            columns = np.r_[0:48, 51:54]
            values = [physics[:, 7:23], physics[:, 29:], motion[:, 3:], frame[:, 8:], motion[:, :3]]
        case _:
            position, frame = _jaco(physics)
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


def _planar(domain: str, physics: Float[np.ndarray, "T1 P"]) -> list[Float[np.ndarray, "T1 ..."]]:
    """Returns position [3], frame [9], velocity [3] and angular momentum [3] of the whole body at its torso."""
    import mujoco

    body = replicas(domain)
    calls = (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_comVel, mujoco.mj_subtreeVel)
    data = body.data
    per_body = (data.xpos, data.xmat, data.subtree_linvel, data.subtree_angmom)
    return body.measure(physics, calls, [body.of_bodies(values)[:, 0] for values in per_body])


def _walker_bodies(physics: Float[np.ndarray, "T1 P"]) -> list[Float[np.ndarray, "T1 ..."]]:
    """Returns position [7, 3] and frame [7, 9] of each body."""
    import mujoco

    body = replicas("walker")
    views = [body.of_bodies(values) for values in (body.data.xpos, body.data.xmat)]
    return body.measure(physics, (mujoco.mj_kinematics,), views)


def _quadruped(physics: Float[np.ndarray, "T1 P"]) -> list[Float[np.ndarray, "T1 ..."]]:
    """Returns the torso's frame [9], angular and linear velocity in it [6], and the whole body's centre [3]."""
    import mujoco

    body = replicas("quadruped", site="torso")
    calls = (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_comVel, mujoco.mj_sensorVel)
    frame, centre = (body.of_bodies(values)[:, 0] for values in (body.data.xmat, body.data.subtree_com))
    return body.measure(physics, calls, [frame, body.data.sensordata.reshape(-1, 6), centre])


def _jaco(physics: Float[np.ndarray, "T1 P"]) -> list[Float[np.ndarray, "T1 ..."]]:
    """Returns position [3] and frame [9] of the tool centre."""
    import mujoco

    body = replicas("jaco", site="jaco_arm/jaco_hand/pinchsite")
    return body.measure(physics, (mujoco.mj_kinematics,), [body.data.site_xpos, body.data.site_xmat])
