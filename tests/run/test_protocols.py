import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from bpt_rl.run import protocols
from bpt_rl.types import EpisodeLog


def make_log(returns, context="chain"):
    returns = np.asarray(returns, np.float64)
    return EpisodeLog(
        returns=returns,
        num_steps=np.full(returns.shape, 1000, np.int64),
        context=context,
        task="walker_run",
        action_repeat=1,
        target_return=300.0,
        seed=7,
        seconds=1.0,
    )


LOG = make_log([[1.0, 5.0, 3.0], [2.0, 0.0, 7.0]])


def t_bounds(samples):
    """SciPy's own interval."""
    return tuple(scipy.stats.ttest_1samp(samples, 0.0).confidence_interval(0.95))


@pytest.mark.parametrize(
    ("name", "chains"),
    [
        ("first", [1.0, 2.0]),
        ("last", [3.0, 7.0]),
        ("mean", [3.0, 3.0]),
        ("max", [5.0, 7.0]),
        ("improvement", [2.0, 5.0]),
        ("slope", [1.0, 2.5]),
    ],
)
def test_protocols_match_numbers_worked_by_hand(name, chains):
    np.testing.assert_array_equal(protocols.per_chain(name, LOG), chains)
    found = getattr(protocols, name)(LOG)
    assert float(found) == np.mean(chains)
    assert (found.protocol, found.num_samples, found.basis) == (name, 2, "chains")
    # Student's t at 97.5% with one degree of freedom is 12.706; two samples err by half their distance.
    half = 12.706204736 * abs(chains[1] - chains[0]) / 2
    assert (found.low, found.high) == pytest.approx(
        (np.mean(chains) - half, np.mean(chains) + half), rel=1e-9
    )


def test_slope_is_the_least_squares_line_of_each_chain():
    returns = np.random.default_rng(4).normal(size=(5, 7))
    lines = [np.polyfit(np.arange(7), chain, 1)[0] for chain in returns]
    np.testing.assert_allclose(protocols.per_chain("slope", make_log(returns)), lines, rtol=1e-9)
    assert protocols.slope(make_log([[3.0, 5.0], [4.0, 8.0]])).value == 3.0
    assert protocols.slope(make_log([[3.0], [4.0]])).value == 0.0


def test_curve_gives_one_estimate_an_episode():
    found = protocols.curve(LOG)
    assert [e.value for e in found] == [1.5, 2.5, 5.0]
    assert [e.protocol for e in found] == ["episode 1", "episode 2", "episode 3"]
    assert (found[1].low, found[1].high) == pytest.approx(t_bounds([5.0, 0.0]))


@pytest.mark.parametrize("num_episodes", [1, 2, 3, 5])
def test_null_max_matches_enumeration_of_every_choice(num_episodes):
    episodes = [3.0, -1.0, 4.0, 4.0, 10.0]
    every = [max(draw) for draw in itertools.combinations(episodes, num_episodes)]
    found = protocols.null_max(make_log([episodes], "memoryless"), num_episodes)
    assert found.value == pytest.approx(np.mean(every), rel=1e-12)
    assert found.num_samples == 5


def test_null_max_has_the_jackknife_interval_of_leaving_out_each_episode():
    episodes = np.random.default_rng(5).normal(size=12)
    without = [protocols.null_max(make_log([np.delete(episodes, i)]), 4).value for i in range(12)]
    error = np.sqrt(11 / 12 * np.sum((without - np.mean(without)) ** 2))
    found = protocols.null_max(make_log([episodes], "memoryless"), 4)
    half = scipy.stats.t.ppf(0.975, 11) * error
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-9)
    assert (found.basis, found.num_samples) == ("episodes", 12)
    assert not protocols.null_max(make_log([episodes]), 12).has_interval


def test_null_max_ignores_the_order_and_the_chains_of_episodes():
    flat = protocols.null_max(make_log([[1.0, 2.0, 3.0, 4.0]]), 3)
    shaped = protocols.null_max(make_log([[4.0, 1.0], [3.0, 2.0]]), 3)
    assert flat.value == shaped.value


def test_null_max_of_one_episode_is_the_mean():
    assert protocols.null_max(LOG, 1).value == pytest.approx(LOG.returns.mean(), rel=1e-12)


def test_null_max_matches_max_where_there_is_no_memory():
    returns = np.random.default_rng(0).normal(100, 30, size=(3000, 4))
    luck = protocols.null_max(make_log(returns), 4)
    observed = protocols.max(make_log(returns))
    # Standard error of the mean of 3000 maxima is 0.4.
    assert luck.value == pytest.approx(observed.value, abs=1.5)


