import itertools
import threading
import time

import jax
import numpy as np
import pytest

from bpt_rl.config import DataConfig
from bpt_rl.datasets import chains
from bpt_rl.datasets.sampling import ChainSampler, batches
from bpt_rl.datasets.store import Store
from bpt_rl.types import PackedBatch

TASK = "cartpole_swingup"
LENGTHS = (12, 9, 10, 12, 8, 12, 11, 12)


@pytest.fixture(scope="module")
def store(short_store):
    with Store.open(short_store) as opened:
        yield opened


def make_sampler(store, seed=0, layout="fused", process_index=0, num_processes=1, **changes):
    config = DataConfig(**({"task": TASK, "num_trajectories": 3, "batch_size": 2} | changes))
    return ChainSampler(store, config, layout, seed, process_index=process_index, num_processes=num_processes)


def check_equal(first, second):
    for name, array in first._asdict().items():
        np.testing.assert_array_equal(array, getattr(second, name), err_msg=name)


def drawn(store, batch):
    """Returns, chain by chain, the indices of the store's episodes in the order of the chain."""
    starts = {tuple(store.episode(i).observation[0]): i for i in range(store.num_episodes)}
    assert len(starts) == store.num_episodes
    found = []
    for row, ids in enumerate(batch.segment_ids):
        for segment in range(1, ids.max() + 1):
            first = (ids == segment) & (batch.step[row] == 0)
            found.append([starts[tuple(x)] for x in batch.observation[row, first]])
    return found


def ranks(store):
    """Rank of each episode by return, 0 the lowest."""
    order = np.argsort(store.returns(TASK), kind="stable")
    assert len(set(store.returns(TASK))) == len(LENGTHS)
    return np.argsort(order)


def test_a_batch_depends_on_seed_and_index_alone(store):
    sampler = make_sampler(store, window=4)
    in_order = [sampler.batch(k) for k in range(4)]
    other = make_sampler(store, window=4)
    for k in (3, 1, 0, 2):
        check_equal(other.batch(k), in_order[k])
    for first, second in itertools.combinations([*in_order, make_sampler(store, 1, window=4).batch(0)], 2):
        assert not np.array_equal(first.observation, second.observation)


def test_a_chain_holds_exactly_n_distinct_whole_episodes_in_ascending_order(store):
    rank = ranks(store)
    for num_trajectories in (1, 3, 8):
        sampler = make_sampler(store, num_trajectories=num_trajectories)
        for batch in (sampler.batch(k) for k in range(10)):
            found = drawn(store, batch)
            assert len(found) == 2
            for row, chain in enumerate(found):
                assert len(set(chain)) == num_trajectories
                assert (np.diff(rank[chain]) > 0).all()
                assert (batch.segment_ids[row] > 0).sum() == sum(LENGTHS[i] for i in chain)
                episodes = np.repeat(np.arange(num_trajectories), [LENGTHS[i] for i in chain])
                np.testing.assert_array_equal(batch.episode[row, : len(episodes)], episodes)


def test_uniform_draws_every_episode_alike(store):
    sampler = make_sampler(store, num_trajectories=1, batch_size=50)
    counts = np.bincount(np.ravel([drawn(store, sampler.batch(k)) for k in range(16)]), minlength=8)
    # 800 draws, 100 an episode, standard deviation 9.4; five of those.
    np.testing.assert_allclose(counts, 100, atol=47)


