import itertools

import numpy as np
import pytest

from bpt_rl.datasets.chains import Chain
from bpt_rl.datasets.packing import STEP_FIELDS, first_fit, pack, steps_of
from bpt_rl.types import LAYOUTS


def make_chain(num_steps, start=0):
    """A chain each of whose numbers names its step: `start`, `start` + 1, ..."""
    counted = start + np.arange(num_steps)
    fields = {name: 10 * counted.astype(np.float32) + i for i, name in enumerate(STEP_FIELDS)}
    fields["observation"] = np.stack([fields["observation"]] * 3, axis=1)
    fields["action"] = np.stack([fields["action"]] * 2, axis=1)
    fields |= {name: fields[name].astype(np.int32) for name in ("step", "episode")}
    return Chain(**fields, target_return=1.0, returns=np.ones(1))


def make_chains(lengths):
    """Chains of consecutive steps, from 1 on: no step is zero like padding."""
    starts = itertools.accumulate(lengths, initial=1)
    return [make_chain(length, start) for length, start in zip(lengths, starts, strict=False)]


def test_drawn_example():
    batch = pack(make_chains([2, 5, 3, 1]), 6, layout="fused")
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batch.reward, [[12, 22, 82, 92, 102, 112], [32, 42, 52, 62, 72, 0]])
    np.testing.assert_array_equal(batch.observation[1, :, 2], [30, 40, 50, 60, 70, 0])
    np.testing.assert_array_equal(batch.action[0, :, 0], [11, 21, 81, 91, 101, 111])


@pytest.mark.parametrize(
    ("layout", "tokens"), [("return_state_action_reward", 4), ("return_state_action", 3), ("fused", 1)]
)
def test_context_length_counts_tokens(layout, tokens):
    assert steps_of(5 * tokens, layout) == 5
    assert pack([make_chain(2)], 5 * tokens, layout=layout).reward.shape == (1, 5)
    if tokens > 1:
        with pytest.raises(ValueError, match=rf"got {5 * tokens + 1} and {tokens}. Use {6 * tokens} "):
            steps_of(5 * tokens + 1, layout)


def test_default_layout_is_that_of_the_paper():
    assert pack([make_chain(2)], 8).reward.shape == (1, 2)


def test_padding_is_zero_everywhere():
    batch = pack(make_chains([3, 2]), 4, layout="fused", num_rows=3)
    padding = batch.segment_ids == 0
    np.testing.assert_array_equal(padding, [[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    for name in STEP_FIELDS:
        assert not getattr(batch, name)[padding].any(), name
        assert getattr(batch, name)[~padding].all(), name


def test_types_are_those_of_the_chain():
    batch = pack([make_chain(2)], 4, layout="fused")
    whole = {"step", "episode", "segment_ids"}
    for name, array in batch._asdict().items():
        assert array.dtype == (np.int32 if name in whole else np.float32), name


@pytest.mark.parametrize("seed", range(20))
def test_no_step_is_lost_doubled_or_torn_from_its_chain(seed):
    generator = np.random.default_rng(seed)
    steps = int(generator.integers(4, 12))
    lengths = generator.integers(1, steps + 1, generator.integers(1, 12)).tolist()
    chains = make_chains(lengths)
    batch = pack(chains, steps, layout="fused")
    found = []
    for row, ids in enumerate(batch.segment_ids):
        assert set(ids) - {0} == set(range(1, ids.max() + 1))
        for segment in range(1, ids.max() + 1):
            [place] = np.nonzero(ids == segment)
            assert place[-1] - place[0] + 1 == len(place)
            found.append({name: getattr(batch, name)[row, place] for name in STEP_FIELDS})
    found.sort(key=lambda chain: chain["reward"][0])
    assert len(found) == len(chains)
    for got, chain in zip(found, chains, strict=True):
        for name in STEP_FIELDS:
            np.testing.assert_array_equal(got[name], getattr(chain, name), err_msg=name)


def test_a_row_is_opened_only_for_what_fits_nowhere():
    batch = pack(make_chains([4, 4, 1, 2, 1]), 5, layout="fused")
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 2], [1, 1, 1, 1, 2], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.reward[:, -1], [92, 122, 0])


def plain_first_fit(lengths, steps):
    used, placed = [0] * len(lengths), []
    for length in lengths:
        row = min(r for r, taken in enumerate(used) if taken + length <= steps)
        placed.append((row, used[row]))
        used[row] += length
    return placed


@pytest.mark.parametrize("seed", range(20))
def test_the_first_row_with_room_is_taken(seed):
    generator = np.random.default_rng(seed)
    steps = int(generator.integers(4, 40))
    lengths = generator.integers(1, steps + 1, generator.integers(1, 60)).tolist()
    assert first_fit(lengths, steps) == plain_first_fit(lengths, steps)


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="a chain of 7 steps and rows of 6"):
        pack(make_chains([2, 7]), 24)
    with pytest.raises(ValueError, match="2 chains that need 2 rows of 6 steps, and num_rows 1"):
        pack(make_chains([4, 3]), 24, num_rows=1)
    with pytest.raises(ValueError, match=r"got 0 and 4\. Use 4"):
        pack([make_chain(1)], 0)
    with pytest.raises(ValueError, match=rf"one of {', '.join(LAYOUTS)}; got 'other'"):
        pack([make_chain(1)], 8, layout="other")
