import numpy as np
import pytest

from bpt_rl.envs import reward_functions, rewards, tasks
from bpt_rl.envs.formula_task import BASES

# float32 of rewards up to 1 rounds by 6e-8; the control is scaled to the action and back.
PROMISED = 1e-6


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_functions, "_registered", {})
    path = tmp_path / "own.py"
    function = "def {}(features, observation, action):\n    return {}\n"
    path.write_text(
        function.format("walker_low", "observation[..., 14] - features['torso_height'] + action[..., 0] ** 2")
        + function.format(
            "jaco_still", "1 / (1 + (observation ** 2).sum(axis=-1) + abs(action).sum(axis=-1))"
        )
    )
    return path


@pytest.mark.parametrize(
    "task",
    [
        "walker_speed(speed=-3)",
        "walker_height(height=0.6)",
        "cheetah_spin(momentum=2)",
        "quadruped_speed(speed=0.3,heading=-90)",
        "cartpole_position(position=0.5)",
        "point_mass_maze_reach(x=-0.2,y=0.2)",
        "jaco_reach(x=0,y=0.1,z=0.2)",
    ],
)
def test_the_reward_paid_equals_that_of_the_relabelled_episode(episode, task):
    recorded = episode(task)
    relabelled = rewards.relabel(task, recorded.physics, recorded.action)
    np.testing.assert_allclose(relabelled, recorded.reward, atol=PROMISED, rtol=0)
    assert recorded.reward[1:].std() > 0


@pytest.mark.parametrize("name", ["walker_low", "jaco_still"])
def test_a_users_function_is_paid_and_sees_the_observation(episode, own_file, name):
    task = f"{own_file}:{name}"
    recorded = episode(task)
    relabelled = rewards.relabel(task, recorded.physics, recorded.action, recorded.observation)
    np.testing.assert_allclose(relabelled, recorded.reward, atol=PROMISED, rtol=0)
    assert recorded.reward[1:].std() > 0


def test_the_simulators_own_way_of_relabelling_agrees(wild):
    task = "walker_speed(speed=-3)"
    recorded = wild("walker_run")
    np.testing.assert_allclose(
        rewards.relabel_by_simulation(task, recorded.physics, recorded.action),
        rewards.relabel(task, recorded.physics, recorded.action),
        atol=PROMISED,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("task", "domain"), [("walker_speed(speed=2)", "walker"), ("jaco_reach(x=0,y=0,z=0)", "jaco")]
)
def test_body_and_start_states_are_those_of_the_base_task(episode, task, domain):
    np.testing.assert_array_equal(episode(task).physics, episode(BASES[domain]).physics)
    np.testing.assert_array_equal(episode(task).observation, episode(BASES[domain]).observation)


@pytest.mark.parametrize("domain", BASES)
def test_every_domain_has_a_base_task(domain):
    assert BASES.keys() == tasks.DOMAINS.keys()
    assert BASES[domain] in tasks.tasks_of(domain)


def test_action_repeat_adds_the_rewards_of_the_control_steps():
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 6)).astype(np.float32)
    totals = []
    for action_repeat in (1, 5):
        environment = tasks.make("cheetah_speed(speed=-2)", seed=1, action_repeat=action_repeat)
        environment.reset()
        held = np.repeat(actions, 5 // action_repeat, axis=0)
        totals.append(sum(environment.step(action).reward for action in held))
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)
    assert totals[0] > 0


@pytest.mark.parametrize("domain", ["point_mass_maze", "jaco"])
def test_the_base_tasks_goal_is_not_drawn(domain):
    task = {"point_mass_maze": "point_mass_maze_reach(x=0,y=0)", "jaco": "jaco_reach(x=0,y=0,z=0)"}[domain]
    opacity = []
    for name in (BASES[domain], task):
        environment = tasks.make(name, seed=0)
        environment.reset()
        opacity.append(float(environment.physics.named.model.site_rgba["goal", 3]))
        environment.close()
    assert opacity[0] > 0
    assert opacity[1] == 0


def test_simulator_processes_load_the_file(own_file):
    environments = tasks.make_vector(f"{own_file}:walker_low", 2, 0, num_workers=1)
    try:
        environments.reset()
        _, reward, *_ = environments.step(np.full((2, 6), 0.5, np.float32))
        # Height less height, and the action's square.
        np.testing.assert_allclose(reward, 0.25, atol=1e-6)
    finally:
        environments.close()


def test_a_function_of_this_process_is_refused_before_processes_start(monkeypatch):
    monkeypatch.setattr(reward_functions, "_registered", {})
    reward_functions.register("walker_here", lambda features, observation, action: features["torso_height"])
    assert tasks.make("walker_here", seed=0).reset().first()
    with pytest.raises(ValueError, match=r"in this process only\. Write the task as FILE\.py:walker_here"):
        tasks.make_vector("walker_here", 2, 0)


def test_a_functions_fault_is_told_at_the_step(monkeypatch):
    monkeypatch.setattr(reward_functions, "_registered", {})
    reward_functions.register("walker_bad", lambda features, observation, action: np.full(1, np.nan))
    environment = tasks.make("walker_bad", seed=0)
    environment.reset()
    with pytest.raises(ValueError, match=r"walker_bad of .* returned nan"):
        environment.step(np.zeros(6))
