import threading

import numpy as np
import pytest

from bpt_rl.envs import rewards, tasks

TASKS = [task for domain in tasks.DOMAINS.values() for task in domain.tasks]


def record(task, num_steps=100, seed=0):
    """Returns physics, action and observation in ExoRL's alignment, and the environment's own reward."""
    environment = tasks.make(task, seed=seed)
    shape = (num_steps + 1, *environment.action_spec().shape)
    action = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    action[0] = 0
    step = environment.reset()
    physics, observation, reward = [tasks.physics_state(environment)], [step.observation], [0.0]
    for a in action[1:]:
        step = environment.step(a)
        physics.append(tasks.physics_state(environment))
        observation.append(step.observation)
        reward.append(step.reward)
    return np.stack(physics), action, np.stack(observation), np.array(reward)


@pytest.mark.parametrize("task", TASKS)
def test_relabelled_reward_equals_the_environments_own_at_each_step(task):
    physics, action, observation, reward = record(task)
    relabelled = rewards.relabel(task, physics, action, observation)
    assert relabelled.dtype == np.float32
    assert relabelled[0] == 0
    # float32 of rewards up to 1 rounds by 6e-8.
    np.testing.assert_allclose(relabelled, reward, atol=1e-6)
    assert reward[1:].std() > 0 or task.endswith("sparse")


@pytest.mark.parametrize("task", ["cartpole_balance", "cartpole_swingup"])
def test_relabelling_without_the_control_would_be_wrong(task):
    # Recorded near the top, where the reward is not small whatever the control.
    physics, action, _, _ = record("cartpole_balance")
    error = rewards.relabel(task, physics, np.zeros_like(action)) - rewards.relabel(task, physics, action)
    assert error.max() > 0.1


def test_an_episode_of_one_task_is_relabelled_for_another_of_its_domain():
    physics, action, _, run = record("walker_run")
    stand = rewards.relabel("walker_stand", physics, action)
    assert (stand[1:] >= run[1:] - 1e-6).all()
    np.testing.assert_allclose(record("walker_stand")[3], stand, atol=1e-6)


def test_rows_are_relabelled_independently_of_their_neighbours():
    physics, action, _, _ = record("walker_run", num_steps=30)
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(30)])
    whole = rewards.relabel("walker_run", physics, action)
    np.testing.assert_array_equal(rewards.relabel("walker_run", physics[order], action[order]), whole[order])


def test_threads_do_not_disturb_each_other():
    recorded = [record("walker_run", num_steps=60, seed=s) for s in range(3)]
    found = {}

    def relabel(i):
        found[i] = rewards.relabel("walker_run", recorded[i][0], recorded[i][1])

    threads = [threading.Thread(target=relabel, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (_, _, _, reward) in enumerate(recorded):
        np.testing.assert_allclose(found[i], reward, atol=1e-6)


def test_the_dummy_row_alone_has_no_reward():
    np.testing.assert_array_equal(rewards.relabel("cheetah_run", np.zeros((1, 18)), np.zeros((1, 6))), [0])


def test_arrays_that_do_not_fit_are_refused():
    physics, action = np.zeros((5, 18)), np.zeros((5, 6))
    with pytest.raises(ValueError, match="Nearest valid one: 'walker_walk'"):
        rewards.relabel("walker_wal", physics, action)
    with pytest.raises(ValueError, match=r"physics of cartpole must have shape \[T\+1, 4\]; got \[5, 18\]"):
        rewards.relabel("cartpole_balance", physics, action)
    with pytest.raises(ValueError, match=r"action of walker must have shape \[T\+1, 6\]; got \[5, 5\]"):
        rewards.relabel("walker_run", physics, action[:, :5])
    with pytest.raises(ValueError, match=r"observation of walker must have shape \[T\+1, 24\]; got \[5, 2\]"):
        rewards.relabel("walker_run", physics, action, np.zeros((5, 2)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_their_row(value):
    physics, action = np.zeros((5, 18)), np.zeros((5, 6))
    action[3, 2] = value
    with pytest.raises(ValueError, match=f"action must be finite; got {value} in row 3"):
        rewards.relabel("walker_run", physics, action)