def test_interval_over_seeds_is_that_of_their_means():
    generator = np.random.default_rng(2)
    # Chains of a seed agree; seeds do not. Pooled as if independent they would give too short an interval.
    seeds = [make_log(centre + generator.normal(0, 0.1, size=(16, 1))) for centre in (10.0, 20.0, 30.0, 40.0)]
    found = protocols.estimate("first", seeds)
    assert (found.low, found.high) == pytest.approx(t_bounds([log.returns.mean() for log in seeds]))
    assert (found.num_samples, found.basis) == (64, "seeds")


def test_seeds_weigh_alike_whatever_their_number_of_chains():
    found = protocols.estimate("first", [make_log([[0.0]]), make_log([[10.0], [10.0], [10.0]])])
    assert found.value == 5.0
    assert (found.low, found.high) == pytest.approx(t_bounds([0.0, 10.0]))


def test_one_chain_gives_no_interval():
    found = protocols.mean(make_log([[1.0, 3.0]]))
    assert found.value == 2.0
    assert math.isnan(found.low) and math.isnan(found.high)
    assert not found.has_interval
    assert not protocols.difference("mean", [LOG], [make_log([[1.0, 3.0]])]).has_interval


def test_difference_has_the_interval_of_welch():
    ours, control = np.random.default_rng(6).normal(size=(2, 6, 3)) * [[[1.0]], [[5.0]]]
    found = protocols.difference("max", [make_log(ours)], [make_log(control)], factor=2.0)
    welch = scipy.stats.ttest_ind(ours.max(axis=1), 2 * control.max(axis=1), equal_var=False)
    assert found.value == pytest.approx(ours.max(axis=1).mean() - 2 * control.max(axis=1).mean())
    assert (found.low, found.high) == pytest.approx(tuple(welch.confidence_interval(0.95)), rel=1e-9)
    steady = protocols.difference("mean", [make_log([[3.0], [3.0]])], [make_log([[1.0], [1.0]])])
    assert (steady.low, steady.value, steady.high) == (2.0, 2.0, 2.0)


def test_difference_of_an_agent_and_its_control_pairs_their_seeds():
    ours = [make_log([[c], [c]]) for c in (10.0, 100.0, 1000.0)]
    control = [make_log([[c - 1], [c - 1]]) for c in (10.0, 100.0, 1000.0)]
    found = protocols.difference("first", ours, control)
    assert (found.low, found.value, found.high) == pytest.approx((1.0, 1.0, 1.0), rel=1e-9)


def test_beyond_luck_is_the_largest_less_the_null_max():
    control = make_log([[1.0, 2.0, 0.0], [3.0, 1.0, 4.0]], "memoryless")
    found = protocols.beyond_luck([LOG], [control])
    assert found.value == pytest.approx(6.0 - protocols.null_max(control, 3).value, rel=1e-12)
    assert found.low < found.value < found.high
    assert found.basis == "chains"


def test_beyond_luck_pairs_seeds():
    ours = [make_log([[c, c - 1], [c, c]]) for c in (10.0, 100.0, 1000.0)]
    control = [make_log([[c, c], [c, c]]) for c in (9.0, 98.0, 997.0)]
    found = protocols.beyond_luck(ours, control)
    assert (found.low, found.high) == pytest.approx(t_bounds([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("shape", ["normal", "two kinds"])
def test_beyond_luck_seldom_finds_memory_where_there_is_none(shape):
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        ours, control = generator.normal(size=(2, 16, 4))
        if shape == "two kinds":
            # The largest of four is 500 in 15 of 16 chains: in a third of the logs, in all of them.
            ours, control = 500 * (ours > 0) + ours, 500 * (control > 0) + control
        found += protocols.beyond_luck([make_log(ours)], [make_log(control)]).low > 0
    # Documented at most 3%; three standard errors of 200 trials are 3.6%.
    assert found <= 13


def test_estimates_repeat_exactly():
    assert protocols.mean(LOG) == protocols.mean(dataclasses.replace(LOG))


def test_unknown_protocol_is_refused():
    with pytest.raises(
        ValueError, match=r"must be one of first, last, mean, max, improvement, slope; got 'best'"
    ):
        protocols.per_chain("best", LOG)
    with pytest.raises(ValueError, match=r"num_episodes must be positive and no more .* got 0 of 6"):
        protocols.null_max(LOG, 0)
    with pytest.raises(ValueError, match="got 7 of 6"):
        protocols.null_max(LOG, 7)
    with pytest.raises(ValueError, match="must hold an episode"):
        protocols.mean(make_log(np.zeros((0, 3))))
