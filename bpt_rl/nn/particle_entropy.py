"""Entropy of a batch, seen as particles: how far each lies from its nearest neighbours."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bpt_rl.nn.running_moments import RunningMoments
from bpt_rl.nn.vectors import nearest_distances

NUM_NEIGHBOURS = 12
"""The nearest is the particle itself, at distance 0."""
DISTANCE_CLIP = 1e-4
"""Taken off each normalised distance, down to 0."""


def particle_entropy(
    particles: Float[jax.Array, "B D"], moments: RunningMoments
) -> tuple[Float[jax.Array, "B"], RunningMoments]:
    """Returns log(1 + mean of each particle's distances to its nearest neighbours), and the moments.

    Distances are divided by the mean of all distances so far, this batch's included.

    Args:
      particles: At least 2. All are neighbours where there are fewer than `NUM_NEIGHBOURS`.
      moments: Of the distances; from `RunningMoments.create()`.

    Source: Liu and Abbeel 2021 (Behavior From the Void); URLB's settings, by which a particle counts as one
    of its own neighbours.
    """
    distances = nearest_distances(particles, particles, min(NUM_NEIGHBOURS, len(particles)))
    moments = moments.update(distances.reshape(-1))
    # 0 where no two particles ever differed; all distances are 0 then.
    normalized = distances / jnp.maximum(moments.mean, jnp.finfo(jnp.float32).tiny)
    return jnp.log1p(jnp.maximum(normalized - DISTANCE_CLIP, 0).mean(axis=-1)), moments
