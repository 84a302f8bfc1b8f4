import dataclasses
import itertools
import math

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    ("name", "chains"),
    [
        ("first", [1.0, 2.0]),
        ("last", [3.0, 7.0]),
        ("mean", [3.0, 3.0]),
        ("max", [5.0, 7.0]),
        ("improvement", [2.0, 5.0]),
    ],
)
def test_protocols_match_numbers_worked_by_hand(name, chains):
    np.testing.assert_array_equal(protocols.per_chain(name, LOG), chains)
    found = getattr(protocols, name)(LOG)
    assert float(found) == np.mean(chains)
    assert found.protocol == name
    assert found.num_samples == 2
    # With two chains every resample is one of a, b or their mean; a and b in a quarter each.
    assert (found.low, found.high) == (min(chains), max(chains))


def test_curve_gives_one_estimate_an_episode():
    found = protocols.curve(LOG)
    assert [e.value for e in found] == [1.5, 2.5, 5.0]
    assert [e.protocol for e in found] == ["episode 1", "episode 2", "episode 3"]
    assert (found[1].low, found[1].high) == (0.0, 5.0)


@pytest.mark.parametrize("num_episodes", [1, 2, 3, 5])
def test_null_max_matches_enumeration_of_every_draw(num_episodes):
    episodes = [3.0, -1.0, 4.0, 4.0, 10.0]
    every = [max(draw) for draw in itertools.product(episodes, repeat=num_episodes)]
    found = protocols.null_max(make_log([episodes], "memoryless"), num_episodes)
    assert found.value == pytest.approx(np.mean(every), rel=1e-12)
    assert found.num_samples == 5


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


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_documented():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        found = protocols.first(make_log(generator.normal(50, 10, size=(16, 1))))
        covered += found.low <= 50 <= found.high
    # Documented 92%; three standard errors of 300 trials are 4.7%.
    assert 0.87 <= covered / 300 <= 0.97


def test_interval_over_seeds_covers_the_spread_between_seeds():
    generator = np.random.default_rng(2)
    # Chains of a seed agree; seeds do not. Pooled as if independent they would give too short an interval.
    seeds = [make_log(centre + generator.normal(0, 0.1, size=(16, 1))) for centre in (10.0, 20.0, 30.0, 40.0)]
    found = protocols.estimate("first", seeds)
    assert found.value == pytest.approx(25.0, abs=0.1)
    assert found.num_samples == 64
    assert found.high - found.low > 15


def test_seeds_weigh_alike_whatever_their_number_of_chains():
    found = protocols.estimate("first", [make_log([[0.0]]), make_log([[10.0], [10.0], [10.0]])])
    assert found.value == 5.0
    assert (found.low, found.high) == (0.0, 10.0)


def test_one_chain_gives_no_interval():
    found = protocols.mean(make_log([[1.0, 3.0]]))
    assert found.value == 2.0
    assert math.isnan(found.low) and math.isnan(found.high)
    assert not found.has_interval
    assert not protocols.difference("mean", [LOG], [make_log([[1.0, 3.0]])]).has_interval


def test_difference_subtracts_the_scaled_control():
    found = protocols.difference("max", [LOG], [make_log([[1.0, 2.0], [3.0, 1.0]])], factor=2.0)
    assert found.value == 6.0 - 2 * 2.5
    assert (found.low, found.high) == (5.0 - 6.0, 7.0 - 4.0)


def test_difference_of_an_agent_and_its_control_pairs_their_seeds():
    ours = [make_log([[c], [c]]) for c in (10.0, 100.0, 1000.0)]
    control = [make_log([[c - 1], [c - 1]]) for c in (10.0, 100.0, 1000.0)]
    found = protocols.difference("first", ours, control)
    assert (found.low, found.value, found.high) == pytest.approx((1.0, 1.0, 1.0), rel=1e-9)


def test_beyond_luck_is_the_largest_less_the_null_max():
    control = make_log([[1.0, 2.0, 0.0], [3.0, 1.0, 4.0]], "memoryless")
    found = protocols.beyond_luck([LOG], [control])
    assert found.value == pytest.approx(6.0 - protocols.null_max(control, 3).value, rel=1e-12)
    assert 1.0 <= found.low < found.value < found.high <= 7.0


def test_beyond_luck_seldom_finds_memory_where_there_is_none():
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(100):
        ours, control = generator.normal(size=(2, 16, 4))
        found += protocols.beyond_luck([make_log(ours)], [make_log(control)]).low > 0
    # Documented at most 6%; three standard errors of 100 trials are 7%.
    assert found <= 13


def test_estimates_repeat_exactly():
    assert protocols.mean(LOG) == protocols.mean(dataclasses.replace(LOG))


def test_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match=r"must be one of first, last, mean, max, improvement; got 'best'"):
        protocols.per_chain("best", LOG)
    with pytest.raises(ValueError, match="num_episodes must be positive; got 0"):
        protocols.null_max(LOG, 0)
    with pytest.raises(ValueError, match="must hold an episode"):
        protocols.mean(make_log(np.zeros((0, 3))))
