import threading

import numpy as np
import pytest

from bpt_rl.envs import reward_formulas, reward_functions, rewards, tasks
from bpt_rl.envs.features import FEATURES, physical_features

TASKS = [task for domain in tasks.DOMAINS.values() for task in domain.tasks]
# float32 of rewards up to 1 rounds by 6e-8; the rest is what is promised.
PROMISED = 1e-6


@pytest.mark.parametrize("task", TASKS)
def test_relabelled_reward_equals_the_one_paid_at_each_step(episode, task):
    recorded = episode(task)
    relabelled = rewards.relabel(task, recorded.physics, recorded.action, recorded.observation)
    assert relabelled.dtype == np.float32
    assert relabelled[0] == 0
    np.testing.assert_allclose(relabelled, recorded.reward, atol=PROMISED, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_relabelled_reward_equals_the_one_paid_in_wild_states(wild, task):
    recorded = wild(task)
    relabelled = rewards.relabel(task, recorded.physics, recorded.action)
    np.testing.assert_allclose(relabelled, recorded.reward, atol=PROMISED, rtol=0)
    # Else it would be easy.
    assert relabelled[1:].max() > 0.2
    assert relabelled[1:].std() > 0.05


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_formulas_equal_the_simulation_of_each_state(wild, domain):
    task = tasks.tasks_of(domain)[-1]
    recorded = wild(tasks.tasks_of(domain)[0])
    np.testing.assert_allclose(
        rewards.relabel(task, recorded.physics, recorded.action),
        rewards.relabel_by_simulation(task, recorded.physics, recorded.action, recorded.observation),
        atol=PROMISED,
        rtol=0,
    )


def test_a_task_without_a_formula_goes_through_the_simulator(episode, monkeypatch):
    recorded = episode("walker_flip")
    monkeypatch.delitem(reward_formulas.NAMED["walker"], "flip")
    relabelled = rewards.relabel("walker_flip", recorded.physics, recorded.action)
    np.testing.assert_allclose(relabelled, recorded.reward, atol=PROMISED, rtol=0)
    with pytest.raises(ValueError, match=r"'walker_flip' has none\. Relabel it from physics"):
        rewards.reward_from_features("walker_flip", np.zeros((2, 4)), None, np.zeros((2, 6)))


def test_a_sparse_reward_has_its_edge_where_the_suite_has_it():
    outside = np.nextafter(0.25, 1)
    carts = np.array([0, 0.25, -0.25, outside, -outside])
    physics = np.stack([carts, np.zeros(5), np.zeros(5), np.zeros(5)], axis=1)
    action = np.zeros((5, 1))
    for relabel in (rewards.relabel, rewards.relabel_by_simulation):
        np.testing.assert_array_equal(relabel("cartpole_balance_sparse", physics, action), [0, 1, 1, 0, 0])


@pytest.mark.parametrize("task", ["cartpole_swingup", "point_mass_maze_reach_top_left"])
def test_relabelling_without_the_control_would_be_wrong(wild, task):
    recorded = wild(task)
    idle = rewards.relabel(task, recorded.physics, np.zeros_like(recorded.action))
    assert (idle - rewards.relabel(task, recorded.physics, recorded.action)).max() > 0.1


def test_an_episode_of_one_task_is_relabelled_for_another_of_its_domain(episode):
    recorded = episode("walker_run")
    stand = rewards.relabel("walker_stand", recorded.physics, recorded.action)
    assert (stand[1:] >= recorded.reward[1:] - 1e-6).all()
    np.testing.assert_allclose(episode("walker_stand").reward, stand, atol=PROMISED)


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_a_block_of_episodes_is_relabelled_like_each_of_them(episode, domain):
    task = tasks.tasks_of(domain)[0]
    recorded = [episode(task, seed=seed) for seed in (0, 1)]
    features = np.stack([physical_features(domain, one.physics) for one in recorded])
    observation = np.stack([one.observation for one in recorded])
    action = np.stack([one.action for one in recorded])
    block = rewards.reward_from_features(task, features, observation, action)
    assert block.dtype == np.float32
    np.testing.assert_array_equal(
        block, [rewards.relabel(task, one.physics, one.action, one.observation) for one in recorded]
    )


def test_rows_are_relabelled_independently_of_their_neighbours(wild):
    recorded = wild("walker_run")
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(60)])
    whole = rewards.relabel("walker_run", recorded.physics, recorded.action)
    shuffled = rewards.relabel("walker_run", recorded.physics[order], recorded.action[order])
    np.testing.assert_array_equal(shuffled, whole[order])


def test_threads_do_not_disturb_each_other(episode):
    recorded = [episode("walker_run", seed=seed) for seed in range(3)]
    found = {}

    def relabel(i):
        for relabel in (rewards.relabel, rewards.relabel_by_simulation):
            found[i, relabel] = [
                relabel("walker_run", recorded[i].physics, recorded[i].action) for _ in range(5)
            ]

    threads = [threading.Thread(target=relabel, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for (i, _), relabelled in found.items():
        for one in relabelled:
            np.testing.assert_allclose(one, recorded[i].reward, atol=PROMISED)


def test_the_dummy_row_alone_has_no_reward():
    for relabel in (rewards.relabel, rewards.relabel_by_simulation):
        np.testing.assert_array_equal(relabel("cheetah_run", np.zeros((1, 18)), np.zeros((1, 6))), [0])


@pytest.mark.parametrize("relabel", [rewards.relabel, rewards.relabel_by_simulation])
def test_arrays_that_do_not_fit_are_refused(relabel):
    physics, action = np.zeros((5, 18)), np.zeros((5, 6))
    with pytest.raises(ValueError, match="Nearest valid one: 'walker_walk'"):
        relabel("walker_wal", physics, action)
    with pytest.raises(ValueError, match=r"physics of cartpole must have shape \[T\+1, 4\]; got \[5, 18\]"):
        relabel("cartpole_balance", physics, action)
    with pytest.raises(ValueError, match=r"action of walker must have shape \[T\+1, 6\]; got \[5, 5\]"):
        relabel("walker_run", physics, action[:, :5])
    with pytest.raises(ValueError, match=r"observation of walker must have shape \[T\+1, 24\]; got \[5, 2\]"):
        relabel("walker_run", physics, action, np.zeros((5, 2)))


def test_features_of_another_domain_are_refused():
    with pytest.raises(ValueError, match=r"Features of walker must be torso_height, .*; got 2 columns"):
        rewards.reward_from_features("walker_run", np.zeros((5, 2)), None, np.zeros((5, 6)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_their_row(value):
    physics, action = np.zeros((5, 18)), np.zeros((5, 6))
    action[3, 2] = value
    with pytest.raises(ValueError, match=f"action must be finite; got {value} in row 3"):
        rewards.relabel("walker_run", physics, action)


@pytest.mark.parametrize("task", TASKS)
def test_every_named_task_has_a_formula_over_the_features_of_its_domain(task):
    found = reward_functions.find(task)
    assert found.domain == tasks.domain_of(task)
    names = FEATURES[found.domain]
    values = np.random.default_rng(0).normal(size=(len(names), 7))
    action = np.zeros((7, tasks.DOMAINS[found.domain].action_dim))
    assert np.isfinite(found(dict(zip(names, values, strict=True)), None, action)).all()
