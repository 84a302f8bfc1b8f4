"""One MuJoCo model that holds a body many times over, so that one native call measures many states.

A call from Python costs as much as the work it does on one small body. Here it does the work of `NUM_REPLICAS`
bodies, which stand side by side in one world and do not meet: they have no geoms.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from bpt_rl.envs import tasks

NUM_REPLICAS = 32
"""More would gain little, since the calls cost a tenth of the time, and one state alone would cost more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicas:
    """`NUM_REPLICAS` copies of a body, each in a state of its own."""

    model: Any
    data: Any

    def of_bodies(self, values: Float[np.ndarray, "_ ..."]) -> Float[np.ndarray, "K nbody ..."]:
        """Returns a view of MuJoCo's array of something per body, without the world: [copy, body, ...]."""
        return values[1:].reshape(NUM_REPLICAS, -1, *values.shape[1:])

    def measure(
        self,
        physics: Float[np.ndarray, "T1 P"],
        calls: Sequence[Callable[[Any, Any], None]],
        views: Sequence[Float[np.ndarray, "K ..."]],
    ) -> list[Float[np.ndarray, "T1 ..."]]:
        """Returns what each view holds at every state.

        Args:
          physics: State (qpos, qvel, whatever follows) of each row, float64.
          calls: MuJoCo's functions of model and data, in the order they build on each other.
          views: Into arrays of `data`, a row a copy.
        """
        num_positions, num_velocities = (self.model.nq // NUM_REPLICAS, self.model.nv // NUM_REPLICAS)
        positions = physics[:, :num_positions]
        velocities = physics[:, num_positions : num_positions + num_velocities]
        qpos = self.data.qpos.reshape(NUM_REPLICAS, -1)
        qvel = self.data.qvel.reshape(NUM_REPLICAS, -1)
        found = [np.empty((len(physics), *view.shape[1:])) for view in views]
        for start in range(0, len(physics), NUM_REPLICAS):
            rows = slice(start, min(start + NUM_REPLICAS, len(physics)))
            used = rows.stop - start
            # Copies beyond the last row keep older states, which nobody reads.
            qpos[:used] = positions[rows]
            qvel[:used] = velocities[rows]
            for call in calls:
                call(self.model, self.data)
            for values, view in zip(found, views, strict=True):
                values[rows] = view[:used]
        return found


def replicas(domain: str, site: str = "") -> Replicas:
    """Returns the copies of a domain's body that belong to this thread.

    Args:
      domain: Like "walker".
      site: The one site that each copy keeps, with a gyro and a velocimeter; "" for none.
    """
    return _replicas(domain, site, threading.get_ident())


@functools.lru_cache(maxsize=64)
def _replicas(domain: str, site: str, thread: int) -> Replicas:
    # One a thread, since they hold states.
    import mujoco

    model = _model(domain, site)
    return Replicas(model=model, data=mujoco.MjData(model))


@functools.cache
def _model(domain: str, site: str) -> Any:
    """Returns the compiled model, which all threads share: nothing writes into it."""
    import mujoco

    environment = tasks.make(tasks.tasks_of(domain)[0], seed=0)
    single = environment.physics.model.ptr
    specification = mujoco.MjSpec()
    for k in range(NUM_REPLICAS):
        _add_copy(specification, single, f"{k}/", site)
    model = specification.compile()
    environment.close()
    return model


def _add_copy(specification: Any, single: Any, prefix: str, site: str) -> None:
    """Adds bodies, joints and the site of a compiled model, in its order, with what kinematics read of them."""
    import mujoco

    bodies = [specification.worldbody]
    for i in range(1, single.nbody):
        compiled = single.body(i)
        body = bodies[int(compiled.parentid[0])].add_body(
            pos=compiled.pos,
            quat=compiled.quat,
            mass=compiled.mass[0],
            inertia=compiled.inertia,
            ipos=compiled.ipos,
            iquat=compiled.iquat,
            explicitinertial=True,
        )
        bodies.append(body)
        for j in range(int(compiled.jntadr[0]), int(compiled.jntadr[0]) + int(compiled.jntnum[0])):
            joint = single.joint(j)
            body.add_joint(type=mujoco.mjtJoint(int(joint.type[0])), pos=joint.pos, axis=joint.axis)
    if site:
        compiled = single.site(site)
        name = f"{prefix}{site}"
        bodies[int(compiled.bodyid[0])].add_site(name=name, pos=compiled.pos, quat=compiled.quat)
        for kind in (mujoco.mjtSensor.mjSENS_GYRO, mujoco.mjtSensor.mjSENS_VELOCIMETER):
            specification.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_SITE, objname=name)
