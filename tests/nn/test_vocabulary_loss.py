import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.nn.vocabulary_loss import vocabulary_losses

VOCABULARY_SIZE, EMBED_DIM = 23, 6


def draw(dtype, seed=0):
    """Returns stream, embedding, targets and the weight of each token's loss; some weights are 0."""
    generator = np.random.default_rng(seed)
    stream = jnp.asarray(generator.normal(size=(2, 9, EMBED_DIM)), dtype)
    embedding = jnp.asarray(generator.normal(size=(VOCABULARY_SIZE, EMBED_DIM)), dtype)
    weights = generator.normal(size=(2, 9)) * (generator.uniform(size=(2, 9)) < 0.8)
    targets = generator.integers(VOCABULARY_SIZE, size=(2, 9))
    targets[0, :2] = 0, VOCABULARY_SIZE - 1
    return stream, embedding, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, dtype)


def plain_losses(stream, embedding, targets):
    log_probability = jax.nn.log_softmax(stream @ embedding.T, axis=-1)
    return -jnp.take_along_axis(log_probability, targets[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(compute, stream, embedding, targets, weights):
    losses, pullback = jax.vjp(lambda s, e: compute(s, e, targets), stream, embedding)
    return losses, *pullback(weights.astype(losses.dtype))


def chunked(token_chunk_size, vocabulary_chunk_size):
    return functools.partial(
        vocabulary_losses, token_chunk_size=token_chunk_size, vocabulary_chunk_size=vocabulary_chunk_size
    )


CHUNK_SIZES = [(1, 1), (4, 5), (7, 8), (18, 23), (4096, 8192)]


@pytest.mark.parametrize("chunk_sizes", CHUNK_SIZES)
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 3e-6), ("float64", 1e-14)])
def test_losses_and_both_gradients_equal_a_plain_log_softmax(dtype, rounding, chunk_sizes):
    with jax.enable_x64(dtype == "float64"):
        inputs = draw(dtype)
        expected = values_and_gradients(plain_losses, *inputs)
        found = values_and_gradients(chunked(*chunk_sizes), *inputs)
        for value, wanted in zip(found, expected, strict=True):
            assert value.dtype == dtype
            # Sums in another order: a few roundings, relative to the largest entry.
            np.testing.assert_allclose(value, wanted, rtol=0, atol=rounding * np.abs(wanted).max())


def test_statistics_of_bfloat16_operands_are_float32():
    stream, embedding, targets, weights = draw("bfloat16", seed=1)
    wide = [array.astype(jnp.float32) for array in (stream, embedding)]
    expected = values_and_gradients(plain_losses, *wide, targets, weights)
    found = values_and_gradients(chunked(4, 5), stream, wide[1], targets, weights)
    assert [str(value.dtype) for value in found] == ["float32", "bfloat16", "float32"]
    # Products of bfloat16 numbers are exact in float32, so the losses only differ by its rounding.
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=3e-6 * np.abs(expected[0]).max())
    for value, wanted in zip(found[1:], expected[1:], strict=True):
        # The probabilities enter the product as bfloat16 numbers, eight bits each.
        np.testing.assert_allclose(
            np.float32(value), wanted, rtol=0, atol=2**-7 * np.abs(np.float32(wanted)).max()
        )


def test_the_embedding_gradient_of_bfloat16_tokens_is_summed_in_float32():
    # 4096 equal tokens in chunks of one: a bfloat16 sum would stop growing at 256 times the first term.
    stream = jnp.ones((1, 4096, 2), jnp.bfloat16)
    embedding = jnp.zeros((2, 2), jnp.float32)
    compute = chunked(1, 2)
    gradient = jax.jit(jax.grad(lambda e: compute(stream, e, jnp.zeros((1, 4096), jnp.int32)).sum()))(
        embedding
    )
    np.testing.assert_array_equal(gradient, [[-2048, -2048], [2048, 2048]])


def test_losses_of_known_logits():
    # Logits log 1, log 2, log 5 give probabilities 1/8, 2/8, 5/8.
    embedding = jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
    losses = vocabulary_losses(
        jnp.ones((1, 3, 1)), embedding, jnp.array([[0, 1, 2]]), vocabulary_chunk_size=2
    )
    # Three roundings of float32 on numbers up to 2.
    np.testing.assert_allclose(losses, [[np.log(8), np.log(4), np.log(8 / 5)]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_overflow_in_neither_pass(size):
    stream = jnp.full((1, 2, 1), size)
    embedding = jnp.array([[1.0], [0.5], [0.25]])
    inputs = stream, embedding, jnp.array([[0, 2]]), jnp.ones((1, 2))
    losses, *gradients = values_and_gradients(chunked(1, 1), *inputs)
    np.testing.assert_array_equal(losses, [[0, 0.75 * size] if size > 0 else [-0.75 * size, 0]])
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("target", [-1, VOCABULARY_SIZE, VOCABULARY_SIZE + 1, 1000])
def test_a_target_outside_the_vocabulary_has_no_finite_loss(target):
    stream, embedding, targets, _ = draw("float32")
    losses = chunked(4, 5)(stream, embedding, targets.at[1, 3].set(target))
    assert np.argwhere(~np.isfinite(losses)).tolist() == [[1, 3]]


def test_no_pass_holds_the_logits_of_the_sequence():
    length, vocabulary_size, embed_dim = 8192, 4096, 16
    stream = jax.ShapeDtypeStruct((1, length, embed_dim), jnp.float32)
    embedding = jax.ShapeDtypeStruct((vocabulary_size, embed_dim), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, length), jnp.float32)

    def temporary_bytes(compute):
        compiled = values_and_gradients.lower(compute, stream, embedding, targets, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logit_bytes = 4 * length * vocabulary_size
    assert temporary_bytes(plain_losses) > logit_bytes
    # A chunk's logits are a 256th; some copies of those, of the stream and of the embedding, each a 256th or less.
    assert temporary_bytes(chunked(512, 256)) < logit_bytes / 32
    # Chunks of the tokens alone, or of the vocabulary alone, hold a 16th: both axes are cut.
    assert temporary_bytes(chunked(512, vocabulary_size)) > logit_bytes / 32
    assert temporary_bytes(chunked(length, 256)) > logit_bytes / 32


@pytest.mark.parametrize("chunk_sizes", [(0, 5), (5, 0)])
def test_a_chunk_size_of_zero_is_refused(chunk_sizes):
    stream, embedding, targets, _ = draw("float32")
    with pytest.raises(ValueError, match=f"must be positive; got {chunk_sizes[0]} and {chunk_sizes[1]}"):
        chunked(*chunk_sizes)(stream, embedding, targets)
