import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.nn.replay import Replay

T, N = 5, 3


def replay_of(num_slots, num_step_return):
    return Replay(
        num_slots=num_slots,
        num_environments=N,
        episode_steps=T,
        num_step_return=num_step_return,
        discount=0.9,
    )


def observation_of(episode, step, environment):
    """A number that says where it is from."""
    return 1000.0 * episode + 10 * step + environment


def filled(replay, num_rows):
    state, add = replay.init(1, 1, 1), jax.jit(replay.add)
    for row in range(num_rows):
        values = jnp.array([[observation_of(*divmod(row, T + 1), i)] for i in range(N)])
        state = add(state, values, -values, values + 0.5)
    return state


def true_transitions(num_rows, num_slots, n):
    """(observation, next observation) of plain episodes of which only the newest rows are remembered."""
    found = []
    for row in range(max(0, num_rows - num_slots), num_rows):
        episode, step = divmod(row, T + 1)
        if step + n <= T and row + n < num_rows:
            found += [
                (observation_of(episode, step, i), observation_of(episode, step + n, i)) for i in range(N)
            ]
    return set(found)


# A ring that is not full; one that holds whole episodes and one that does not; the end of an episode just written.
@pytest.mark.parametrize(
    ("num_slots", "num_rows", "n"), [(40, 4, 3), (12, 27, 3), (11, 26, 1), (9, 24, 2), (11, 23, 5)]
)
def test_every_transition_of_the_newest_rows_is_drawn_equally_and_no_other(num_slots, num_rows, n):
    replay = replay_of(num_slots, n)
    batch = jax.jit(replay.sample, static_argnums=2)(filled(replay, num_rows), jax.random.key(0), 20_000)
    drawn, counts = np.unique(
        np.concatenate([batch.observation, batch.next_observation], axis=1), axis=0, return_counts=True
    )
    expected = true_transitions(num_rows, num_slots, n)
    assert {tuple(map(float, pair)) for pair in drawn} == expected
    mean = 20_000 / len(expected)
    # Five standard deviations of a count.
    assert np.abs(counts - mean).max() < 5 * np.sqrt(mean)
    np.testing.assert_array_equal(batch.action, -batch.observation)
    np.testing.assert_array_equal(batch.skill, batch.observation + 0.5)
    np.testing.assert_allclose(batch.discount, 0.9**n, rtol=1e-6)


def test_more_steps_than_an_episode_or_the_ring_has_are_refused():
    with pytest.raises(ValueError, match=r"num_step_return must be .*; got 6, 5 and 40\."):
        replay_of(40, 6)
    with pytest.raises(ValueError, match=r"got 3, 5 and 6\. Use fewer steps, or raise replay_steps"):
        replay_of(6, 3)
