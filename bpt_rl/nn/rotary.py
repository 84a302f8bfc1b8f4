"""Rotary position embedding that stays exact at positions in the millions."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_LOW_BITS = 8
MAX_POSITION = 1 << (32 - _LOW_BITS)
"""Positions must be smaller in magnitude: 16,777,216 tokens."""


def apply_rotary(
    x: Float[Array, "B S H K"], positions: Int[Array, "B S"], base: float = 10000.0
) -> Float[Array, "B S H K"]:
    """Returns `x` with each pair of entries turned by its position times the pair's frequency.

    Half-split pairs: entry k goes with entry k + K/2 and turns by position * base^(-2k/K) radians. The
    rotation is computed in float32 (float64 for float64 `x`); the result has the type of `x`. Angles are
    right within 6e-6 radians at 2 million tokens, and a dot product of two rotated vectors depends on their
    distance alone, up to float32 rounding.

    Args:
      x: Queries or keys; K even.
      positions: Token index within the context, smaller in magnitude than `MAX_POSITION`; not checked.
      base: Slowest pairs turn about once in 2 pi * base tokens.

    Raises:
      ValueError: If K is odd.

    Source: Su et al. 2021 (RoFormer), section 3.4.
    """
    half_dim, rest = divmod(x.shape[-1], 2)
    if rest:
        raise ValueError(f"head_dim must be even; got {x.shape[-1]}. Rotary positions turn pairs of entries.")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angle = _angles(positions, half_dim, base)[:, :, None, :].astype(dtype) * (math.pi / 2**31)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _angles(positions: Array, half_dim: int, base: float) -> Array:
    """Returns int32 angles [B, S, half_dim] in units of 2^-32 turns, whole turns dropped.

    At position 1,000,000 a float32 angle is only known to 0.06 radians. Integer products wrap around at
    whole turns by themselves, so nothing is lost: each frequency is a 32-bit fraction of a turn a token, plus
    8 further bits whose product must not overflow.
    """
    turns = base ** (-np.arange(half_dim) / half_dim) / (2 * np.pi) * 2.0**32
    high = np.round(turns)
    low = np.round((turns - high) * 2**_LOW_BITS)
    position = positions.astype(jnp.int32)[..., None]
    angle: Array = position * high.astype(np.int32) + (position * low.astype(np.int32) >> _LOW_BITS)
    return angle
