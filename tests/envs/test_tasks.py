import subprocess
import sys

import numpy as np
import pytest

from bpt_rl.envs import tasks

TASKS = [task for domain in tasks.DOMAINS.values() for task in domain.tasks]
KINDS = ["walker_run", "quadruped_jump", "point_mass_maze_reach_top_left", "jaco_reach_top_left"]
"""A task of each kind: the suite's, one that adds a reward, one with a model of its own, one of parts."""


def rollout(environment, actions):
    """Returns the observations and rewards of one episode's first steps."""
    steps = [environment.reset(), *(environment.step(action) for action in actions)]
    return np.stack([step.observation for step in steps]), np.array([step.reward for step in steps[1:]])


def uniform_actions(task, num_steps, seed=0):
    action_dim = tasks.DOMAINS[tasks.domain_of(task)].action_dim
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, action_dim)).astype(np.float32)


@pytest.mark.parametrize("task", TASKS)
def test_sizes_are_those_of_the_simulator(task):
    domain = tasks.DOMAINS[tasks.domain_of(task)]
    environment = tasks.make(task, seed=0)
    time_step = environment.reset()
    assert environment.observation_spec().shape == time_step.observation.shape == (domain.observation_dim,)
    assert time_step.observation.dtype == environment.observation_spec().dtype == np.float32
    assert environment.action_spec().shape == (domain.action_dim,)
    np.testing.assert_array_equal(environment.action_spec().minimum, -1)
    np.testing.assert_array_equal(environment.action_spec().maximum, 1)
    state = tasks.physics_state(environment)
    assert state.shape == (domain.physics_dim,)
    assert state.dtype == np.float64


@pytest.mark.parametrize("task", ["cartpole_swingup", "quadruped_walk"])
def test_steps_equal_those_of_the_plain_suite(task):
    from dm_control import suite

    domain = tasks.domain_of(task)
    plain = suite.load(domain, task.removeprefix(f"{domain}_"), task_kwargs={"random": 5})
    low, high = plain.action_spec().minimum, plain.action_spec().maximum
    actions = uniform_actions(task, 20)
    steps = [
        plain.reset(),
        *(plain.step(low + (high - low) * (action.astype(float) + 1) / 2) for action in actions),
    ]
    flat = [np.concatenate([np.ravel(value) for value in step.observation.values()]) for step in steps]
    observation, reward = rollout(tasks.make(task, seed=5), actions)
    # float32 of the same simulation; scaling actions rounds in another order, which contacts amplify.
    np.testing.assert_allclose(observation, flat, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reward, [step.reward for step in steps[1:]], atol=1e-8)


