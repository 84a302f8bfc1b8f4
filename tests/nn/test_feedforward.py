import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.nn.feedforward import blockwise_map


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def feedforward(parameters, x):
    scale, into, out = parameters
    normed = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * scale
    return jax.nn.gelu(normed @ into) @ out


def make_parameters(embed_dim, out_dim):
    return normal(1, (embed_dim,)), normal(2, (embed_dim, 4 * embed_dim)), normal(3, (4 * embed_dim, out_dim))


def loss(parameters, x, chunk_size):
    outputs = blockwise_map(lambda chunk, _: feedforward(parameters, chunk), [x], chunk_size)
    return jnp.sum(jnp.sin(outputs)), outputs


@pytest.mark.parametrize("chunk_size", [1, 5, 11, 22, 23])
def test_chunks_change_neither_values_nor_gradients(chunk_size):
    parameters, x = make_parameters(8, 6), normal(4, (3, 23, 8))

    def straight(parameters, x):
        outputs = feedforward(parameters, x)
        return jnp.sum(jnp.sin(outputs)), outputs

    expected_gradients, expected = jax.jit(jax.grad(straight, argnums=(0, 1), has_aux=True))(parameters, x)
    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    gradients, outputs = step(parameters, x, chunk_size)
    # Sums over 69 tokens come in another order: float32 rounding, relative to the largest entry.
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    for gradient, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


def test_bfloat16_stays_bfloat16():
    x = normal(5, (2, 7, 4)).astype(jnp.bfloat16)
    doubled = blockwise_map(lambda chunk, _: chunk * 2, [x], 3)
    assert doubled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(doubled, x * 2)


def test_the_wide_hidden_tensor_never_exists_in_either_pass():
    embed_dim, hidden_dim, length = 16, 1024, 8192
    parameters = (
        normal(1, (embed_dim,)),
        normal(2, (embed_dim, hidden_dim)),
        normal(3, (hidden_dim, embed_dim)),
    )
    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)

    def temporary_bytes(chunk_size):
        compiled = step.lower(parameters, normal(6, (1, length, embed_dim)), chunk_size).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    hidden_bytes = 4 * length * hidden_dim
    assert temporary_bytes(length) > hidden_bytes
    # A 32nd of it for each hidden tensor of a chunk, a 64th for each [B, S, D] tensor.
    assert temporary_bytes(256) < hidden_bytes / 4


def test_a_chunk_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="chunk_size must be positive; got 0"):
        blockwise_map(lambda chunk, _: chunk, [normal(7, (1, 4, 2))], 0)
