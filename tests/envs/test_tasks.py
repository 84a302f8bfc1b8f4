import subprocess
import sys

import numpy as np
import pytest

from bpt_rl.envs import tasks

TASKS = [task for domain in tasks.DOMAINS.values() for task in domain.tasks]


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


def test_equal_seeds_give_equal_episodes_and_others_do_not():
    actions = uniform_actions("walker_run", 5)
    first, second, other = (rollout(tasks.make("walker_run", seed=s), actions)[0] for s in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0.1


def test_seeding_again_equals_a_fresh_environment():
    actions = uniform_actions("walker_run", 5)
    used = tasks.make("walker_run", seed=3)
    rollout(used, actions)
    used.seed(8)
    np.testing.assert_array_equal(
        rollout(used, actions)[0], rollout(tasks.make("walker_run", seed=8), actions)[0]
    )


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


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'walker_runn'. Nearest valid one: 'walker_run'\."):
        tasks.make("walker_runn", seed=0)
    with pytest.raises(ValueError, match=r"got 'cheeta'. Nearest valid one: 'cheetah'\."):
        tasks.tasks_of("cheeta")


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
