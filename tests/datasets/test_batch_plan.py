import jax
import numpy as np
import pytest

from bpt_rl.datasets.batch_plan import BatchPlan, assemble, assemble_in_jit, place_chains, targets_of
from bpt_rl.datasets.chains import collected_returns

in_jit = jax.jit(assemble_in_jit, static_argnums=(2, 3))


def columns_of(reward):
    """Episodes [E, T1] whose observations and actions name episode and row."""
    names = np.add.outer(100 * np.arange(len(reward)), np.arange(reward.shape[1])).astype(np.float32)
    return {
        "observation": np.stack([names, -names], axis=2),
        "action": names[..., None] + np.float32(0.5),
        "reward": reward,
        "collected": collected_returns(reward[:, 1:]),
    }


def check_same_bits(first, second):
    for name, array in first._asdict().items():
        assert np.asarray(getattr(second, name)).tobytes() == np.asarray(array).tobytes(), name


LITERAL = columns_of(np.array([[0, 1, 2, 4], [0, 3, 3, 3]], np.float32))


def literal_plan():
    """Two chains of two trajectories each, cut from two episodes of three steps, in rows of six."""
    whole = np.array(
        [
            [[0, 0], [1, 1]],
            [[0, 2], [0, 3]],
            [[1, 1], [1, 1]],
            [[0, 1], [0, 1]],
            [[0, 1], [1, 0]],
            [[1, 0], [0, 2]],
            [[2, 3], [3, 1]],
            [[2, 2], [0, 0]],
        ]
    )
    real = np.array([[[9, 9], [9, 9]], [[7, 7], [5, 6]], [[0, 1], [1, 1]]], np.float32)
    return BatchPlan.of_rows(whole, real, first_row=0, num_rows=2)


def test_a_small_plan_becomes_the_batch_drawn_here():
    for batch in (assemble(literal_plan(), LITERAL, 2, 6), in_jit(literal_plan(), LITERAL, 2, 6)):
        np.testing.assert_array_equal(
            batch.observation[..., 0], [[1, 2, 100, 101, 102, 0], [100, 101, 102, 2, 0, 0]]
        )
        np.testing.assert_array_equal(
            batch.action[..., 0], [[2.5, 3.5, 101.5, 102.5, 103.5, 0], [101.5, 102.5, 103.5, 3.5, 0, 0]]
        )
        np.testing.assert_array_equal(batch.reward, [[2, 4, 3, 3, 3, 0], [3, 3, 3, 4, 0, 0]])
        np.testing.assert_array_equal(batch.return_to_go, [[8, 6, 9, 6, 3, 0], [9, 6, 3, 6, 0, 0]])
        np.testing.assert_array_equal(batch.completion, [[0, 1, 0, 0, 1, 0], [0, 1, 1, 1, 0, 0]])
        np.testing.assert_array_equal(batch.step, [[1, 2, 0, 1, 2, 0], [0, 1, 2, 2, 0, 0]])
        np.testing.assert_array_equal(batch.episode, [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0]])
        np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
        np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])


def test_a_share_of_the_rows_is_cut_from_the_whole():
    plan, whole = literal_plan(), assemble(literal_plan(), LITERAL, 2, 6)
    numbers = np.array(plan[:8])[:, None], np.array(plan[8:])[:, None]
    # A third process finds nothing to do.
    for row in range(3):
        share = BatchPlan.of_rows(*numbers, first_row=row, num_rows=1)
        assert len(share.row) == len(plan.row)
        batch = assemble(share, LITERAL, 1, 6)
        check_same_bits(batch, in_jit(share, LITERAL, 1, 6))
        for name, array in whole._asdict().items():
            np.testing.assert_array_equal(getattr(batch, name)[0], array[row] if row < 2 else 0 * array[0])


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-38])
def test_memory_and_accelerator_agree_on_rewards_of_any_size_and_sign(scale):
    # 1e-38 is about the smallest normal float32: most of these rewards are below, where XLA rounds to 0.
    generator = np.random.default_rng(1)
    reward = (scale * generator.normal(size=(10, 9)) * 10 ** generator.uniform(-6, 0, (10, 1))).astype(
        np.float32
    )
    reward[:, 0] = 0
    columns = columns_of(reward)
    for _ in range(20):
        index = generator.permuted(np.tile(np.arange(10), (2, 1)), axis=1)[:, :4]
        returns = columns["collected"][index, -1]
        num_steps = generator.integers(1, 6, index.shape)
        row, offset, segment_id = place_chains(num_steps, 24)
        episode = np.zeros_like(index) + np.arange(4)
        start, flag_from = (generator.integers(0, high, index.shape) for high in (4, 9))
        whole = np.array([row, offset, segment_id, episode, index, start, num_steps, flag_from])
        real = np.array([*targets_of(np.sort(returns, axis=1), own=True), episode == 3], np.float32)
        plan = BatchPlan.of_rows(whole, real, first_row=0, num_rows=2)
        check_same_bits(assemble(plan, columns, 2, 24), in_jit(plan, columns, 2, 24))


def test_targets_are_the_largest_return_of_the_chain_or_the_own():
    returns = np.array([[1, 4, 2], [-3, 2e-38, -2]], np.float32)
    targets, thresholds = targets_of(returns, own=False)
    np.testing.assert_array_equal(targets, [[4, 4, 4], [0, 0, 0]])
    np.testing.assert_allclose(thresholds, [[4 - 4e-6] * 3, [-1e-6] * 3], rtol=1e-7)
    targets, thresholds = targets_of(returns, own=True)
    np.testing.assert_array_equal(targets, [[1, 4, 2], [-3, 0, -2]])
    assert (thresholds < returns).all()
