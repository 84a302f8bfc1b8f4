import numpy as np
import pytest

from bpt_rl.datasets import subsets

RETURNS = np.array([5.0, 1.0, 9.0, 3.0, 7.0, 0.0])


def episodes(num_steps=(10,) * 6, returns=RETURNS):
    return subsets.Episodes(
        names=[f"walker/rnd/episode_{i:06d}_{steps}.npz" for i, steps in enumerate(num_steps)],
        num_steps=np.array(num_steps, np.int64),
        returns=lambda: returns,
    )


def never():
    raise AssertionError("This subset needs no returns.")


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        ("full", [0, 1, 2, 3, 4, 5]),
        ("first-20-steps", [0, 1]),
        ("first-21-steps", [0, 1, 2]),
        ("first-60-steps", [0, 1, 2, 3, 4, 5]),
        ("first-1-episodes", [0]),
        ("first-4-episodes", [0, 1, 2, 3]),
        # Ranked by return: 5, 1, 3, 0, 4, 2. Three bands of two; the upper middle of each: 1, 0, 2.
        ("stratified-3-episodes", [0, 1, 2]),
        ("stratified-30-steps", [0, 1, 2]),
        # Two bands of three, the middle of each: 1 and 4.
        ("stratified-2-episodes", [1, 4]),
        ("stratified-6-episodes", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_rule_selects_these_episodes(subset, expected):
    assert subsets.select(subset, episodes()).tolist() == expected


def test_only_a_stratified_subset_asks_for_returns():
    source = episodes()
    silent = subsets.Episodes(names=source.names, num_steps=source.num_steps, returns=never)
    for subset in ("full", "first-20-steps", "first-2-episodes"):
        subsets.select(subset, silent)
    with pytest.raises(AssertionError, match="needs no returns"):
        subsets.select("stratified-2-episodes", silent)


def test_short_names_are_the_sizes_that_papers_use():
    source = episodes((1000,) * 10_000, np.random.default_rng(0).normal(size=10_000))
    assert subsets.select("first-1M", source).tolist() == list(range(1000))
    assert subsets.select("first-5k", source).tolist() == list(range(5000))
    assert len(subsets.select("stratified-1M", source)) == 1000


def test_a_stratified_subset_keeps_the_distribution_of_returns():
    returns = np.random.default_rng(1).exponential(size=10_000)
    picked = returns[subsets.select("stratified-1M", episodes((1000,) * 10_000, returns))]
    fractions = np.linspace(0.01, 0.99, 50)
    # Every band of ten gives one: its quantiles are off by less than a band.
    got = np.searchsorted(np.sort(returns), np.quantile(picked, fractions)) / len(returns)
    np.testing.assert_allclose(got, fractions, atol=1 / 1000 + 1e-9)


def test_steps_count_where_lengths_differ():
    source = episodes((5, 50, 5, 5, 5, 5))
    assert subsets.select("first-6-steps", source).tolist() == [0, 1]
    assert subsets.select("first-55-steps", source).tolist() == [0, 1]
    assert subsets.select("first-56-steps", source).tolist() == [0, 1, 2]


def test_a_list_names_its_episodes_in_any_order(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("episode_000004_10.npz\n\nepisode_000001_10.npz\n")
    assert subsets.select(f"list:{path}", episodes()).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("episode_000009_10.npz\n", r"names 'episode_000009_10\.npz', and they hold 0 of that name"),
        ("", "has 0 lines with 0 names"),
        ("episode_000001_10.npz\n" * 2, "has 2 lines with 1 names"),
    ],
)
def test_a_bad_list_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        subsets.select(f"list:{path}", episodes())


def test_a_list_may_come_from_any_editor_and_a_file_that_is_no_list_is_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbfepisode_000004_10.npz\r\nepisode_000001_10.npz\r\n")
    assert subsets.select(f"list:{path}", episodes()).tolist() == [1, 4]
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match=r"mine\.txt names .*, and they hold 0 of that name"):
        subsets.select(f"list:{path}", episodes())


def test_a_name_that_two_sources_hold_is_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("episode_0_10.npz")
    twice = subsets.Episodes(
        names=["walker/rnd/episode_0_10.npz", "walker/icm/episode_0_10.npz"],
        num_steps=np.array([10, 10]),
        returns=never,
    )
    with pytest.raises(ValueError, match="they hold 2 of that name"):
        subsets.select(f"list:{path}", twice)


def test_what_cannot_be_selected_is_refused():
    with pytest.raises(ValueError, match=r"subset must be full, first-1M, .* got 'first-1m'"):
        subsets.select("first-1m", episodes())
    with pytest.raises(ValueError, match=r"first-1M asks for 1000000 steps and there are 60\. Use full"):
        subsets.select("first-1M", episodes())
    with pytest.raises(ValueError, match="asks for 7 episodes and there are 6"):
        subsets.select("stratified-7-episodes", episodes())
    with pytest.raises(FileNotFoundError, match=r"there is none at gone\.txt"):
        subsets.select("list:gone.txt", episodes())
