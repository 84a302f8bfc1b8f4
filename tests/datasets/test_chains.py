import itertools

import numpy as np
import pytest

from bpt_rl.datasets.chains import build_chain, collected_returns, reaches, returns_to_go
from bpt_rl.types import Trajectory

FIELDS = (
    "observation",
    "action",
    "reward",
    "return_to_go",
    "completion",
    "step",
    "episode",
    "loss_mask",
    "returns",
)


def trajectory(rewards, mark=0):
    """An episode whose observation rows count from `mark` and whose actions are the negative of that."""
    rows = len(rewards) + 1
    counted = mark + np.arange(rows, dtype=np.float32)[:, None]
    return Trajectory(
        observation=counted,
        action=-counted,
        # The file's own reward belongs to another task and must not be read.
        reward=np.full((rows, 1), 99, np.float32),
        discount=np.ones((rows, 1), np.float32),
        physics=np.zeros((rows, 2)),
        task_reward={"task": np.array([0.0, *rewards], np.float32)},
    )


BEST, WORST, MIDDLE = trajectory([3, 1, 0], 10), trajectory([1], 20), trajectory([1, 2], 30)
GIVEN = [BEST, WORST, MIDDLE]


def random_trajectories(seed, num):
    generator = np.random.default_rng(seed)
    return [trajectory(generator.random(generator.integers(2, 9)), 100 * i) for i in range(num)]


def check_equal(first, second):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_chain_is_ascending_and_asks_everyone_for_the_best_return():
    chain = build_chain(GIVEN, "task")
    np.testing.assert_array_equal(chain.returns, [1, 3, 4])
    assert (chain.target_return, chain.num_steps) == (4, 6)
    # Action t follows observation t: the dummy row's action is left out, and the last observation.
    np.testing.assert_array_equal(chain.observation[:, 0], [20, 30, 31, 10, 11, 12])
    np.testing.assert_array_equal(chain.action[:, 0], [-21, -31, -32, -11, -12, -13])
    np.testing.assert_array_equal(chain.reward, [1, 1, 2, 3, 1, 0])
    np.testing.assert_array_equal(chain.return_to_go, [4, 4, 3, 4, 1, 0])
    np.testing.assert_array_equal(chain.step, [0, 0, 1, 0, 1, 2])
    np.testing.assert_array_equal(chain.episode, [0, 1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("relabel", "completion", "expected"),
    [
        ("chain_maximum", "per_episode", [0, 0, 0, 0, 0, 1]),
        ("chain_maximum", "per_step", [0, 0, 0, 0, 1, 1]),
        ("own_return", "per_episode", [1, 0, 1, 0, 0, 1]),
        ("own_return", "per_step", [1, 0, 1, 0, 1, 1]),
    ],
)
def test_completion_is_flagged_where_the_target_is_reached(relabel, completion, expected):
    chain = build_chain(GIVEN, "task", relabel=relabel, completion=completion)
    np.testing.assert_array_equal(chain.completion, expected)


def test_own_return_asks_each_for_its_own():
    chain = build_chain(GIVEN, "task", relabel="own_return")
    np.testing.assert_array_equal(chain.return_to_go, [1, 3, 2, 4, 1, 0])
    assert chain.target_return == 4


@pytest.mark.parametrize(("loss_on", "expected"), [("all", [1] * 6), ("last", [0, 0, 0, 1, 1, 1])])
def test_loss_counts_on_the_trajectories_asked_for(loss_on, expected):
    np.testing.assert_array_equal(build_chain(GIVEN, "task", loss_on=loss_on).loss_mask, expected)


def test_equal_returns_keep_the_order_given():
    chain = build_chain([trajectory([2], 1), trajectory([1, 1], 2), trajectory([0, 2], 3)], "task")
    np.testing.assert_array_equal(chain.observation[:, 0], [1, 2, 3, 3, 4])
    np.testing.assert_array_equal(chain.completion, [1, 0, 1, 0, 1])
    # Short arrays come out stable of any sort.
    rewards = np.random.default_rng(0).integers(0, 3, 100)
    many = build_chain([trajectory([r], i) for i, r in enumerate(rewards)], "task")
    assert many.observation[:, 0].tolist() == sorted(range(100), key=lambda i: rewards[i])


def test_order_given_does_not_matter():
    trajectories = random_trajectories(0, 4)
    expected = build_chain(trajectories, "task", completion="per_step", loss_on="last")
    for order in itertools.permutations(trajectories):
        check_equal(build_chain(order, "task", completion="per_step", loss_on="last"), expected)


def test_windows_keep_what_the_whole_episode_says():
    # Windows come in the order of the trajectories given; that of WORST is whole.
    windows = [slice(1, 3), slice(0, 1), slice(1, 2)]
    chain = build_chain(GIVEN, "task", completion="per_step", windows=windows)
    np.testing.assert_array_equal(chain.observation[:, 0], [20, 31, 11, 12])
    np.testing.assert_array_equal(chain.action[:, 0], [-21, -32, -12, -13])
    np.testing.assert_array_equal(chain.reward, [1, 2, 1, 0])
    np.testing.assert_array_equal(chain.return_to_go, [4, 3, 1, 0])
    np.testing.assert_array_equal(chain.completion, [0, 0, 1, 1])
    np.testing.assert_array_equal(chain.step, [0, 1, 1, 2])
    np.testing.assert_array_equal(chain.episode, [0, 1, 2, 2])
    np.testing.assert_array_equal(chain.returns, [1, 3, 4])


def test_windows_are_rows_of_the_whole_chain():
    generator, trajectories = np.random.default_rng(3), random_trajectories(2, 5)
    whole = build_chain(trajectories, "task", completion="per_step")
    starts = [int(generator.integers(t.num_steps - 1)) for t in trajectories]
    windows = [slice(s, s + 2) for s in starts]
    cut = build_chain(trajectories, "task", completion="per_step", windows=windows)
    rows = [np.flatnonzero(whole.observation[:, 0] == x)[0] for x in cut.observation[:, 0]]
    assert len(rows) == 10
    for name in FIELDS[:-1]:
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name)[rows], err_msg=name)