@pytest.mark.parametrize("task", KINDS)
def test_equal_seeds_give_equal_episodes_and_others_do_not(task):
    actions = uniform_actions(task, 5)
    first, second, other = (rollout(tasks.make(task, seed=s), actions)[0] for s in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize("task", KINDS)
def test_seeding_again_equals_a_fresh_environment(task):
    actions = uniform_actions(task, 5)
    used = tasks.make(task, seed=3)
    rollout(used, actions)
    used.seed(8)
    np.testing.assert_array_equal(rollout(used, actions)[0], rollout(tasks.make(task, seed=8), actions)[0])


@pytest.mark.parametrize("task", TASKS)
def test_state_and_control_alone_give_the_reward_of_a_step(task):
    environment = tasks.make(task, seed=1)
    environment.reset()
    passed = []
    for action in uniform_actions(task, 30):
        reward = environment.step(action).reward
        assert environment.reward() == reward
        passed.append((tasks.physics_state(environment), environment.physics.control(), reward))
    # Backwards, so that nothing left over from the step before helps.
    physics = environment.physics
    for state, control, reward in reversed(passed):
        physics.set_state(state)
        physics.set_control(control)
        physics.forward()
        # Derived quantities are worked out anew from the same state, in the same order.
        np.testing.assert_allclose(environment.reward(), reward, atol=1e-12)


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_an_episode_has_the_steps_of_its_domain(domain):
    num_steps = tasks.DOMAINS[domain].episode_steps
    environment = tasks.make(tasks.tasks_of(domain)[0], seed=0)
    environment.reset()
    steps = [environment.step(np.zeros(environment.action_spec().shape)) for _ in range(num_steps)]
    assert [step.last() for step in steps].index(True) == num_steps - 1
    assert steps[-1].discount == 1


def test_jaco_holds_actions_and_adds_rewards_like_the_others():
    task = "jaco_reach_top_right"
    actions = uniform_actions(task, 3)
    each, each_reward = rollout(tasks.make(task, seed=6), np.repeat(actions, 10, axis=0))
    merged, merged_reward = rollout(tasks.make(task, seed=6, action_repeat=10), actions)
    np.testing.assert_array_equal(merged, each[::10])
    np.testing.assert_allclose(merged_reward, each_reward.reshape(3, 10).sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("task", "action_repeat"), [("point_mass_maze_reach_bottom_left", 250), ("jaco_reach_bottom_left", 125)]
)
def test_each_environment_of_a_vector_equals_a_single_one(task, action_repeat):
    environments = tasks.make_vector(task, 2, 7, action_repeat, num_workers=1)
    try:
        observation, _ = environments.reset()
        actions = np.stack([uniform_actions(task, 4, seed=i) for i in range(2)], axis=1)
        steps = [environments.step(action) for action in actions]
    finally:
        environments.close()
    for i in range(2):
        single = tasks.make(task, int(np.random.SeedSequence([7, i]).generate_state(1)[0]), action_repeat)
        np.testing.assert_array_equal(observation[i], single.reset().observation)
        episode = 0
        for t in range(4):
            expected = single.step(actions[t, i])
            assert (steps[t][1][i], steps[t][3][i]) == (expected.reward, expected.last())
            if expected.last():
                np.testing.assert_array_equal(steps[t][4]["final_obs"][i], expected.observation)
                episode += 1
                single.seed(int(np.random.SeedSequence([7, i, episode]).generate_state(1)[0]))
                expected = single.reset()
            np.testing.assert_array_equal(steps[t][0][i], expected.observation)


@pytest.mark.parametrize("task", KINDS)
def test_closing_frees_the_simulator_and_may_be_repeated(task):
    environment = tasks.make(task, seed=0)
    environment.reset()
    assert hasattr(environment.physics, "_data")
    environment.close()
    environment.close()
    assert not hasattr(environment.physics, "_data")


def test_action_repeat_holds_the_action_and_adds_rewards():
    actions = uniform_actions("cheetah_run", 4)
    each, each_reward = rollout(tasks.make("cheetah_run", seed=1), np.repeat(actions, 5, axis=0))
    merged, merged_reward = rollout(tasks.make("cheetah_run", seed=1, action_repeat=5), actions)
    np.testing.assert_array_equal(merged, each[::5])
    np.testing.assert_allclose(merged_reward, each_reward.reshape(4, 5).sum(axis=1), rtol=1e-12)


def test_action_repeat_stops_at_the_end_of_the_episode():
    environment = tasks.make("cartpole_balance_sparse", seed=0, action_repeat=300)
    environment.reset()
    steps = [environment.step(np.zeros(1)) for _ in range(5)]
    assert [step.last() for step in steps] == [False, False, False, True, False]
    assert steps[3].discount == 1.0
    assert steps[4].first()
    assert steps[4].reward is None


def test_tasks_and_domains_name_each_other():
    for domain in tasks.DOMAINS:
        assert [tasks.domain_of(task) for task in tasks.tasks_of(domain)] == [domain] * len(
            tasks.tasks_of(domain)
        )


def test_tasks_of_the_suite_stand_before_those_added_to_it():
    from dm_control import suite

    for domain in tasks.DOMAINS:
        stock = [
            (domain, task.removeprefix(f"{domain}_")) in suite.ALL_TASKS for task in tasks.tasks_of(domain)
        ]
        assert stock == sorted(stock, reverse=True)
    assert [len(tasks.tasks_of(domain)) for domain in tasks.DOMAINS] == [4] * 6


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'walker_runn'. Nearest valid one: 'walker_run'\."):
        tasks.make("walker_runn", seed=0)
    with pytest.raises(ValueError, match=r"got 'cheeta'. Nearest valid one: 'cheetah'\."):
        tasks.tasks_of("cheeta")


def test_a_task_is_named_in_full():
    with pytest.raises(ValueError, match=r"Nearest valid one: 'point_mass_maze_reach_top_left'\."):
        tasks.make("point_mass_reach_top_left", seed=0)
    with pytest.raises(ValueError, match=r"got 'reach_top_left'"):
        tasks.make("reach_top_left", seed=0)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="action_repeat must be at least 1; got 0"):
        tasks.make("walker_run", seed=0, action_repeat=0)
    with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\*\*32\); got -1"):
        tasks.make("walker_run", seed=-1)
    with pytest.raises(ValueError, match=r"An action must have shape \(6,\); got \(1,\)"):
        tasks.make("walker_run", seed=0).step(np.zeros(1))


@pytest.mark.parametrize("version", ["4.0.0", "3.16.2"])
def test_an_unfit_mujoco_is_named_before_dm_control_is_imported(monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(
        ImportError, match=rf"mujoco>=3\.17,<4; mujoco {version} is installed\. Run: pip install"
    ):
        tasks.make("walker_run", seed=0)


def test_simulating_neither_imports_jax_nor_prints():
    script = (
        "import sys; from bpt_rl.envs import rewards, tasks, vector; assert 'dm_control' not in sys.modules; "
        "tasks.make('cheetah_run', seed=0).reset(); assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
