import logging
import subprocess
import sys

import numpy as np
import pytest
from dm_control.utils import inverse_kinematics

from bpt_rl.envs import tasks

GOALS = {
    "jaco_reach_top_left": (-0.09, 0.09, 0.001),
    "jaco_reach_top_right": (0.09, 0.09, 0.001),
    "jaco_reach_bottom_left": (-0.09, -0.09, 0.001),
    "jaco_reach_bottom_right": (0.09, -0.09, 0.001),
}
TOOL = "jaco_arm/jaco_hand/pinchsite"


@pytest.fixture(scope="module")
def environments():
    """One environment a task, seeded by each test that uses it."""
    made = {task: tasks.make(task, seed=0) for task in GOALS}
    yield made
    for environment in made.values():
        environment.close()


@pytest.fixture(scope="module")
def jaco(environments):
    return environments["jaco_reach_top_left"]


def rollout(environment, num_steps, seed=0):
    """Returns the time steps of an episode's start under uniform actions."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (num_steps, 9))
    return [environment.reset(), *(environment.step(action) for action in actions)]


def move_tool(environment, place):
    """Bends the arm until the tool centre is at `place`."""
    environment.reset()
    solution = inverse_kinematics.qpos_from_site_pose(
        environment.physics, TOOL, target_pos=np.array(place), tol=1e-10, max_steps=1000
    )
    assert solution.success
    environment.physics.set_state(np.concatenate([solution.qpos, np.zeros(9)]))
    environment.physics.forward()


def test_observation_is_that_of_exorl_in_its_order(jaco):
    jaco.seed(1)
    observation = rollout(jaco, 30)[-1].observation
    data, model = jaco.physics.named.data, jaco.physics.named.model
    qpos, qvel = jaco.physics.data.qpos, jaco.physics.data.qvel
    angles = np.stack([np.sin(qpos[:6]), np.cos(qpos[:6])], axis=1)
    torques = np.array(
        [
            data.sensordata[f"jaco_arm/joint_{i}_torque"] @ model.jnt_axis[f"jaco_arm/joint_{i}"]
            for i in range(1, 7)
        ]
    )
    parts = {
        "arm_angles": angles.ravel(),
        "arm_torques": np.sign(torques) * np.log1p(np.abs(torques)),
        "arm_velocities": qvel[:6],
        "hand_angles": qpos[6:],
        "hand_velocities": qvel[6:],
        "tool_place": data.site_xpos[TOOL],
        "tool_axes": data.site_xmat[TOOL],
    }
    assert [np.size(part) for part in parts.values()] == [12, 6, 6, 3, 3, 3, 9]
    np.testing.assert_array_equal(observation, np.concatenate(list(parts.values())).astype(np.float32))


def test_state_is_every_angle_then_every_velocity(jaco):
    rollout(jaco, 5)
    data = jaco.physics.data
    np.testing.assert_array_equal(tasks.physics_state(jaco), np.concatenate([data.qpos, data.qvel]))
    assert np.abs(data.qvel).min() > 0


def test_arm_equals_that_of_dm_controls_own_reach_task():
    from dm_control import composer
    from dm_control.manipulation import reach
    from dm_control.manipulation.shared import observations

    task = reach._reach(observations.PERFECT_FEATURES, use_site=True)
    plain = composer.Environment(task, time_limit=10, random_state=3)
    high = plain.action_spec().maximum
    steps = rollout(tasks.make("jaco_reach_top_left", seed=3), 60)
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 9))
    for step, reference in zip(
        steps, [plain.reset(), *(plain.step(high * action) for action in actions)], strict=True
    ):
        # There the target is observed, and drawn after the arm's start.
        del reference.observation["target_position"]
        flat = np.concatenate([np.ravel(value) for value in reference.observation.values()])
        # float32 of the same simulation; scaling actions rounds in another order.
        np.testing.assert_allclose(step.observation, flat, rtol=1e-5, atol=1e-5)


def test_goal_is_never_observed(environments):
    runs = []
    for environment in environments.values():
        environment.seed(5)
        runs.append(np.stack([step.observation for step in rollout(environment, 10)]))
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])


def test_start_is_at_rest_pointing_down_above_the_table(jaco):
    jaco.seed(0)
    starts, grasps = [], []
    for _ in range(60):
        starts.append(jaco.reset().observation)
        assert (jaco.physics.data.qvel == 0).all()
        # The hand's third axis is the direction it points in.
        np.testing.assert_allclose(starts[-1][-9:].reshape(3, 3)[:, 2], [0, 0, -1], atol=1e-4)
        grasps.append(starts[-1][24:27])
    places = np.stack(starts)[:, 30:33]
    # Inverse kinematics stops within a millimetre.
    assert (places > np.array([-0.2, -0.2, 0.02]) - 1e-3).all()
    assert (places < np.array([0.2, 0.2, 0.4]) + 1e-3).all()
    assert (np.ptp(places, axis=0) > [0.3, 0.3, 0.25]).all()
    np.testing.assert_array_equal(np.ptp(grasps, axis=1), 0)
    assert np.ptp(np.stack(grasps)[:, 0]) > 0.5


def test_an_unreachable_start_is_drawn_again_without_a_word(jaco, caplog):
    # With this seed the inverse kinematics fails at first, and would say so.
    with caplog.at_level(logging.INFO):
        jaco.seed(61)
        jaco.reset()
    assert caplog.messages == []


@pytest.mark.parametrize("task", GOALS)
def test_tool_at_the_goal_of_the_task_earns_all(environments, task):
    for offset in ([0, 0, 0], [0, 0, 0.049], [0.03, -0.03, 0.01]):
        place = np.add(GOALS[task], offset)
        move_tool(environments[task], place)
        assert environments[task].reward() == 1
        for other in set(GOALS) - {task}:
            move_tool(environments[other], place)
            assert environments[other].reward() < 0.03


@pytest.mark.parametrize("task", GOALS)
@pytest.mark.parametrize(("distance", "reward"), [(0.075, 0.1**0.25), (0.1, 0.1), (0.15, 0.1**4)])
def test_reward_falls_with_the_distance_to_the_goal(environments, task, distance, reward):
    move_tool(environments[task], GOALS[task] + distance * np.array([0.48, -0.36, 0.8]))
    # The tool is within 1e-8 m of the place asked for.
    np.testing.assert_allclose(environments[task].reward(), reward, rtol=1e-5)


def test_goal_is_drawn_where_it_is_rewarded(environments):
    for task, goal in GOALS.items():
        environments[task].reset()
        physics = environments[task].physics
        np.testing.assert_allclose(physics.named.data.site_xpos["goal"], goal)
        assert physics.named.model.site_size["goal", 0] == 0.05


def test_action_is_the_joints_speed_in_shares_of_its_limit(jaco):
    jaco.reset()
    jaco.step(np.array([1, -1, 0.5, 1, -1, 0.5, 1, -1, 0.5]))
    limits = np.concatenate([np.deg2rad([36, 36, 36, 48, 48, 48]), [5, 5, 5]])
    np.testing.assert_allclose(jaco.physics.data.ctrl, limits * np.tile([1, -1, 0.5], 3), rtol=1e-6)


def test_an_episode_takes_ten_seconds_in_250_steps(jaco):
    steps = rollout(jaco, 250)
    assert [step.last() for step in steps].index(True) == 250
    np.testing.assert_allclose(jaco.physics.time(), 10)
    assert steps[-1].discount == 1
    assert jaco.step(np.zeros(9)).first()


def test_importing_it_needs_no_labmaze():
    # Set to None, a module cannot be imported: so it is on Python 3.13.
    script = (
        "import sys; sys.modules['labmaze'] = None; from bpt_rl.envs import tasks; "
        "assert tasks.make('jaco_reach_top_left', seed=0).reset().first()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
