import math

import numpy as np
import pytest

from bpt_rl.datasets import coverage
from bpt_rl.datasets.coverage import NUM_STATES, draw_states, entropy, in_order_drawn, rows_by_episode
from bpt_rl.envs import features


def digamma(n):
    """Of a whole number."""
    return sum(1 / j for j in range(1, n)) - np.euler_gamma


def slow_entropy(points, k):
    """The definition, one point at a time."""
    size, dim = points.shape
    unit_ball = math.pi ** (dim / 2) / math.gamma(dim / 2 + 1)
    distances = [sorted(math.dist(point, other) for other in points)[k] for point in points]
    volumes = [unit_ball * distance**dim for distance in distances]
    return digamma(size) - digamma(k) + sum(map(math.log, volumes)) / size


@pytest.mark.parametrize(("shape", "k"), [((40, 1), 1), ((75, 3), 2), ((30, 5), 12)])
def test_the_estimate_is_that_of_its_definition(shape, k):
    points = np.random.default_rng(k).normal(size=shape) ** 3
    # Coordinates are rounded to float32: 1e-7 of a few units, where the nearest neighbour lies 1e-3 away.
    assert entropy(points, k) == pytest.approx(slow_entropy(points, k), abs=1e-4)


def test_three_points_on_a_line_have_the_entropy_worked_by_hand():
    # Nearest neighbours lie 1, 1 and 3 away, so that the intervals are 2, 2 and 6 long; digamma(3) - digamma(1) = 3/2.
    expected = 1.5 + math.log(2 * 2 * 6) / 3
    assert entropy(np.array([[0.0], [1.0], [4.0]]), 1) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("draw", "expected", "tolerance"),
    [
        # Edges: half a neighbour distance of 0.05 beyond each side, over the four sides, and the spread of the draw.
        (lambda g: g.uniform(0, 4, (2000, 2)), 2 * math.log(4), 0.1),
        (lambda g: g.normal(size=(2000, 2)), math.log(2 * math.pi * math.e), 0.08),
        (
            lambda g: g.multivariate_normal([5, 0], [[2, 1], [1, 1]], 2000),
            math.log(2 * math.pi * math.e),
            0.08,
        ),
    ],
)
def test_uniform_and_normal_distributions_have_their_entropy_to_the_bias_stated(draw, expected, tolerance):
    assert entropy(draw(np.random.default_rng(0)), 12) == pytest.approx(expected, abs=tolerance)


def test_one_neighbour_has_less_bias_than_twelve():
    # In four dimensions the cube's edges weigh 0.36 nats with 12 neighbours and 2,000 points.
    cube = np.random.default_rng(0).uniform(size=(2000, 4))
    assert abs(entropy(cube, 1)) < 0.25 < entropy(cube, 12) < 0.45


def test_shifts_and_orders_change_nothing_and_scales_add_their_logarithm():
    points = np.random.default_rng(0).normal(size=(300, 3))
    found = entropy(points, 4)
    assert entropy(points[::-1] + 1000, 4) == pytest.approx(found, abs=1e-5)
    assert entropy(points * 7, 4) == pytest.approx(found + 3 * math.log(7), abs=1e-5)
    assert entropy(points * [1, 10, 1], 4) > found


def test_a_body_at_rest_has_little_entropy_and_not_none():
    still = np.zeros((50, 2))
    least = entropy(still, 12)
    assert math.isfinite(least)
    assert least == pytest.approx((1 / np.arange(12, 50)).sum() + math.log(math.pi * 1e-10))


@pytest.mark.parametrize(
    ("points", "k"), [(np.zeros((12, 2)), 12), (np.full((20, 2), np.nan), 3), (np.zeros((5, 1)), 0)]
)
def test_too_few_points_and_points_nowhere_are_refused(points, k):
    with pytest.raises(ValueError, match=rf"more of them than neighbours; got {len(points)} points for {k}"):
        entropy(points, k)


def test_every_domain_has_a_scale_a_feature_and_coverage_is_measured_in_them():
    assert {domain: len(scales) for domain, scales in coverage.SCALES.items()} == {
        domain: len(names) for domain, names in features.FEATURES.items()
    }
    points, episode = np.random.default_rng(0).normal(size=(100, 3)), np.zeros(100, int)
    nats, error = coverage.coverage("jaco", points * 0.2, episode)
    assert nats == pytest.approx(entropy(points, 12), abs=1e-5)
    assert error is None
    assert coverage.coverage("jaco", points[:12], episode[:12]) is None
    assert coverage.coverage("minari/toy", np.zeros((100, 0)), episode) is None


def test_the_standard_error_is_the_spread_of_other_collections():
    generator = np.random.default_rng(0)

    def collection():
        """Forty episodes, each at its own place: their states are not independent."""
        place = generator.normal(size=(40, 1, 2))
        states = place + 0.1 * generator.normal(size=(40, 10, 2))
        return coverage.coverage("point_mass_maze", states.reshape(-1, 2) / 10, np.repeat(np.arange(40), 10))

    found = [collection() for _ in range(60)]
    spread = np.std([one.nats for one in found], ddof=1)
    # A spread of 60 is known to a tenth; the error leaves out that episodes are each other's neighbours.
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.35)


def test_of_a_small_dataset_every_state_but_the_first_of_each_episode_is_drawn_once():
    drawn = draw_states(np.array([3, 1, 4]))
    assert sorted(map(tuple, drawn.tolist())) == [
        (episode, row) for episode, length in enumerate((3, 1, 4)) for row in range(1, length + 1)
    ]


def test_of_a_large_dataset_states_are_drawn_uniformly_over_steps_and_any_first_of_them_too():
    num_steps = np.array([30_000, 10_000, 60_000])
    drawn = draw_states(num_steps)
    assert len(np.unique(drawn, axis=0)) == len(drawn) == NUM_STATES
    for part in (drawn, drawn[: NUM_STATES // 10]):
        shares = np.bincount(part[:, 0]) / len(part)
        # Three standard deviations of a share among 2,000.
        np.testing.assert_allclose(shares, [0.3, 0.1, 0.6], atol=0.033)
        last = part[part[:, 0] == 2, 1]
        assert last.mean() / 60_000 == pytest.approx(0.5, abs=3 * 0.29 / math.sqrt(len(last)))


def test_values_read_by_episode_come_back_in_the_order_of_the_draw():
    num_steps = np.array([4, 2, 7, 1])
    drawn = draw_states(num_steps)[:9]
    values = [np.array([[100.0 * e + row] for row in range(n + 1)]) for e, n in enumerate(num_steps)]
    rows = rows_by_episode(drawn, len(num_steps))
    found = in_order_drawn(drawn, [v[r] for v, r in zip(values, rows, strict=True)])
    assert found[:, 0].tolist() == [100 * episode + row for episode, row in drawn.tolist()]
