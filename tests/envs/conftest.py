"""Recorded episodes and wild states, with the rewards that fresh environments paid."""

import dataclasses
import functools

import numpy as np
import pytest

from bpt_rl.envs import tasks


@dataclasses.dataclass(frozen=True)
class Recording:
    """Rows in ExoRL's alignment: physics[t] is the state that action[t] led to, row 0 the dummy row."""

    physics: np.ndarray
    action: np.ndarray
    observation: np.ndarray
    reward: np.ndarray


@functools.cache
def record(task, num_steps=60, seed=0):
    environment = tasks.make(task, seed=seed)
    action = uniform_actions(environment, num_steps, seed)
    step = environment.reset()
    rows = [(tasks.physics_state(environment), step.observation, 0.0)]
    for a in action[1:]:
        step = environment.step(a)
        rows.append((tasks.physics_state(environment), step.observation, step.reward))
    environment.close()
    return recording(rows, action)


@functools.cache
def record_wild(task, num_states=60, seed=0):
    """Each row is one step from a state of its own: fallen, folded beyond the joints' limits, fast, near the goal."""
    environment = tasks.make(task, seed=seed)
    action = uniform_actions(environment, num_states, seed)
    generator = np.random.default_rng(seed)
    step = environment.reset()
    rows = [(tasks.physics_state(environment), step.observation, 0.0)]
    for t, a in enumerate(action[1:]):
        if step.last():
            environment.reset()
        physics = environment.physics
        physics.set_state(wild_state(task, physics, generator, is_near_goal=t % 2 == 0))
        physics.forward()
        step = environment.step(a)
        rows.append((tasks.physics_state(environment), step.observation, step.reward))
    environment.close()
    return recording(rows, action)


def uniform_actions(environment, num_steps, seed):
    shape = (num_steps + 1, *environment.action_spec().shape)
    action = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    action[0] = 0
    return action


def recording(rows, action):
    physics, observation, reward = (np.stack(column) for column in zip(*rows, strict=True))
    return Recording(physics, action, observation, reward)


def wild_state(task, physics, generator, *, is_near_goal):
    domain = tasks.domain_of(task)
    model = physics.model
    state = np.zeros(tasks.DOMAINS[domain].physics_dim)
    qpos, qvel = state[: model.nq], state[model.nq : model.nq + model.nv]
    qpos[:] = generator.uniform(-3.5, 3.5, model.nq)
    qvel[:] = generator.normal(size=model.nv) * generator.choice([0.1, 3, 15])
    if domain == "cartpole":
        # Around the edges that the sparse rewards have, and beyond the end of the rail.
        qpos[:] = generator.normal(size=2) * [0.3, 0.15] if is_near_goal else qpos * [0.7, 1]
        qvel *= 0.1 if is_near_goal else 1
    if domain == "point_mass_maze":
        side = np.sign(qpos)
        qpos[:] = side * (0.15 + generator.normal(size=2) * 0.02) if is_near_goal else qpos * 0.08
        qvel *= 0.01
    if domain == "quadruped":
        qpos[2] = generator.uniform(-0.2, 2)
        qpos[7:] = generator.uniform(-1.5, 1.5, 16)
        state[model.nq + model.nv :] = generator.uniform(-1, 1, 12)
    if domain == "jaco" and is_near_goal:
        from dm_control.utils import inverse_kinematics

        goal = physics.named.model.site_pos["goal"] + generator.normal(size=3) * 0.04
        found = inverse_kinematics.qpos_from_site_pose(
            physics, "jaco_arm/jaco_hand/pinchsite", target_pos=goal, max_steps=50
        )
        qpos[:] = found.qpos
        qvel *= 0.1
    return state


@pytest.fixture(scope="session")
def episode():
    return record


@pytest.fixture(scope="session")
def wild():
    return record_wild