def test_stratified_chains_have_one_episode_of_each_band(store):
    rank = ranks(store)
    sampler = make_sampler(store, num_trajectories=4, draw="return_stratified", batch_size=20)
    found = np.array(drawn(store, sampler.batch(0)))
    np.testing.assert_array_equal(rank[found] // 2, np.tile(np.arange(4), (20, 1)))
    assert set(found.ravel()) == set(range(8))


@pytest.mark.parametrize(("top_fraction", "kept"), [(0.5, 4), (0.25, 2), (0.01, 1)])
def test_top_fraction_draws_the_best_alone(store, top_fraction, kept):
    sampler = make_sampler(store, num_trajectories=1, top_fraction=top_fraction, batch_size=40)
    found = {i for [i] in drawn(store, sampler.batch(0))}
    assert found == set(np.flatnonzero(ranks(store) >= 8 - kept))


def test_windows_have_their_length_and_lie_anywhere_in_the_episode(store):
    sampler = make_sampler(store, num_trajectories=2, window=4, batch_size=60)
    assert sampler.context_length == 8
    batch = sampler.batch(0)
    assert (batch.segment_ids == 1).all()
    steps = batch.step.reshape(-1, 4)
    np.testing.assert_array_equal(steps - steps[:, :1], np.tile(np.arange(4), (120, 1)))
    # 0 to 8: the last start leaves four of twelve steps.
    assert set(steps[:, 0]) == set(range(9))


def test_a_context_as_long_as_several_chains_takes_them_into_one_row(store):
    sampler = make_sampler(
        store,
        num_trajectories=2,
        window=4,
        batch_size=5,
        context_length=2 * 8 * 4 + 4,
        layout="return_state_action_reward",
    )
    batch = sampler.batch(0)
    ids = np.repeat([[1, 2, 0], [1, 2, 0], [1, 0, 0]], 8, axis=1)[:, :17]
    np.testing.assert_array_equal(batch.segment_ids, ids)
    assert sampler.num_rows == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"num_trajectories": 2}, True), ({"window": 5}, True), ({"context_length": 70}, False)],
)
def test_rows_said_to_hold_one_chain_hold_no_two(store, changes, expected):
    sampler = make_sampler(store, batch_size=6, **changes)
    assert sampler.is_one_chain_a_row == expected
    ids = np.concatenate([sampler.batch(i).segment_ids for i in range(20)])
    assert (ids.max() == 1) == expected
    # Padding lies behind.
    assert not ((np.diff(ids, axis=1) > 0) & (ids[:, :-1] == 0)).any()


@pytest.mark.parametrize("layout_and_tokens", [("return_state_action_reward", 4), ("fused", 1)])
def test_shapes_never_change_however_long_the_episodes_drawn(store, layout_and_tokens):
    layout, tokens = layout_and_tokens
    sampler = make_sampler(store, layout=layout)
    assert sampler.context_length == 3 * 12 * tokens
    assert {sampler.batch(k).reward.shape for k in range(20)} == {(2, 36)}


def test_options_of_the_chain_reach_it(store, monkeypatch):
    last = make_sampler(store, loss_on="last").batch(0)
    np.testing.assert_array_equal(last.loss_mask, (last.episode == 2) & (last.segment_ids > 0))
    chain, own = (make_sampler(store, relabel=r).batch(0) for r in ("chain_maximum", "own_return"))
    assert chain.completion.sum() == 2
    assert own.completion.sum() == 6
    # So loose a tolerance that half the return reaches the target: long before the end of an episode.
    monkeypatch.setattr(chains, "RELATIVE_TOLERANCE", 0.5)
    per_step = make_sampler(store, completion="per_step", relabel="own_return").batch(0)
    assert per_step.completion.sum() > 6


def test_prefetched_batches_are_those_of_the_sampler_from_any_start(store):
    sampler = make_sampler(store, window=4)
    for start, stop in ((0, 3), (7, 9)):
        found = list(batches(sampler, start, stop))
        assert len(found) == stop - start
        for k, batch in zip(range(start, stop), found, strict=True):
            check_equal(batch, sampler.batch(k))


@pytest.mark.parametrize("place", ["accelerator", "host", "stream"])
def test_batches_that_are_not_put_ahead_take_the_device_one_by_one(store, place, monkeypatch):
    sampler, gathered, put = make_sampler(store, place=place), [], []
    gather = sampler.gather

    def noted(plan):
        gathered.append(threading.current_thread())
        return gather(plan)

    def placed(batch):
        put.append(threading.current_thread())
        return jax.device_put(batch)

    monkeypatch.setattr(sampler, "gather", noted)
    here = threading.current_thread()
    found = []
    for count, batch in enumerate(batches(sampler, 2, 9, put=placed, is_put_ahead=False), 1):
        found.append(batch)
        # As long as a batch is in use nothing else is put, nor gathered where that takes memory of the device.
        time.sleep(0.02)
        assert put == [here] * count
        assert place != "accelerator" or gathered == put
    assert place == "accelerator" or (len(gathered) == 7 and here not in gathered)
    for k, batch in zip(range(2, 9), found, strict=True):
        check_equal(batch, sampler.batch(k))
    put.clear()
    ahead = batches(sampler, 0, 9, put=placed)
    next(ahead)
    deadline = time.monotonic() + 10
    while len(put) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(put) >= 3
    assert here not in put
    ahead.close()