@pytest.mark.parametrize(
    ("target", "completion", "returns_to_go", "flags"),
    [
        (5.0, "per_step", [5, 5, 4, 5, 2, 1], [0, 0, 0, 0, 0, 0]),
        (3.0, "per_episode", [3, 3, 2, 3, 0, -1], [0, 0, 1, 0, 0, 1]),
        (3.0, "per_step", [3, 3, 2, 3, 0, -1], [0, 0, 1, 1, 1, 1]),
        # Nothing is asked for, and that is reached by doing nothing.
        (0.0, "per_episode", [0, 0, -1, 0, -3, -4], [1, 0, 1, 0, 0, 1]),
    ],
)
def test_a_target_that_is_given_is_asked_of_everyone(target, completion, returns_to_go, flags):
    chain = build_chain(GIVEN, "task", completion=completion, target_return=target)
    assert chain.target_return == target
    np.testing.assert_array_equal(chain.return_to_go, returns_to_go)
    np.testing.assert_array_equal(chain.completion, flags)
    np.testing.assert_array_equal(chain.returns, [1, 3, 4])


def test_trajectories_stay_in_the_order_given_where_that_is_asked_for():
    windows = [slice(1, 3), slice(0, 1), slice(0, 2)]
    chain = build_chain(GIVEN, "task", order="given", loss_on="last", completion="per_step", windows=windows)
    np.testing.assert_array_equal(chain.observation[:, 0], [11, 12, 20, 30, 31])
    np.testing.assert_array_equal(chain.episode, [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(chain.returns, [4, 1, 3])
    # The largest return of all is asked for, wherever its trajectory stands.
    np.testing.assert_array_equal(chain.return_to_go, [1, 0, 4, 4, 3])
    np.testing.assert_array_equal(chain.completion, [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(chain.loss_mask, [0, 0, 0, 1, 1])
    check_equal(build_chain([WORST, MIDDLE, BEST], "task", order="given"), build_chain(GIVEN, "task"))


def test_no_flag_per_episode_in_a_window_that_ends_before_its_episode():
    windows = [slice(0, 2), slice(0, 1), slice(0, 1)]
    assert not build_chain(GIVEN, "task", windows=windows).completion.any()
    to_the_end = [slice(2, 3), slice(0, 1), slice(0, 1)]
    np.testing.assert_array_equal(build_chain(GIVEN, "task", windows=to_the_end).completion, [0, 0, 1])


def test_return_that_misses_the_target_by_rounding_alone_reaches_it():
    # 997 times float32 0.1 is one float32 step more than 99.7.
    chain = build_chain([trajectory([99.7]), trajectory([99.69]), trajectory([0.1] * 997)], "task")
    assert chain.target_return == float(np.nextafter(np.float32(99.7), np.float32(100)))
    np.testing.assert_array_equal(np.flatnonzero(chain.completion), [1, 998])


def test_the_best_of_a_chain_always_reaches_its_own_target():
    generator = np.random.default_rng(4)
    for scale in (1e-3, 1.0, 1e3, -1.0):
        chains = [[trajectory(scale * generator.random(100)) for _ in range(3)] for _ in range(10)]
        for chain in (build_chain(trajectories, "task") for trajectories in chains):
            assert chain.completion[-1] == 1


def test_returns_to_go_drift_no_further_over_long_episodes():
    reward = np.full(100_000, 0.1, np.float32)
    got = returns_to_go(reward)
    expected = np.float64(np.float32(0.1)) * np.arange(len(reward), 0, -1)
    # Three roundings to float32 of numbers up to 10,000; a sum in float32 would drift by 1.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7 * 10_000)


def test_returns_to_go_are_one_float32_subtraction_of_what_was_collected():
    generator = np.random.default_rng(5)
    reward = generator.normal(size=(3, 200)).astype(np.float32)
    collected = collected_returns(reward)
    plain = [[sum(row[:t].tolist()) for t in range(201)] for row in reward]
    np.testing.assert_array_equal(collected, np.array(plain).astype(np.float32))
    for row, sums in zip(reward, collected, strict=True):
        np.testing.assert_array_equal(returns_to_go(row, 7.1), np.float32(7.1) - sums[:-1])
        np.testing.assert_array_equal(returns_to_go(row), sums[-1] - sums[:-1])


def test_no_return_to_go_is_subnormal():
    # Far from Jaco's goal rewards fall below every normal float32.
    reward = np.float32(2.0) ** np.arange(-149, -60, dtype=np.float32)
    for target in (None, 1e-40, 2.0**-100, float(reward.sum())):
        nonzero = np.abs(returns_to_go(reward, target))
        assert nonzero[nonzero > 0].min(initial=1) >= np.finfo(np.float32).smallest_normal
    np.testing.assert_array_equal(
        collected_returns(np.array([1e-38, 1e-30], np.float32)), [0, 0, np.float32(1e-30)]
    )


def test_target_below_zero_is_reached_by_a_larger_return_only():
    chain = build_chain([trajectory([-3, -1]), trajectory([-1, -1])], "task", completion="per_step")
    np.testing.assert_array_equal(chain.return_to_go, [-2, 1, -2, -1])
    np.testing.assert_array_equal(chain.completion, [0, 0, 1, 1])
    np.testing.assert_array_equal(reaches(np.array([-2.1, -2.0, 0.0]), -2.0), [False, True, True])


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="at least one trajectory"):
        build_chain([], "task")
    with pytest.raises(ValueError, match=r"got 'other', and there is reward for: task"):
        build_chain(GIVEN, "other")
    with pytest.raises(ValueError, match=r"own_return asks each trajectory for its own.*got target_return 5"):
        build_chain(GIVEN, "task", relabel="own_return", target_return=5.0)
    for start, stop in ((1, 4), (-1, 1), (2, 2)):
        with pytest.raises(ValueError, match=rf"got steps {start} to {stop} of an episode of 3"):
            build_chain(GIVEN, "task", windows=[slice(start, stop), slice(0, 1), slice(0, 1)])


@pytest.mark.parametrize("rewards", [[], [1.0, np.nan], [np.inf]])
def test_reward_must_be_there_and_finite(rewards):
    with pytest.raises(ValueError, match="at least one step and only finite values"):
        returns_to_go(np.array(rewards, np.float32))
    with pytest.raises(ValueError, match="at least one step and only finite values"):
        build_chain([BEST, trajectory(rewards)], "task")
