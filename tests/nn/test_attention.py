import functools
import logging

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from bpt_rl.nn import attention
from bpt_rl.nn.attention import dot_product_attention
from bpt_rl.nn.blockwise import RESIDUAL_NAME

# (B, S, H, H_kv, K), (query_chunk_size, key_chunk_size), is_causal, has segments. Chunks divide S only in
# the second.
CASES = [
    ((2, 37, 1, 1, 8), (8, 5), True, False),
    ((1, 48, 4, 2, 16), (16, 16), True, False),
    ((2, 50, 6, 2, 4), (13, 32), True, True),
    ((3, 41, 4, 1, 8), (64, 7), True, True),
    ((2, 37, 2, 2, 8), (8, 5), False, False),
    ((1, 45, 6, 3, 8), (10, 16), False, True),
]


@pytest.fixture(autouse=True)
def full_float32_products():
    """GPUs round the operands of float32 products to 10 bits unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def operands(seed, shape, dtype=jnp.float32):
    B, S, H, H_kv, K = shape
    generator = np.random.default_rng(seed)
    arrays = [generator.normal(size=(B, S, heads, K)) for heads in (H, H_kv, H_kv)]
    return tuple(jnp.asarray(array.astype(dtype)) for array in arrays)


def random_segments(seed, B, S):
    """Runs of 1, 2, ... with padding, id 0, at the end of each row."""
    generator = np.random.default_rng(seed)
    ids = 1 + np.cumsum(generator.random((B, S)) < 0.12, axis=1)
    ids[np.arange(S) >= generator.integers(S // 2, S + 1, (B, 1))] = 0
    return jnp.asarray(ids, jnp.int32)


def values_and_gradients(operands, cotangent, **options):
    """Returns the output and the gradients of query, key and value, in NumPy: nothing more to compile."""

    @jax.jit
    def both(operands, cotangent):
        out, pullback = jax.vjp(functools.partial(dot_product_attention, **options), *operands)
        return out, *pullback(cotangent)

    return [np.asarray(array) for array in both(operands, cotangent)]


def relative_error(got, expected):
    pairs = [(np.asarray(g), np.asarray(e)) for g, e in zip(got, expected, strict=True)]
    return max(np.abs(g - e).max() / np.abs(e).max() for g, e in pairs)


@pytest.mark.parametrize(("shape", "chunk_sizes", "is_causal", "has_segments"), CASES)
def test_blockwise_matches_reference_in_values_and_gradients(shape, chunk_sizes, is_causal, has_segments):
    B, S = shape[:2]
    tensors = operands(S, shape)
    options = {
        "is_causal": is_causal,
        "segment_ids": random_segments(S, B, S) if has_segments else None,
        "query_chunk_size": chunk_sizes[0],
        "key_chunk_size": chunk_sizes[1],
    }
    cotangent = operands(S + 1, shape)[0]
    expected = values_and_gradients(tensors, cotangent, implementation="reference", **options)
    got = values_and_gradients(tensors, cotangent, implementation="blockwise", **options)
    assert all(np.isfinite(array).all() for array in (*got, *expected))
    # Both round in float32, but sum in another order.
    assert relative_error(got, expected) < 1e-5


def test_blockwise_matches_reference_to_twelve_digits_in_float64():
    with jax.enable_x64(True):
        tensors = operands(0, (2, 50, 6, 2, 4), jnp.float64)
        options = {"segment_ids": random_segments(0, 2, 50), "query_chunk_size": 13, "key_chunk_size": 32}
        cotangent = operands(1, (2, 50, 6, 2, 4), jnp.float64)[0]
        expected = values_and_gradients(tensors, cotangent, implementation="reference", **options)
        got = values_and_gradients(tensors, cotangent, implementation="blockwise", **options)
        assert all(array.dtype == jnp.float64 for array in got)
        assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize(
    ("implementation", "is_causal"), [("reference", True), ("reference", False), ("blockwise", True)]
)
def test_attention_matches_jax_nn(implementation, is_causal):
    tensors = operands(2, (2, 37, 4, 2, 8))
    cotangent = operands(3, (2, 37, 4, 2, 8))[0]
    got = values_and_gradients(
        tensors,
        cotangent,
        implementation=implementation,
        is_causal=is_causal,
        query_chunk_size=8,
        key_chunk_size=5,
    )

    def oracle(*tensors):
        return jax.nn.dot_product_attention(*tensors, is_causal=is_causal, implementation="xla")

    def oracle_gradients(cotangent, *tensors):
        out, pullback = jax.vjp(oracle, *tensors)
        return out, *pullback(cotangent)

    assert relative_error(got, jax.jit(oracle_gradients)(cotangent, *tensors)) < 1e-5


@pytest.mark.parametrize("chunk_sizes", [(1, 37), (6, 11), (500, 500)])
def test_blockwise_does_not_depend_on_chunk_sizes(chunk_sizes):
    tensors, cotangent = operands(4, (2, 37, 1, 1, 8)), operands(5, (2, 37, 1, 1, 8))[0]
    run = functools.partial(values_and_gradients, tensors, cotangent, implementation="blockwise")
    expected = run(query_chunk_size=16, key_chunk_size=16)
    assert (
        relative_error(run(query_chunk_size=chunk_sizes[0], key_chunk_size=chunk_sizes[1]), expected) < 1e-5
    )


def test_blockwise_works_under_vmap_in_checkpoint_in_scan_in_jit():
    query, key, value = operands(6, (3, 20, 2, 1, 4))

    def loss(attend, query):
        layer = jax.checkpoint(lambda x, _: (attend(x, key, value), None))
        return jnp.sum(jax.lax.scan(layer, query, length=2)[0] ** 2)

    def attend_row(query, key, value):
        options = {"implementation": "blockwise", "query_chunk_size": 8, "key_chunk_size": 6}
        return dot_product_attention(query[None], key[None], value[None], **options)[0]

    reference = functools.partial(dot_product_attention, implementation="reference")
    expected = jax.jit(jax.grad(functools.partial(loss, reference)))(query)
    got = jax.jit(jax.grad(functools.partial(loss, jax.vmap(attend_row))))(query)
    assert relative_error([got], [expected]) < 1e-5


def test_a_checkpoint_policy_saves_the_output_so_that_the_backward_pass_does_not_attend_again():
    tensors = operands(7, (1, 32, 1, 1, 4))

    def num_loops(policy):
        attend = functools.partial(dot_product_attention, implementation="blockwise", query_chunk_size=8)
        loss = jax.checkpoint(lambda *tensors: jnp.sum(jnp.sin(attend(*tensors))), policy=policy)
        return (
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
            .lower(*tensors)
            .as_text()
            .count("stablehlo.while")
        )

    # Two nested loops a pass: forward, (forward again), backward.
    assert num_loops(jax.checkpoint_policies.nothing_saveable) == 6
    assert num_loops(jax.checkpoint_policies.save_only_these_names(RESIDUAL_NAME)) == 4


def temporary_bytes(implementation, length):
    """Returns what XLA plans to allocate for a forward and a backward pass, beside operands and results."""
    shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)

    def loss(*tensors):
        attended = dot_product_attention(
            *tensors, implementation=implementation, query_chunk_size=64, key_chunk_size=64
        )
        return jnp.sum(attended**2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_blockwise_memory_grows_linearly_and_reference_memory_quadratically():
    assert temporary_bytes("blockwise", 4096) / temporary_bytes("blockwise", 1024) < 5
    assert temporary_bytes("reference", 4096) / temporary_bytes("reference", 1024) > 12


def test_blockwise_visits_only_chunk_pairs_that_reach_the_diagonal():
    """A NaN in a pair that is visited would spoil every query of its chunk, although its weight is zero."""
    query, key, value = operands(8, (1, 32, 1, 1, 4))
    value = jnp.asarray(np.where(np.arange(32)[:, None, None] < 8, value, np.nan))
    attend = functools.partial(dot_product_attention, implementation="blockwise", query_chunk_size=8)
    out = jax.jit(functools.partial(attend, key_chunk_size=8))(query, key, value)
    finite = np.isfinite(out).all(axis=(0, 2, 3))
    np.testing.assert_array_equal(finite, np.arange(32) < 8)


@pytest.mark.parametrize(
    ("implementation", "is_causal"), [("reference", True), ("blockwise", True), ("blockwise", False)]
)
def test_a_segment_sees_nothing_of_another(implementation, is_causal):
    segment_ids = np.asarray([[1] * 9 + [2] * 14 + [0] * 6], np.int32)
    tensors, others = operands(9, (1, 29, 2, 1, 8)), operands(10, (1, 29, 2, 1, 8))
    inside = (segment_ids == 2)[..., None, None]
    changed = tuple(
        np.where(inside, kept, 100 * np.asarray(other)) for kept, other in zip(tensors, others, strict=True)
    )
    attend = functools.partial(
        values_and_gradients,
        implementation=implementation,
        is_causal=is_causal,
        segment_ids=jnp.asarray(segment_ids),
        query_chunk_size=8,
        key_chunk_size=6,
    )
    cotangent = operands(11, (1, 29, 2, 1, 8))[0]
    for before, after in zip(attend(tensors, cotangent), attend(changed, cotangent), strict=True):
        np.testing.assert_array_equal(before[:, 9:23], after[:, 9:23])
        assert np.isfinite(after).all()


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_no_gradient_flows_from_a_token_to_later_ones(implementation):
    tensors = operands(12, (1, 24, 1, 1, 4))
    cotangent = np.zeros((1, 24, 1, 4), np.float32)
    cotangent[:, 10] = 1
    _, d_query, d_key, d_value = values_and_gradients(
        tensors, cotangent, implementation=implementation, query_chunk_size=8, key_chunk_size=6
    )
    for gradient, reached in ((d_query, [10]), (d_key, range(11)), (d_value, range(11))):
        np.testing.assert_array_equal(np.any(gradient != 0, axis=(0, 2, 3)).nonzero()[0], list(reached))


def test_bfloat16_stays_within_its_rounding_of_the_float32_result():
    tensors = operands(13, (2, 50, 4, 2, 16), jnp.bfloat16)
    cotangent = operands(14, (2, 50, 4, 2, 16), jnp.bfloat16)[0]
    options = {"query_chunk_size": 16, "key_chunk_size": 16}
    wide = [np.asarray(tensor, np.float32) for tensor in tensors]
    expected = values_and_gradients(
        wide, np.asarray(cotangent, np.float32), implementation="reference", **options
    )
    for implementation in ("reference", "blockwise"):
        got = values_and_gradients(tensors, cotangent, implementation=implementation, **options)
        assert all(array.dtype == jnp.bfloat16 for array in got)
        # bfloat16 keeps 8 bits: 2^-9 = 0.002 for each rounding of weights, logit gradients and results.
        assert relative_error([array.astype(np.float32) for array in got], expected) < 0.015


def test_auto_takes_blockwise_where_cudnn_cannot_run_and_says_why_once(caplog):
    attention._log_choice.cache_clear()
    tensors = operands(15, (1, 24, 1, 1, 4))
    with caplog.at_level(logging.INFO, logger="bpt_rl.nn.attention"):
        auto = [dot_product_attention(*tensors) for _ in range(2)]
    named = dot_product_attention(*tensors, implementation="blockwise")
    np.testing.assert_array_equal(auto, [named, named])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "auto chose blockwise (cudnn must have" in message


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, ""),
        ({"dtype": jnp.float16, "head_dim": 128}, ""),
        ({"device_kind": "cpu"}, "an NVIDIA GPU; got 'cpu'"),
        ({"device_kind": "AMD Instinct MI300X"}, "an NVIDIA GPU; got 'AMD Instinct MI300X'"),
        ({"dtype": "float32"}, "bfloat16 or float16 operands; got float32"),
        ({"has_segments": True}, "no segment_ids; got some"),
        ({"head_dim": 68}, "a head_dim that is a multiple of 8 and at most 128; got 68"),
        ({"head_dim": 136}, "a head_dim that is a multiple of 8 and at most 128; got 136"),
    ],
)
def test_auto_takes_cudnn_where_its_needs_are_met(changes, obstacle):
    facts = {
        "device_kind": "NVIDIA H100 80GB HBM3",
        "dtype": "bfloat16",
        "head_dim": 64,
        "has_segments": False,
    }
    assert attention.cudnn_obstacle(**facts | changes) == obstacle
    expected = "blockwise" if obstacle else "cudnn"
    assert attention.chosen_implementation("auto", obstacle) == expected
    assert attention.chosen_implementation("reference", obstacle) == "reference"


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize(
    ("shape", "is_causal"),
    [
        ((2, 256, 4, 4, 64), True),
        ((2, 256, 4, 2, 64), False),
        ((1, 250, 6, 2, 128), True),
        ((1, 384, 8, 1, 32), True),
    ],
)
def test_cudnn_matches_a_float64_reference_in_values_and_gradients(shape, is_causal):
    tensors, cotangent = operands(16, shape, jnp.bfloat16), operands(17, shape, jnp.bfloat16)[0]
    got = values_and_gradients(tensors, cotangent, implementation="cudnn", is_causal=is_causal)
    with jax.enable_x64(True):
        *wide, wide_cotangent = (jnp.asarray(np.asarray(x, np.float64)) for x in (*tensors, cotangent))
        expected = values_and_gradients(wide, wide_cotangent, implementation="reference", is_causal=is_causal)
    assert all(array.dtype == np.float64 for array in expected)
    # As for bfloat16 above.
    assert relative_error([array.astype(np.float64) for array in got], expected) < 0.015


@pytest.fixture
def no_shape_check():
    """Lets wrong arguments through to the checks that users meet, who run without jaxtyping's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 8, 2, 4),) * 3, {"implementation": "flash"}, "implementation must be one of .*got 'flash'"),
        (((1, 8, 2, 4),) * 3, {"query_chunk_size": 0}, "must be positive; got 0 and 512"),
        (((1, 8, 2, 4),) * 3, {"segment_ids": np.ones((1, 7), np.int32)}, r"\(1, 8\); got \(1, 7\)"),
        (
            ((1, 8, 2, 4),) * 3,
            {"implementation": "cudnn"},
            "must have (an NVIDIA GPU|bfloat16 or float16 operands); got",
        ),
        (
            ((1, 8, 3, 4), (1, 8, 2, 4), (1, 8, 2, 4)),
            {},
            "must be a multiple of that of key heads; got 3 and 2",
        ),
        (((1, 8, 2, 4), (1, 9, 2, 4), (1, 9, 2, 4)), {}, "must agree in B, S and K; got"),
        (((1, 8, 2, 4), (1, 8, 2, 4), (1, 8, 1, 4)), {}, r"key and value both \[B, S, H_kv, K\]; got"),
        (((8, 2, 4),) * 3, {}, r"query must be \[B, S, H, K\]"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_do(no_shape_check, shapes, options, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(*(jnp.zeros(shape) for shape in shapes), **options)


def test_mixed_types_are_refused(no_shape_check):
    query = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(ValueError, match="one type; got bfloat16, float32 and float32"):
        dot_product_attention(query.astype(jnp.bfloat16), query, query)
