import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.nn.rotary import apply_rotary

# float32 rounding of a sum of 64 products of size one.
FLOAT32_TOLERANCE = 2e-5


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rotate_in_float64(x, positions, base):
    """The formula of the paper, as complex numbers."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * np.asarray(positions)[..., None, None] * frequency
    )
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("start", [0, 999_990, 2_000_000, 2**24 - 30])
def test_rotary_matches_the_formula_in_float64_at_any_position(start):
    x = normal(0, (2, 30, 3, 64))
    positions = start + jnp.broadcast_to(jnp.arange(30), (2, 30))
    rotated = apply_rotary(x, positions)
    # The largest entry is about 4; angles are right within 2^-41 turns a token: 6e-6 at 2M and 5e-5 at 16M.
    tolerance = 4 * 2 * np.pi * (start + 30) * 2.0**-41 + 5e-6
    np.testing.assert_allclose(rotated, rotate_in_float64(x, positions, 10000.0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("base", [100.0, 5e6])
def test_rotary_matches_the_formula_at_another_base(base):
    x, positions = normal(1, (1, 5, 1, 8)), jnp.asarray([[0, 1, 7, 4096, 131_071]])
    expected = rotate_in_float64(x, positions, base)
    np.testing.assert_allclose(apply_rotary(x, positions, base), expected, atol=FLOAT32_TOLERANCE)


def test_rotary_of_position_zero_is_the_identity():
    x = normal(2, (2, 4, 1, 16))
    np.testing.assert_array_equal(apply_rotary(x, jnp.zeros((2, 4), jnp.int32)), x)


def test_dot_product_of_rotated_vectors_depends_on_distance_alone_a_million_tokens_away():
    query, key = normal(3, (1, 40, 1, 64)), normal(4, (1, 40, 1, 64))
    positions = jnp.asarray(np.random.default_rng(5).integers(0, 4000, (1, 40)), jnp.int32)

    def logits(offset):
        turned_query, turned_key = (
            apply_rotary(query, positions + offset),
            apply_rotary(key, positions + offset),
        )
        return np.einsum(
            "bshk,bthk->bhst", np.asarray(turned_query, np.float64), np.asarray(turned_key, np.float64)
        )

    near = logits(0)
    assert np.abs(near).max() > 10
    for offset in (1, 1_000_000, 2_000_000):
        np.testing.assert_allclose(logits(offset), near, rtol=0, atol=FLOAT32_TOLERANCE)


def test_rotary_keeps_norms_and_its_gradient_turns_back():
    x, positions = normal(6, (1, 7, 2, 8)), jnp.arange(7)[None] * 1000
    rotated, pullback = jax.vjp(lambda x: apply_rotary(x, positions), x)
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(pullback(rotated)[0], x, atol=FLOAT32_TOLERANCE)


def test_rotary_in_bfloat16_is_the_float32_result_rounded_once():
    x, positions = normal(7, (1, 6, 2, 16), jnp.bfloat16), 500_000 + jnp.arange(6)[None]
    rotated = apply_rotary(x, positions)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        rotated, apply_rotary(x.astype(jnp.float32), positions).astype(jnp.bfloat16)
    )


def test_rotary_refuses_an_odd_head_dim():
    with pytest.raises(ValueError, match="head_dim must be even; got 5"):
        apply_rotary(normal(8, (1, 2, 1, 5)), jnp.zeros((1, 2), jnp.int32))
