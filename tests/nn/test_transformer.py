import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bpt_rl.config import ModelConfig
from bpt_rl.nn.transformer import Transformer, drop

CONFIG = ModelConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    feedforward_dim=24,
    dropout=0.0,
    implementation="reference",
    activations="keep",
)
SEGMENT_IDS = np.array([[1] * 9 + [2] * 5, [1] * 6 + [2] * 4 + [0] * 4], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(graph, params, x, segment_ids, cotangent):
    out, pullback = jax.vjp(lambda p, x: nnx.merge(graph, p)(x, segment_ids), params, x)
    return out, pullback(cotangent.astype(out.dtype))


@functools.partial(jax.jit, static_argnums=0)
def decode(graph, params, x, cache):
    return nnx.merge(graph, params).decode(x, cache)


@pytest.fixture(scope="module")
def make(draw_parameters):
    """Returns (graph, parameters) of a changed configuration; the parameters are always the same."""
    return lambda **changes: draw_parameters(
        lambda: Transformer(dataclasses.replace(CONFIG, **changes), nnx.Rngs(0))
    )


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(1)
    x, cotangent = generator.normal(size=(2, 2, 14, 16)).astype(np.float32)
    return x, SEGMENT_IDS, cotangent


@pytest.fixture(scope="module")
def expected(make, inputs):
    return values_and_gradients(*make(), *inputs)


def relative_errors(got, expected):
    """Largest error of each array, as a share of the array's largest entry."""

    def error(g, e):
        g, e = np.asarray(g, np.float64), np.asarray(e, np.float64)
        return np.abs(g - e).max() / np.abs(e).max()

    return jax.tree.leaves(jax.tree.map(error, got, expected))


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, position):
    """Turns pairs (k, k + K/2) of one head by position * 10000^(-2k/K) radians, as complex numbers."""
    half = x.shape[-1] // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def plain_attention(query, key, value, ids):
    """One row's attention, token by token and head by head; two query heads read one key head."""
    out = np.zeros_like(query)
    for s in range(len(ids)):
        seen = [t for t in range(s + 1) if ids[t] == ids[s]]
        for head in range(4):
            q = turn(query[s, head], s)
            logits = np.array([q @ turn(key[t, head // 2], t) for t in seen]) / np.sqrt(4)
            weights = np.exp(logits - logits.max())
            out[s, head] = weights @ value[seen, head // 2] / weights.sum()
    return out


def plain_transformer(params, x, segment_ids):
    """The whole stack in float64 NumPy."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = x.astype(np.float64)
    for layer in range(2):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        for row, ids in zip(x, segment_ids, strict=True):
            normed = rms_norm(row, block["attention_norm"]["scale"])
            query, key, value = (normed @ block[name]["kernel"] for name in ("query", "key", "value"))
            query, key, value = (array.reshape(len(ids), -1, 4) for array in (query, key, value))
            attended = plain_attention(query, key, value, ids)
            row += attended.reshape(-1, 16) @ block["output"]["kernel"]
            normed = rms_norm(row, block["feedforward_norm"]["scale"])
            row += np.maximum(normed @ block["expand"]["kernel"], 0) @ block["contract"]["kernel"]
    return rms_norm(x, params["norm"]["scale"])


def test_stack_is_a_pre_norm_transformer_written_out(make, inputs, expected):
    x, segment_ids, _ = inputs
    # float32 against float64.
    np.testing.assert_allclose(expected[0], plain_transformer(make()[1], x, segment_ids), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "implementation": "blockwise",
            "query_chunk_size": 5,
            "key_chunk_size": 3,
            "feedforward_chunk_size": 4,
        },
        {"activations": "recompute", "implementation": "blockwise", "key_chunk_size": 7},
        {"activations": "save_attention", "implementation": "blockwise", "feedforward_chunk_size": 6},
        {"activations": "offload", "feedforward_chunk_size": 6},
        {"head_groups": 2, "feedforward_chunk_size": 6},
        {"head_groups": 2, "activations": "recompute", "implementation": "blockwise"},
        {"layer_groups": 2, "activations": "offload_attention", "implementation": "blockwise"},
        {"layer_groups": 2, "head_groups": 2, "activations": "offload"},
    ],
)
def test_chunks_implementation_and_remat_change_neither_values_nor_gradients(make, inputs, expected, changes):
    got = values_and_gradients(*make(**changes), *inputs)
    # Sums in another order: float32 rounding through two layers and back.
    assert max(relative_errors(got, expected)) < 1e-5


def test_saved_attention_is_not_computed_twice(make, inputs):
    def num_exponentials(activations):
        """Counts the loops that attend: each takes exponentials of its logits, and nothing else does.

        Before XLA, which may fuse an exponential into two places, and shares none between a scan's passes.
        """
        graph, params = make(activations=activations, implementation="blockwise")
        return values_and_gradients.lower(graph, params, *inputs).as_text().count("stablehlo.exponential")

    counts = {kept: num_exponentials(kept) for kept in ("keep", "save_attention", "recompute", "offload")}
    assert counts["keep"] == counts["save_attention"] < counts["recompute"] == counts["offload"]


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="a CPU's memory is the host's")
@pytest.mark.parametrize("activations", ["offload", "offload_attention"])
def test_what_is_offloaded_lies_in_the_hosts_memory_and_changes_nothing(make, inputs, expected, activations):
    graph, params = make(activations=activations, implementation="blockwise")
    compiled = values_and_gradients.lower(graph, params, *inputs).compile()
    # Layer inputs of two layers, and attention results as wide as they.
    num_kept = 2 if activations == "offload" else 4
    assert compiled.memory_analysis().host_temp_size_in_bytes >= num_kept * inputs[0].nbytes
    assert max(relative_errors(compiled(params, *inputs), expected)) < 1e-5


def test_bfloat16_compute_stays_near_float32(make, inputs, expected):
    graph, params = make(compute_dtype="bfloat16")
    got = values_and_gradients(graph, params, *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(got[1])} == {np.dtype("float32")}
    # bfloat16 has 8 bits, so that each product is off by up to 0.4 percent; equality would mean that nothing
    # was computed in it.
    assert 1e-4 < relative_errors(got[0], expected[0])[0] < 0.03
    for g, e in zip(*map(jax.tree.leaves, (got[1], expected[1])), strict=True):
        # In the mean over entries: a relu may switch where its input rounds to the other side of 0.
        assert np.linalg.norm(g - e) < 0.1 * np.linalg.norm(e)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_tokens_of_other_segments_leave_no_trace(make, inputs, compute_dtype):
    graph, params = make() if compute_dtype == "float32" else make(compute_dtype=compute_dtype)
    x, segment_ids, cotangent = inputs
    changed = x + 3 * (segment_ids != 2)[:, :, None].astype(np.float32)
    out, _ = values_and_gradients(graph, params, x, segment_ids, cotangent)
    other, (_, gradient) = values_and_gradients(
        graph, params, changed, segment_ids, cotangent * (segment_ids == 2)[:, :, None]
    )
    is_second = segment_ids == 2
    np.testing.assert_array_equal(np.asarray(other)[is_second], np.asarray(out)[is_second])
    assert np.abs(np.asarray(other - out, np.float32)[~is_second]).max() > 0.01
    gradient = np.asarray(gradient)
    assert not gradient[~is_second].any()
    assert (np.abs(gradient[is_second]).max(axis=-1) > 0).all()


def test_cached_decoding_equals_the_whole_pass_with_rows_at_different_lengths(make, inputs, expected):
    x, graph_and_params = inputs[0], make()
    # Row 0 is one segment of nine tokens, row 1 one of six: what decoding sees is one segment.
    cache = nnx.merge(*graph_and_params).init_cache(2, 12)
    outs = []
    for t in (0, 3, 6):
        # Row 1 forgets its first three tokens after they were written, so that it starts again at slot 0.
        if t == 3:
            cache = cache._replace(length=cache.length.at[1].set(0))
        new = np.stack([x[0, t : t + 3], x[1, max(t - 3, 0) : max(t, 3)]])
        out, cache = decode(*graph_and_params, new, cache)
        outs.append(np.asarray(out))
    np.testing.assert_array_equal(cache.length, [9, 6])
    np.testing.assert_allclose(np.concatenate([o[0] for o in outs]), expected[0][0, :9], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([o[1] for o in outs[1:]]), expected[0][1, :6], atol=1e-5)


def test_dropout_needs_a_key_and_keeps_the_mean():
    x = jnp.ones((10, 100, 20))
    assert drop(x, 0.25, None) is x
    assert drop(x, 0.0, jax.random.key(0)) is x
    dropped = np.asarray(drop(x, 0.25, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
    # Standard error of the mean of 20,000 entries: sqrt(0.25 / 0.75 / 20000) = 0.004; five of those.
    np.testing.assert_allclose(dropped.mean(), 1, atol=0.02)


def test_dropout_is_drawn_from_the_key_alone_and_anew_in_each_layer(make, inputs, expected):
    graph, params = make(dropout=0.5)
    x, segment_ids, _ = inputs
    run = jax.jit(
        lambda p, key: nnx.merge(graph, p)(jnp.asarray(x), jnp.asarray(segment_ids), key),
    )
    first, again, other = (np.asarray(run(params, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    # One branch of one layer alone, the layers being equal: the same noise would give the same output.
    equal = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 2, axis=0), params["blocks"])
    silent = {name: {"kernel": np.zeros_like(equal[name]["kernel"])} for name in ("output", "contract")}

    def alone(name, layer, seed):
        kernel = equal[name]["kernel"] * (np.arange(2) == layer)[:, None, None]
        blocks = equal | silent | {name: {"kernel": kernel.astype(np.float32)}}
        return np.asarray(run(params | {"blocks": blocks}, jax.random.key(seed)))

    for name in ("output", "contract"):
        outs = [alone(name, layer, seed) for layer in range(2) for seed in range(2)]
        for a, b in itertools.combinations(outs, 2):
            assert np.abs(a - b).max() > 0.01
