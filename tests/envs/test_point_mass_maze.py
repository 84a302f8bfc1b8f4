import numpy as np
import pytest

from bpt_rl.envs import point_mass_maze, tasks

GOALS = {
    "point_mass_maze_reach_top_left": (-0.15, 0.15),
    "point_mass_maze_reach_top_right": (0.15, 0.15),
    "point_mass_maze_reach_bottom_left": (-0.15, -0.15),
    "point_mass_maze_reach_bottom_right": (0.15, -0.15),
}
TASK = "point_mass_maze_reach_top_left"


@pytest.fixture(scope="module")
def environments():
    """One environment a task."""
    return {task: tasks.make(task, seed=0) for task in GOALS}


def put(environment, position, control=(0, 0)):
    with environment.physics.reset_context():
        environment.physics.set_state(np.array([*position, 0, 0], np.float64))
    environment.physics.set_control(control)


def drive(environment, position, direction, num_steps=400):
    """Returns the positions passed when `direction` is pushed for 8 seconds from rest, by default."""
    environment.reset()
    put(environment, position)
    return np.stack([environment.step(np.array(direction)).observation[:2] for _ in range(num_steps)])


def test_observation_is_position_then_velocity():
    environment = tasks.make(TASK, seed=0)
    environment.reset()
    for _ in range(5):
        observation = environment.step(np.array([1.0, -0.5])).observation
    np.testing.assert_array_equal(observation, tasks.physics_state(environment).astype(np.float32))
    assert observation[2] > 0 > observation[3]


def test_start_lies_at_rest_in_the_outer_corner_of_the_top_left_room():
    environment = tasks.make(TASK, seed=0)
    starts = np.stack([environment.reset().observation for _ in range(400)])
    assert (starts[:, 2:] == 0).all()
    low, high = np.array([-0.29, 0.15]), np.array([-0.15, 0.29])
    assert (starts[:, :2] >= low - 1e-7).all() and (starts[:, :2] <= high + 1e-7).all()
    # Uniform: the mean of 400 draws deviates by 0.002, the extremes by 0.0004 or so.
    np.testing.assert_allclose(starts[:, :2].mean(0), (low + high) / 2, atol=0.01)
    np.testing.assert_allclose(starts[:, :2].min(0), low, atol=0.004)
    np.testing.assert_allclose(starts[:, :2].max(0), high, atol=0.004)


def test_starts_do_not_depend_on_numpys_global_generator():
    np.random.seed(1)
    first = tasks.make(TASK, seed=3).reset().observation
    np.random.seed(2)
    np.testing.assert_array_equal(tasks.make(TASK, seed=3).reset().observation, first)


@pytest.mark.parametrize(
    ("start", "direction", "axis", "stop"),
    [
        ((-0.1, 0.1), (1, 0), 0, -0.03),
        ((0.1, 0.1), (-1, 0), 0, 0.03),
        ((-0.1, -0.1), (1, 0), 0, -0.03),
        ((0.1, -0.1), (-1, 0), 0, 0.03),
        ((-0.1, 0.1), (0, -1), 1, 0.03),
        ((0.1, 0.1), (0, -1), 1, 0.03),
        ((-0.1, -0.1), (0, 1), 1, -0.03),
        ((0.1, -0.1), (0, 1), 1, -0.03),
        ((-0.1, 0.1), (-1, 0), 0, -0.29),
        ((0.1, 0.1), (1, 0), 0, 0.29),
        ((-0.1, 0.1), (0, 1), 1, 0.29),
        ((0.1, -0.1), (0, -1), 1, -0.29),
    ],
)
def test_walls_stop_the_mass_at_its_radius(environments, start, direction, axis, stop):
    path = drive(environments[TASK], start, direction)
    # MuJoCo's walls are soft: the mass enters them by a millimetre or two on impact, far from their other side.
    np.testing.assert_allclose(path[-1][axis], stop, atol=0.002)
    assert np.abs(path[:, axis] - stop).min() < 0.002
    overrun = (path[:, axis] - stop) * np.sign(np.sum(direction))
    assert overrun.max() < 0.003
    # The other coordinate does not move.
    np.testing.assert_allclose(path[:, 1 - axis], start[1 - axis], atol=1e-4)


