import dataclasses

import jax
import numpy as np
import pytest

from bpt_rl.datasets import capacity
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.transitions import (
    TransitionDraw,
    Transitions,
    check_room,
    index_arrays,
    load_transitions,
    num_bytes,
)

TASK = "cartpole_swingup"

# Two episodes, of three steps and of one, in ExoRL's alignment: rows 0 and 4 are dummies.
LENGTHS = np.array([3, 1])
LITERAL = Transitions(
    observation=np.array([[10.0], [11.0], [12.0], [13.0], [20.0], [21.0]], np.float32),
    action=np.array([[0.0], [0.1], [0.2], [0.3], [0.0], [0.5]], np.float32),
    reward=np.array([0.0, 1.0, 2.0, 4.0, 0.0, 8.0], np.float32),
    row_index=np.array([1, 2, 3, 5], np.int32),
    steps_after=np.array([2, 1, 0, 0], np.int32),
)


def all_of(transitions, num_step_return=1, discount=0.5):
    draw = TransitionDraw(batch_size=1, num_step_return=num_step_return, discount=discount)
    gather = jax.jit(draw.gather)
    return jax.tree.map(np.asarray, gather(transitions, np.arange(len(transitions.row_index))))


def test_row_indices_pass_over_the_dummy_row_of_each_episode():
    row_index, steps_after = index_arrays(LENGTHS)
    np.testing.assert_array_equal(row_index, LITERAL.row_index)
    np.testing.assert_array_equal(steps_after, LITERAL.steps_after)
    assert row_index.dtype == steps_after.dtype == np.int32


def test_single_steps_pair_each_action_with_the_observations_around_it_and_its_own_reward():
    batch = all_of(LITERAL)
    np.testing.assert_array_equal(batch.observation, [[10], [11], [12], [20]])
    np.testing.assert_array_equal(batch.action, np.float32([[0.1], [0.2], [0.3], [0.5]]))
    np.testing.assert_array_equal(batch.reward, [1, 2, 4, 8])
    np.testing.assert_array_equal(batch.next_observation, [[11], [12], [13], [21]])


def test_the_last_transition_of_an_episode_bootstraps_like_any_other():
    # Time limits cut off what follows; they do not make it worthless.
    batch = all_of(LITERAL, discount=0.9)
    np.testing.assert_array_equal(batch.discount, np.full(4, np.float32(0.9)))
    np.testing.assert_array_equal(batch.next_observation[[2, 3]], [[13], [21]])


def test_n_steps_add_up_discounted_rewards_and_stop_at_the_end_of_the_episode():
    batch = all_of(LITERAL, num_step_return=2)
    np.testing.assert_array_equal(batch.observation, [[10], [11], [12], [20]])
    # 1 + 2 / 2, 2 + 4 / 2, then episodes that end: 4 and 8 alone.
    np.testing.assert_array_equal(batch.reward, [2, 4, 4, 8])
    np.testing.assert_array_equal(batch.discount, [0.25, 0.25, 0.5, 0.5])
    np.testing.assert_array_equal(batch.next_observation, [[12], [13], [13], [21]])
    longer = all_of(LITERAL, num_step_return=5)
    np.testing.assert_array_equal(longer.reward, [1 + 1 + 1, 2 + 2, 4, 8])
    np.testing.assert_array_equal(longer.discount, [0.125, 0.25, 0.5, 0.5])
    np.testing.assert_array_equal(longer.next_observation, [[13], [13], [13], [21]])


@pytest.mark.parametrize("num_step_return", [1, 3])
def test_transitions_of_a_store_equal_those_read_from_its_episodes_one_by_one(short_store, num_step_return):
    discount = 0.9
    with Store.open(short_store) as store:
        loaded = load_transitions(store, TASK)
        episodes = [store.episode(i) for i in range(store.num_episodes)]
    assert len({episode.num_steps for episode in episodes}) > 3
    expected = []
    for episode in episodes:
        reward, last = episode.task_reward[TASK], episode.num_steps
        for t in range(1, last + 1):
            end = min(t + num_step_return - 1, last)
            total = sum(discount ** (k - t) * reward[k] for k in range(t, end + 1))
            expected.append(
                (
                    episode.observation[t - 1],
                    episode.action[t],
                    total,
                    discount ** (end - t + 1),
                    episode.observation[end],
                )
            )
    found = all_of(loaded, num_step_return, discount)
    for values, column in zip(found, zip(*expected, strict=True), strict=True):
        # Sums of three float32.
        np.testing.assert_allclose(values, np.array(column), rtol=1e-6)
    assert np.abs(found.reward).max() > 0


def test_memory_is_what_is_said(short_store):
    with Store.open(short_store) as store:
        assert num_bytes(store) == sum(np.asarray(x).nbytes for x in load_transitions(store, TASK))


def test_each_transition_is_drawn_as_often_as_any_other_whatever_its_episode():
    draw = TransitionDraw(batch_size=40_000, discount=0.9)
    drawn = np.asarray(draw.indices(LITERAL, jax.random.key(0)))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    # Five standard errors of a share of a quarter.
    np.testing.assert_allclose(shares, np.full(4, 0.25), atol=5 * np.sqrt(0.25 * 0.75 / 40_000))
    again, other = (np.asarray(draw.indices(LITERAL, jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_array_equal(drawn, again)
    assert (drawn != other).mean() > 0.5


def test_transitions_that_do_not_fit_are_refused(short_store, monkeypatch):
    with Store.open(short_store) as store:
        needed = num_bytes(store)
        for room in (
            capacity.Capacity(accelerator=needed, host=2**40),
            capacity.Capacity(accelerator=None, host=needed),
        ):
            monkeypatch.setattr(capacity, "measure", lambda room=room: room)
            with pytest.raises(ValueError, match=r"fit into 80% of .* takes .* GiB of .* --subset first-1M"):
                load_transitions(store, TASK)
        enough = dataclasses.replace(room, accelerator=2 * needed)
        monkeypatch.setattr(capacity, "measure", lambda: enough)
        check_room(store)


def test_rewards_that_are_not_finite_or_not_there_are_refused(short_store, tmp_path, edited):
    path = tmp_path / "store.h5"
    path.write_bytes(short_store.read_bytes())
    with edited(path) as file:
        file["reward"][TASK][0, 1] = np.nan
    with Store.open(path) as store, pytest.raises(ValueError, match="Rewards must be finite"):
        load_transitions(store, TASK)
    with Store.open(short_store) as store, pytest.raises(ValueError, match="got 'walker_run'"):
        load_transitions(store, "walker_run")