def stacked(shares):
    return PackedBatch(*(np.concatenate(arrays) for arrays in zip(*shares, strict=True)))


@pytest.mark.parametrize("place", ["accelerator", "host", "stream"])
def test_shares_of_processes_one_below_the_other_are_the_whole_batch(store, place):
    # Four shorter episodes go into a row made for three of the longest: a later chain may come before an earlier
    # one, and the last row stay empty.
    changes = {"num_trajectories": 1, "batch_size": 12, "context_length": 42, "place": place}
    sampler, empty = make_sampler(store, **changes), 0
    for num_processes in (2, 4):
        shares = [
            make_sampler(store, **changes, process_index=i, num_processes=num_processes)
            for i in range(num_processes)
        ]
        assert {share.num_rows for share in shares} == {4 // num_processes}
        for k in range(5):
            whole = sampler.batch(k)
            check_equal(stacked([share.batch(k) for share in shares]), whole)
            empty += not np.asarray(whole.segment_ids)[-1].any()
    assert 0 < empty < 10


def test_numbers_of_a_mixture_get_equal_shares_of_the_rows_and_fill_them(store):
    changes = {"num_trajectories": 4, "mixture": (1, 4), "batch_size": 20, "place": "host"}
    sampler = make_sampler(store, **changes)
    assert (sampler.num_rows, sampler.context_length) == (20, 4 * 12)
    assert not sampler.is_one_chain_a_row
    num_chains = [batch.segment_ids.max(axis=1) for batch in map(sampler.batch, range(20))]
    # Four chains of one, or one of four: 400 rows, standard deviation 10 of each kind. Five of those.
    kinds, counts = np.unique(num_chains, return_counts=True)
    assert kinds.tolist() == [1, 4]
    np.testing.assert_allclose(counts, 200, atol=50)
    parts = [make_sampler(store, **changes, process_index=i, num_processes=2).batch(3) for i in range(2)]
    check_equal(stacked(parts), sampler.batch(3))
    # No row can hold two chains of three.
    assert make_sampler(store, num_trajectories=4, mixture=(3, 4)).is_one_chain_a_row


def test_expected_returns_are_given_just_where_they_are_asked_for(store, tmp_path):
    with pytest.raises(ValueError, match="got relabel 'expected_return' and expected_return None"):
        make_sampler(store, relabel="expected_return")
    with pytest.raises(ValueError, match="got relabel 'chain_maximum' and expected_return"):
        ChainSampler(store, DataConfig(task=TASK), "fused", 0, expected_return=tmp_path)


def test_processes_that_cannot_share_rows_equally_are_refused(store):
    with pytest.raises(ValueError, match=r"got 5 rows for 2 processes\. Use a batch_size"):
        make_sampler(store, batch_size=5, num_processes=2)


def test_only_episodes_that_may_be_drawn_need_room(store):
    # The best two of eight; 13 rows of 5 observations, 1 action, 1 reward and its sum, 4 bytes each.
    lengths = np.array(LENGTHS)[ranks(store) >= 6]
    sampler = make_sampler(store, num_trajectories=2, top_fraction=0.25)
    assert sampler.choice.num_bytes == 2 * (lengths.max() + 1) * (5 + 1 + 1 + 1) * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_trajectories": 9}, "got 9 and 8. Use fewer trajectories"),
        ({"num_trajectories": 3, "top_fraction": 0.25}, "got 3 and 2. Use fewer trajectories or a larger"),
        ({"window": 9}, "got 9 and 8 steps. Use a shorter window"),
        ({"context_length": 35}, "got 35 tokens for 3 trajectories of up to 12 steps. Use 36 tokens"),
        ({"task": "walker_run"}, "got 'walker_run'"),
    ],
)
def test_configurations_that_a_store_cannot_serve_are_refused_at_once(store, changes, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(store, **changes)