@pytest.mark.parametrize("across", [-0.192, -0.25, 0.192, 0.25])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_passage_is_open_between_bar_and_outer_wall(environments, axis, across):
    start, direction = np.full(2, across), np.zeros(2)
    start[axis], direction[axis] = -0.1, 1
    path = drive(environments[TASK], start, direction)
    assert path[-1][axis] > 0.28


@pytest.mark.parametrize("across", [-0.175, 0.175])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_bar_stops_the_mass_up_to_its_end(environments, axis, across):
    start, direction = np.full(2, across), np.zeros(2)
    start[axis], direction[axis] = -0.1, 1
    path = drive(environments[TASK], start, direction)
    np.testing.assert_allclose(path[-1][axis], -0.03, atol=0.002)


def test_full_control_moves_the_mass_at_a_tenth_of_a_metre_a_second(environments):
    environment = environments[TASK]
    environment.reset()
    put(environment, (-0.25, 0.25))
    for _ in range(150):
        observation = environment.step(np.array([1.0, 0.0])).observation
    # The time constant is mass / damping = 0.3 s.
    np.testing.assert_allclose(observation[2:], [0.1, 0], atol=1e-4)


@pytest.mark.parametrize("task", GOALS)
@pytest.mark.parametrize(
    ("distance", "near"),
    [(0, 1), (0.0149, 1), (0.0225, 0.1**0.25), (0.03, 0.1), (0.045, 0.1**4)],
)
def test_reward_falls_with_the_distance_to_the_goal_of_the_task(environments, task, distance, near):
    environment = environments[task]
    for angle in (0.3, 2.0, 4.4):
        x, y = GOALS[task]
        put(environment, (x + distance * np.cos(angle), y + distance * np.sin(angle)))
        np.testing.assert_allclose(environment.reward(), near, rtol=1e-9)


@pytest.mark.parametrize(
    ("control", "reward"),
    [((0, 0), 1), ((1, 0), 0.9), ((-1, 1), 0.8), ((0.5, -0.5), 0.95), ((0, 0.5), 0.975)],
)
def test_control_costs_up_to_a_fifth_of_the_reward(environments, control, reward):
    environment = environments[TASK]
    put(environment, GOALS[TASK], control)
    np.testing.assert_allclose(environment.reward(), reward)


def test_reward_of_a_step_is_that_of_the_state_after_it_and_its_control(environments):
    environment = environments[TASK]
    environment.reset()
    put(environment, GOALS[TASK])
    reward = environment.step(np.array([1.0, 0.0])).reward
    # One step moves the mass by a tenth of a millimetre.
    np.testing.assert_allclose(reward, 0.9)


def test_goal_is_drawn_where_it_is_rewarded_and_does_not_touch_the_mass(environments):
    for task, goal in GOALS.items():
        environment = environments[task]
        put(environment, goal)
        physics = environment.physics
        np.testing.assert_allclose(physics.named.data.site_xpos["goal", :2], goal)
        assert physics.named.model.site_size["goal", 0] == point_mass_maze.GOAL_RADIUS
        # The floor is the only thing touched.
        assert physics.data.ncon == 1


def test_first_camera_looks_down_on_the_whole_maze():
    physics = tasks.make(TASK, seed=0).physics
    x, y, height = physics.data.cam_xpos[0]
    np.testing.assert_array_equal([x, y], 0)
    # A camera looks along its own negative z axis.
    np.testing.assert_allclose(physics.data.cam_xmat[0].reshape(3, 3)[:, 2], [0, 0, 1])
    assert height * np.tan(np.deg2rad(physics.model.cam_fovy[0]) / 2) > 0.3
