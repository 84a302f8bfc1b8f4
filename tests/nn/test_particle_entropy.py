import jax
import jax.numpy as jnp
import numpy as np

from bpt_rl.nn.particle_entropy import particle_entropy
from bpt_rl.nn.perceptron import apply_perceptron, init_perceptron
from bpt_rl.nn.running_moments import RunningMoments
from bpt_rl.nn.vectors import lengths, nearest_distances, unit_vectors


def pooled(batches):
    """URLB's running moments, written out: each batch's unbiased variance weighs as many values as it has."""
    mean, variance, count = 0.0, 1.0, 1e-4
    for batch in np.asarray(batches, np.float64):
        size = len(batch)
        delta = batch.mean() - mean
        squares = variance * count + batch.var(ddof=1) * size + delta**2 * count * size / (count + size)
        mean += delta * size / (count + size)
        count += size
        variance = squares / count
    return mean, variance, count


def test_running_moments_match_the_plain_formula():
    values = np.random.default_rng(0).normal([3.0, -1.0], [0.5, 20.0], (40, 7, 2)).astype(np.float32)
    moments = RunningMoments.create((2,))
    for batch in values:
        moments = moments.update(jnp.asarray(batch))
    for column in range(2):
        mean, variance, count = pooled(values[:, :, column])
        # Float32 over 40 batches.
        np.testing.assert_allclose(moments.mean[column], mean, rtol=1e-5)
        np.testing.assert_allclose(moments.variance[column], variance, rtol=1e-5)
        np.testing.assert_allclose(moments.num_values, count, rtol=1e-6)
    # Near those of all values at once, which know no batches.
    np.testing.assert_allclose(moments.mean, values.reshape(-1, 2).mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(moments.variance, values.reshape(-1, 2).var(axis=0), rtol=0.2)


def test_running_moments_take_equal_and_lone_values():
    moments = RunningMoments.create()
    for _ in range(3):
        moments = moments.update(jnp.full(1, 4.0))
    # Mean 0 and variance 1, of weight 1e-4, are all that differs from three fours: 1e-4 / 3 * (1 + 4^2).
    np.testing.assert_allclose(moments.mean, 4, rtol=1e-4)
    np.testing.assert_allclose(moments.variance, 17e-4 / 3, rtol=1e-3)


def brute_force_distances(x, y, num_neighbours):
    rows = []
    for a in np.asarray(x, np.float64):
        rows.append(sorted(float(np.sqrt(((a - b) ** 2).sum())) for b in np.asarray(y, np.float64)))
    return np.array(rows)[:, :num_neighbours]


def test_nearest_distances_match_brute_force_however_far_from_the_origin():
    generator = np.random.default_rng(1)
    x, y = (generator.normal(size=(n, 3)).astype(np.float32) + np.float32(1e4) for n in (5, 30))
    found = jax.jit(nearest_distances, static_argnums=2)(x, y, 4)
    # Differences of float32 numbers near 10,000 are exact; only squares and roots round.
    np.testing.assert_allclose(found, brute_force_distances(x, y, 4), rtol=1e-6)
    np.testing.assert_array_equal(nearest_distances(jnp.asarray(x), jnp.asarray(x), 1), np.zeros((5, 1)))


def test_particle_entropy_matches_brute_force_over_batches():
    generator = np.random.default_rng(2)
    moments, history = RunningMoments.create(), []
    for scale in (1.0, 5.0, 0.1):
        particles = (scale * generator.normal(size=(20, 4))).astype(np.float32)
        reward, moments = particle_entropy(jnp.asarray(particles), moments)
        distances = brute_force_distances(particles, particles, 12)
        history.append(distances.reshape(-1))
        normalized = np.maximum(distances / pooled(history)[0] - 1e-4, 0)
        np.testing.assert_allclose(reward, np.log(1 + normalized.mean(axis=1)), rtol=1e-5)


def test_particle_entropy_of_few_particles_takes_them_all():
    particles = jnp.asarray([[0.0], [1.0], [5.0]])
    reward, _ = particle_entropy(particles, RunningMoments.create())
    # Distances 0 1 5, 0 1 4 and 0 4 5, over their mean 20/9.
    expected = [np.log(1 + 9 / 20 * total / 3) for total in (6, 5, 9)]
    np.testing.assert_allclose(reward, expected, atol=1e-4)


def test_particle_entropy_of_equal_particles_is_zero():
    reward, moments = particle_entropy(jnp.ones((8, 3)), RunningMoments.create())
    np.testing.assert_array_equal(reward, np.zeros(8))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(moments))


def test_vectors_have_gradients_at_zero():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(lengths(x), [5, 0], rtol=1e-6)
    np.testing.assert_allclose(unit_vectors(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: lengths(x).sum())(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: (unit_vectors(x) * 2).sum())(x)).all()


def test_perceptron_is_matrix_products_with_relu_between_and_starts_orthogonal():
    layers = init_perceptron(jax.random.key(0), (3, 5, 4))
    for layer, (small, tall) in zip(layers, ((3, 5), (4, 5)), strict=True):
        kernel = np.asarray(layer.kernel)
        kernel = kernel if kernel.shape == (small, tall) else kernel.T
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(small), atol=1e-5)
        np.testing.assert_array_equal(layer.bias, 0)
    shifted = tuple(layer._replace(bias=layer.bias + 0.3) for layer in layers)
    x = np.random.default_rng(3).normal(size=(2, 3)).astype(np.float32)
    hidden = np.maximum(x @ np.asarray(layers[0].kernel) + 0.3, 0)
    expected = hidden @ np.asarray(layers[1].kernel) + 0.3
    np.testing.assert_allclose(apply_perceptron(shifted, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
