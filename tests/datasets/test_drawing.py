"""Draws of episodes, without a store."""

import itertools

import numpy as np
import pytest

from bpt_rl.config import DataConfig
from bpt_rl.datasets.drawing import Drawing

LENGTHS = np.array([4, 8, 12, 16, 20, 24, 28, 32])
RETURNS = np.array([3.0, 7, 1, 5, 0, 6, 2, 4], np.float32)
NAMES = [f"walker/{name}/episode_{i:06d}_1.npz" for name in ("rnd", "icm") for i in range(4)]


def make(**changes):
    return Drawing(DataConfig(**({"num_trajectories": 2} | changes)), RETURNS, LENGTHS, NAMES)


def draw(drawing, num_chains, *, size=2, seed=0, index=0):
    generator = np.random.default_rng([seed, index])
    return drawing.chains(generator, seed, first=index * num_chains, num_chains=num_chains, size=size)


def test_by_length_draws_every_step_of_the_data_alike():
    counts = np.bincount(draw(make(num_trajectories=1, draw="by_length"), 7200, size=1).picked.ravel())
    # Multiples of 50; standard deviation at most 38. Five of those.
    np.testing.assert_allclose(counts, 7200 * LENGTHS / LENGTHS.sum(), atol=190)
    # Of the second of two, the chance given the first is in proportion to the lengths that are left.
    pairs = draw(make(draw="by_length", order="collected"), 9000).picked
    assert (pairs[:, 0] < pairs[:, 1]).all()
    share = LENGTHS / LENGTHS.sum()
    chance = share[6] * share[7] * (1 / (1 - share[6]) + 1 / (1 - share[7]))
    # Standard deviation 31; five of those.
    assert abs((pairs == [6, 7]).all(axis=1).sum() - 9000 * chance) < 155


def test_without_replacement_every_episode_comes_once_before_any_comes_again():
    drawing, batch = make(draw="without_replacement", num_trajectories=3, order="shuffled"), 5
    # Two chains of three an epoch; the two episodes that are left over are others in the next.
    picked = np.concatenate([draw(drawing, batch, size=3, index=i).picked for i in range(8)])
    epochs = picked.reshape(20, 6)
    assert all(len(set(epoch)) == 6 for epoch in epochs.tolist())
    assert set(picked.ravel()) == set(range(8))
    assert len({frozenset(epoch) for epoch in epochs.tolist()}) > 5
    # Several seeds may ask the same object in turn, within one epoch.
    first, other, again = (draw(drawing, 2, size=3, seed=seed).picked for seed in (0, 1, 0))
    np.testing.assert_array_equal(first, picked[:2])
    np.testing.assert_array_equal(again, first)
    assert set(other.ravel()) != set(first.ravel())


@pytest.mark.parametrize(("stride", "expected"), [(1, [(0, 1), (1, 2), (2, 3)]), (2, [(0, 2), (1, 3)])])
def test_consecutive_draws_are_stretches_of_one_collectors_episodes(stride, expected):
    drawing = make(draw="consecutive", order="collected", stride=stride)
    found = set(map(tuple, draw(drawing, 300).picked.tolist()))
    assert found == {*expected, *((a + 4, b + 4) for a, b in expected)}


@pytest.mark.parametrize("name", ["uniform", "return_stratified"])
def test_order_is_by_return_or_collection_or_any(name):
    ascending, collected, shuffled = (
        draw(make(draw=name, num_trajectories=4, order=order), 400, size=4).picked
        for order in ("ascending", "collected", "shuffled")
    )
    assert (np.diff(RETURNS[ascending], axis=1) > 0).all()
    assert (np.diff(collected, axis=1) > 0).all()
    # The same episodes, whatever their order.
    for other in (collected, shuffled):
        np.testing.assert_array_equal(np.sort(other, axis=1), np.sort(ascending, axis=1))
    ranks = RETURNS[shuffled].argsort(axis=1).argsort(axis=1)
    assert set(map(tuple, ranks.tolist())) == set(itertools.permutations(range(4)))


def test_windows_that_begin_anywhere_end_with_their_episode():
    changes = {"num_trajectories": 1, "window": 10, "top_fraction": 0.125}
    # The best episode alone, of 8 steps: fewer than the window.
    found = draw(make(window_start="anywhere", **changes), 200, size=1)
    assert set(map(tuple, np.stack([found.start, found.num_steps], -1).reshape(-1, 2).tolist())) == {
        (start, 8 - start) for start in range(8)
    }
    whole = draw(make(window_start="anywhere", num_trajectories=1, window=3), 500, size=1)
    np.testing.assert_array_equal(whole.num_steps, np.minimum(3, LENGTHS[whole.picked] - whole.start))
    assert whole.num_steps.min() == 1
    with pytest.raises(
        ValueError, match=r"got 10 and 8 steps. Use a shorter window, or window_start anywhere"
    ):
        make(**changes)


def test_collectors_limit_what_is_drawn_and_what_is_best():
    assert set(draw(make(collectors=("walker/icm",)), 100).picked.ravel()) == {4, 5, 6, 7}
    assert make(collectors=("walker/icm",), top_fraction=0.5).eligible.tolist() == [7, 5]
    with pytest.raises(
        ValueError, match=r"sources of the store's episodes, walker/rnd, walker/icm; got 'rnd'"
    ):
        make(collectors=("rnd",))


def test_stretches_that_no_collector_has_are_refused():
    with pytest.raises(ValueError, match="got num_trajectories 3 and stride 2, and no collector has so many"):
        make(draw="consecutive", stride=2, num_trajectories=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mixture": (1, 2)},
            "largest number of the mixture, and all positive; got 4 and 1, 2. Set num_traj",
        ),
        ({"mixture": (0, 4)}, "all positive; got 4 and 0, 4"),
        (
            {"mixture": (2, 4), "draw": "without_replacement"},
            "must all be of one size; got a mixture of 2, 4",
        ),
        ({"stride": 2}, "Only consecutive episodes have a stride; got stride 2 and draw 'uniform'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)
