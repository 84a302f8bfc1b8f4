"""Attention over a sequence that virtual devices share, against the reference on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bpt_rl.nn.attention import dot_product_attention
from bpt_rl.nn.blockwise import ChunkSizes
from bpt_rl.nn.context_parallel import ContextAxis, choose_method, context_attention, key_repeats
from bpt_rl.nn.ring_attention import Ring, ring_attention
from bpt_rl.nn.zigzag import chunk_order, local_positions, placed, unplaced

pytestmark = pytest.mark.devices(8)

CHUNKS = {"query_chunk_size": 7, "key_chunk_size": 5}


def drawn(seed, B, S, heads, dtype=np.float32):
    generator = np.random.default_rng(seed)
    H, H_kv, K = heads
    arrays = [generator.normal(size=(B, S, count, K)).astype(dtype) for count in (H, H_kv, H_kv, H)]
    ids = 1 + np.cumsum(generator.random((B, S)) < 0.1, axis=1)
    ids[np.arange(S) >= generator.integers(S // 2, S, (B, 1))] = 0
    return arrays, jnp.asarray(ids, jnp.int32)


def over_devices(axis, **options):
    """Returns (query, key, value, ids) -> output of whole sequences, over as many devices as the axis has."""
    mesh = Mesh(np.array(jax.devices()[: axis.num_devices]), (axis.name,))
    share = P(None, axis.name)

    def whole(query, key, value, ids):
        S = query.shape[1]
        # Padding at the end is behind every token: a causal mask hides it.
        missing = -S % axis.num_chunks

        def split(x):
            widths = ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)
            return placed(jnp.pad(x, widths), axis.num_devices, axis.placement)

        inputs = jax.tree.map(split, (query, key, value, ids))
        local = jax.shard_map(
            functools.partial(context_attention, axis=axis, **options),
            mesh=mesh,
            in_specs=share,
            out_specs=share,
            check_vma=False,
        )
        return unplaced(local(*inputs), axis.num_devices, axis.placement)[:, :S]

    return whole


def values_and_gradients(attend, arrays, ids):
    *operands, cotangent = arrays

    @jax.jit
    def both(operands, cotangent):
        out, pullback = jax.vjp(lambda *operands: attend(*operands, ids), *operands)
        return out, *pullback(cotangent)

    return [np.asarray(array) for array in both(operands, cotangent)]


def on_one_device(arrays, ids, **options):
    def attend(query, key, value, ids):
        return dot_product_attention(
            query, key, value, implementation="reference", segment_ids=ids, **options
        )

    return values_and_gradients(attend, arrays, ids)


def relative_error(got, expected):
    return max(np.abs(g - e).max() / np.abs(e).max() for g, e in zip(got, expected, strict=True))


# method, devices, (H, H_kv, K), S, has segments. 37 and 50 divide among no number of devices.
CASES = [
    ("ring", 2, (1, 1, 8), 37, True),
    ("ring", 4, (6, 2, 4), 50, False),
    ("ring", 8, (4, 2, 4), 37, True),
    ("ulysses", 2, (2, 1, 8), 50, False),
    ("ulysses", 4, (8, 2, 4), 37, True),
    ("ulysses", 8, (8, 8, 4), 50, True),
]


@pytest.mark.parametrize(("method", "num_devices", "heads", "S", "has_segments"), CASES)
def test_devices_together_find_what_one_finds_alone(method, num_devices, heads, S, has_segments):
    arrays, ids = drawn(S + num_devices, 2, S, heads)
    ids = ids if has_segments else None
    axis = ContextAxis(name="context", num_devices=num_devices, method=method)
    got = values_and_gradients(over_devices(axis, implementation="blockwise", **CHUNKS), arrays, ids)
    # Both round in float32, but sum in another order.
    assert relative_error(got, on_one_device(arrays, ids)) < 1e-5


def test_a_ring_is_exact_in_float64():
    with jax.enable_x64(True):
        arrays, ids = drawn(1, 2, 45, (4, 2, 4), np.float64)
        axis = ContextAxis(name="context", num_devices=4, method="ring")
        got = values_and_gradients(over_devices(axis, **CHUNKS), arrays, ids)
        assert all(array.dtype == np.float64 for array in got)
        assert relative_error(got, on_one_device(arrays, ids)) < 1e-12


def test_a_ring_of_contiguous_shares_finds_the_same():
    arrays, ids = drawn(2, 1, 36, (2, 1, 4))
    ring = Ring("context", 4, "contiguous", True, ChunkSizes(7, 5))
    attend = jax.shard_map(
        lambda *operands: ring_attention(*operands, ring),
        mesh=Mesh(np.array(jax.devices()[:4]), ("context",)),
        in_specs=P(None, "context"),
        out_specs=P(None, "context"),
        check_vma=False,
    )
    assert relative_error(values_and_gradients(attend, arrays, ids), on_one_device(arrays, ids)) < 1e-5


def test_a_ring_visits_no_keys_that_all_are_masked():
    # Each of the eight chunks is a segment of its own. A visited value counts as 0 times itself, which is NaN here.
    arrays, _ = drawn(3, 1, 32, (1, 1, 4))
    arrays[2][:, :4] = np.nan
    ids = jnp.asarray(np.repeat(np.arange(1, 9), 4)[None], jnp.int32)
    axis = ContextAxis(name="context", num_devices=4, method="ring")
    out = jax.jit(over_devices(axis, **CHUNKS))(*arrays[:3], ids)
    # The last chunk lies with the first, and sees its mask.
    assert np.isfinite(out[:, 4:28]).all()


def test_statistics_of_a_ring_are_float32():
    arrays, ids = drawn(4, 1, 64, (1, 1, 8), np.float32)
    axis = ContextAxis(name="context", num_devices=4, method="ring")
    short = [jnp.asarray(array, jnp.bfloat16) for array in arrays[:3]]
    expected = dot_product_attention(
        *(x.astype(jnp.float32) for x in short), implementation="reference", segment_ids=ids
    )
    got = jax.jit(over_devices(axis))(*short, ids)
    assert got.dtype == jnp.bfloat16
    # Weights and outputs are rounded to 8 bits; statistics of 8 bits would be wrong by several of them.
    assert np.abs(got.astype(jnp.float32) - expected).max() < 2.0**-7 * np.abs(expected).max()


def test_placing_is_undone_and_says_where_positions_lie():
    positions = np.arange(12)
    whole = jnp.asarray(np.stack([positions, positions + 100]))
    split = placed(whole, 3, "zigzag")
    np.testing.assert_array_equal(split[0], [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])
    np.testing.assert_array_equal(unplaced(split, 3, "zigzag"), whole)
    np.testing.assert_array_equal(placed(whole, 3, "contiguous"), whole)
    mine = jax.shard_map(
        lambda: local_positions(4, "context", 3, "zigzag"),
        mesh=Mesh(np.array(jax.devices()[:3]), ("context",)),
        in_specs=(),
        out_specs=P("context"),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(mine)(), split[0])
    with pytest.raises(ValueError, match="got 12 and 8"):
        placed(whole, 4, "zigzag")


def test_every_device_has_the_same_work_under_a_causal_mask():
    order = chunk_order(8, "zigzag").reshape(8, 2)
    # Chunk i sees i chunks before it and half of itself.
    assert set((order + 0.5).sum(axis=1)) == {16.0}


def test_key_heads_are_repeated_as_little_as_every_device_needs_one():
    assert [key_repeats(8, kv, 4) for kv in (8, 4, 2, 1)] == [1, 1, 2, 4]
    assert key_repeats(12, 3, 4) == 4
    with pytest.raises(ValueError, match="got 6 heads and 4 devices"):
        key_repeats(6, 6, 4)


@pytest.mark.parametrize(
    ("facts", "method", "reason"),
    [
        ((6, 6, 4, 10**6), "ring", "6 heads do not divide among 4 devices"),
        ((8, 1, 4, 400), "ulysses", "100 tokens a device"),
        # Two devices: half of 11 heads, against two on their way home.
        ((8, 8, 2, 10**6), "ring", "a ring waits for 0.36 times"),
        ((8, 1, 4, 10**6), "ring", "a ring waits for 0.21 times"),
        ((8, 8, 8, 10**6), "ulysses", "a ring waits for 2.70 times"),
    ],
)
def test_the_way_is_chosen_by_heads_devices_and_length(facts, method, reason):
    names = ("num_heads", "num_kv_heads", "num_devices", "num_tokens")
    choice = choose_method(**dict(zip(names, facts, strict=True)))
    assert choice.method == method
    assert reason in str(choice)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_keys_travel_a_hop_at_a_time_and_nobody_gathers_them(num_devices):
    """Forward: keys and values, as one array, leave before the own block, and once more in the loop, which two devices
    do not need. Backward: the same, gradients of both a turn behind them, and home."""
    arrays, _ = drawn(5, 1, 16, (2, 1, 4))
    axis = ContextAxis(name="context", num_devices=num_devices, method="ring")
    attend = over_devices(axis)

    def both(query, key, value, cotangent):
        out, pullback = jax.vjp(lambda *operands: attend(*operands, None), query, key, value)
        return out, *pullback(cotangent)

    text = jax.jit(both).lower(*arrays).as_text()
    loops = 0 if num_devices == 2 else 1
    assert text.count("collective_permute") == (1 + loops) + (1 + loops) + (1 + loops) + 1
    assert not any(name in text for name in ("all_gather", "all_to_all", "all_reduce"))


def test_ulysses_exchanges_operands_and_output_once_each_way():
    arrays, _ = drawn(6, 1, 16, (4, 2, 4))
    attend = over_devices(ContextAxis(name="context", num_devices=2, method="ulysses"))

    def both(query, key, value, cotangent):
        out, pullback = jax.vjp(lambda *operands: attend(*operands, None), query, key, value)
        return out, *pullback(cotangent)

    text = jax.jit(both).lower(*arrays).as_text()
    assert text.count("all_to_all") == 4
    assert not any(name in text for name in ("all_gather", "collective_permute", "all_reduce"))


def test_a_ring_refuses_another_implementation_and_halves_that_are_none():
    operands = [jnp.zeros((1, 3, 1, 4))] * 3
    axis = ContextAxis(name="context", num_devices=2, method="ring")
    with pytest.raises(ValueError, match="got implementation 'reference'"):
        context_attention(*operands, None, axis, implementation="reference")
    with pytest.raises(ValueError, match="cudnn attention must have"):
        context_attention(*operands, None, axis, implementation="cudnn")
    with pytest.raises(ValueError, match="a share of 3 tokens"):
        context_attention(*operands, None, axis)
