import mujoco
import numpy as np
import pytest

from bpt_rl.envs import custom_tasks, tasks

STOCK = {"walker": "walker_run", "cheetah": "cheetah_run", "quadruped": "quadruped_walk"}


def put(environment, qpos, qvel):
    """Sets position and velocity, leaves activations at 0, and brings all derived quantities up to date."""
    physics = environment.physics
    with physics.reset_context():
        physics.data.qpos[:], physics.data.qvel[:] = qpos, qvel
    return physics


def random_states(environment, num_states, speed, seed=0):
    """Yields the simulator in random positions near the model's own, above ground, at random velocities."""
    model = environment.physics.model
    rng = np.random.default_rng(seed)
    for _ in range(num_states):
        qpos = model.qpos0 + rng.normal(0, 0.6, model.nq)
        if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
            qpos[3:7] /= np.linalg.norm(qpos[3:7])
        yield put(environment, qpos, speed * rng.normal(size=model.nv))


def moving_bodies(physics):
    """Returns mass, position, velocity and spin momentum of every body, from MuJoCo's own body by body."""
    model, data = physics.model.ptr, physics.data.ptr
    velocity, spin = np.empty((model.nbody, 3)), np.empty((model.nbody, 3))
    for body in range(model.nbody):
        both = np.empty(6)
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_BODY, body, both, 0)
        axes = data.ximat[body].reshape(3, 3)
        spin[body] = axes @ np.diag(model.body_inertia[body]) @ axes.T @ both[:3]
        velocity[body] = both[3:]
    return model.body_mass[1:, None], data.xipos[1:], velocity[1:], spin[1:]


def centre_of_mass(physics):
    mass, position, velocity, _ = moving_bodies(physics)
    return (mass * position).sum(0) / mass.sum(), (mass * velocity).sum(0) / mass.sum()


def spin_about_y(physics):
    mass, position, velocity, spin = moving_bodies(physics)
    centre, drift = centre_of_mass(physics)
    return (spin + mass * np.cross(position - centre, velocity - drift)).sum(0)[1]


def standing(physics):
    height, upward = physics.named.data.xpos["torso", "z"], physics.named.data.xmat["torso", "zz"]
    tall = 1 if height >= 1.2 else 0.1 ** (((1.2 - height) / 0.6) ** 2)
    return (3 * tall + (1 + upward) / 2) / 4


def walker_flip(physics):
    return standing(physics) * (5 * np.clip(spin_about_y(physics) / 5, 0, 1) + 1) / 6


def cheetah_run_backward(physics):
    return np.clip(-centre_of_mass(physics)[1][0] / 10, 0, 1)


def cheetah_flip(physics):
    return np.clip(spin_about_y(physics) / 5, 0, 1)


def cheetah_flip_backward(physics):
    return np.clip(-spin_about_y(physics) / 5, 0, 1)


def quadruped_stand(physics):
    return (1 + physics.named.data.xmat["torso", "zz"]) / 2


def quadruped_jump(physics):
    return quadruped_stand(physics) * np.clip((1 + centre_of_mass(physics)[0][2]) / 2, 0, 1)


BY_HAND = {
    "walker_flip": (walker_flip, 1),
    "cheetah_run_backward": (cheetah_run_backward, 8),
    "cheetah_flip": (cheetah_flip, 1),
    "cheetah_flip_backward": (cheetah_flip_backward, 1),
    "quadruped_stand": (quadruped_stand, 1),
    "quadruped_jump": (quadruped_jump, 1),
}
"""For each task, the reward worked out from bodies, and a speed at which it takes all its values."""


def test_every_custom_task_is_checked_here():
    assert set(BY_HAND) == set(custom_tasks.TASKS)


@pytest.mark.parametrize("task", BY_HAND)
def test_reward_equals_the_one_worked_out_from_the_bodies(task):
    by_hand, speed = BY_HAND[task]
    environment = tasks.make(task, seed=0)
    pairs = [(environment.reward(), by_hand(physics)) for physics in random_states(environment, 60, speed)]
    found, expected = np.array(pairs).T
    # Sums over bodies in another order, of momenta up to a hundred.
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert expected.std() > 0.1


def test_standing_walker_earns_a_sixth_of_a_flip():
    environment = tasks.make("walker_flip", seed=0)
    put(environment, np.zeros(9), np.zeros(9))
    np.testing.assert_allclose(environment.reward(), 1 / 6)


@pytest.mark.parametrize(("speed", "reward"), [(-20, 1), (-10, 1), (-5, 0.5), (0, 0), (5, 0)])
def test_cheetah_is_paid_for_speed_towards_negative_x(speed, reward):
    environment = tasks.make("cheetah_run_backward", seed=0)
    put(environment, np.zeros(9), [speed, *np.zeros(8)])
    np.testing.assert_allclose(environment.reward(), reward)


def test_cheetah_turning_nose_down_flips_forward():
    forward, backward = (tasks.make(f"cheetah_flip{name}", seed=0) for name in ("", "_backward"))
    for environment in (forward, backward):
        put(environment, np.zeros(9), [0, 0, 10, *np.zeros(6)])
        # A positive turn about y lowers the head, which lies at positive x.
        mujoco.mj_integratePos(
            environment.physics.model.ptr, environment.physics.data.qpos, environment.physics.data.qvel, 0.01
        )
        environment.physics.forward()
        assert environment.physics.named.data.geom_xpos["head", "z"] < 0.8
    assert (forward.reward(), backward.reward()) == (1, 0)


@pytest.mark.parametrize(
    ("upward", "height", "stand", "jump"),
    [(1, 3.0, 1, 1), (1, 1.0, 1, 1), (1, 0.5, 1, 0.75), (-1, 3.0, 0, 0), (0, 0.6, 0.5, 0.4)],
)
def test_quadruped_is_paid_for_an_upright_torso_and_a_high_centre(upward, height, stand, jump):
    turn = np.arccos(upward) / 2
    for task, reward in (("quadruped_stand", stand), ("quadruped_jump", jump)):
        environment = tasks.make(task, seed=0)
        qpos = environment.physics.model.qpos0.copy()
        qpos[3:7] = np.cos(turn), np.sin(turn), 0, 0
        qpos[2] += height - centre_of_mass(put(environment, qpos, 0))[0][2]
        put(environment, qpos, 0)
        np.testing.assert_allclose(environment.reward(), reward, atol=1e-12)


@pytest.mark.parametrize("task", BY_HAND)
def test_body_and_start_are_those_of_the_stock_task(task):
    custom, stock = (tasks.make(name, seed=4) for name in (task, STOCK[tasks.domain_of(task)]))
    actions = np.random.default_rng(0).uniform(-1, 1, (20, *stock.action_spec().shape))
    np.testing.assert_array_equal(custom.reset().observation, stock.reset().observation)
    for action in actions:
        np.testing.assert_array_equal(custom.step(action).observation, stock.step(action).observation)


def test_floor_below_a_cheetah_running_backward_is_drawn():
    physics = tasks.make("cheetah_run_backward", seed=0).physics
    floor_end = physics.named.model.geom_pos["ground", "x"] - physics.named.model.geom_size["ground", 0]
    # Ten seconds at ten metres a second.
    assert floor_end <= -100
