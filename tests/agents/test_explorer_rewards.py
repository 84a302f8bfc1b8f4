"""Each explorer's reward and loss against loops over rows in float64 that know nothing of its code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.agents.proto import sinkhorn


def dense(layers, x):
    """Perceptron of one vector."""
    for number, layer in enumerate(layers):
        x = np.asarray(layer.kernel, np.float64).T @ x + layer.bias
        if number < len(layers) - 1:
            x = np.maximum(x, 0)
    return x


def pooled(moments, values):
    """Mean and variance with more values; the batch's unbiased variance weighs as many as it has."""
    mean, variance, old = (np.asarray(x, np.float64) for x in moments)
    new, delta = len(values), values.mean(axis=0) - mean
    squares = variance * old + values.var(axis=0, ddof=1) * new + delta**2 * old * new / (old + new)
    return mean + delta * new / (old + new), squares / (old + new)


def entropy(particles, moments):
    distances = [sorted(np.linalg.norm(a - b) for b in particles)[:12] for a in particles]
    mean, _ = pooled(moments, np.concatenate(distances))
    return np.array([np.log(1 + np.mean([max(d / mean - 1e-4, 0) for d in row])) for row in distances])


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def unit(x):
    return x / np.linalg.norm(x)


def assign(scores):
    assigned = np.exp(scores)
    for _ in range(3):
        for column in assigned.T:
            column /= column.sum() * len(assigned.T)
        for row in assigned:
            row /= row.sum() * len(assigned)
    return assigned * len(assigned)


def rnd(before, after, batch, key):
    mean, variance = pooled(before.observation_moments, batch.observation)
    x = np.clip((batch.observation - mean) / np.sqrt(variance + 1e-5), -5, 5)
    assert np.abs(x).max() == 5

    def errors(predictor):
        return np.array([np.mean((dense(predictor, row) - dense(before.target, row)) ** 2) for row in x])

    error = errors(after.predictor)
    deviation = np.sqrt(pooled(before.error_moments, error)[1])
    return error / (deviation + 1e-8), errors(before.predictor).mean()


def icm(before, after, batch, key):
    def forward(models):
        rows = zip(batch.observation, batch.action, batch.next_observation, strict=True)
        return np.array([np.linalg.norm(n - dense(models.forward, np.append(o, a))) for o, a, n in rows])

    def backward(models):
        rows = zip(batch.observation, batch.action, batch.next_observation, strict=True)
        return np.mean(
            [np.linalg.norm(a - np.tanh(dense(models.backward, np.append(o, n)))) for o, a, n in rows]
        )

    loss = forward(before.models).mean() + backward(before.models)
    return np.log(1 + forward(after.models)), loss


def disagreement(before, after, batch, key):
    inputs = [np.append(o, a) for o, a in zip(batch.observation, batch.action, strict=True)]

    def predictions(models):
        each = [jax.tree.map(lambda x, m=m: x[m], models) for m in range(5)]
        return np.array([[dense(layers, x) for x in inputs] for layers in each])

    loss = np.mean(
        [np.linalg.norm(row) for p in predictions(before.models) for row in p - batch.next_observation]
    )
    return predictions(after.models).var(axis=0, ddof=1).mean(axis=-1), loss


def icm_apt(before, after, batch, key):
    def features(networks, rows):
        linear = [dense(networks.trunk, row) for row in rows]
        normalized = [(x - x.mean()) / np.sqrt(x.var() + 1e-5) for x in linear]
        return [np.tanh(networks.scale * x + networks.offset) for x in normalized]

    now, following = (features(before.networks, x) for x in (batch.observation, batch.next_observation))
    loss = 0
    for f, a, n in zip(now, batch.action, following, strict=True):
        loss += np.linalg.norm(n - dense(before.networks.forward, np.append(f, a))) / len(now)
        loss += np.linalg.norm(a - np.tanh(dense(before.networks.backward, np.append(f, n)))) / len(now)
    return entropy(np.array(features(after.networks, batch.observation)), before.distance_moments), loss


def proto(before, after, batch, key):
    prototypes = np.asarray(before.networks.prototypes, np.float64)
    targets = np.array([unit(dense(before.target, row)) for row in batch.next_observation])
    loss = 0
    for row, share in zip(batch.observation, assign(targets @ prototypes.T / 0.1), strict=True):
        projected = unit(dense(before.networks.projector, dense(before.networks.predictor, row)))
        loss -= (share * log_softmax(prototypes @ projected / 0.1)).sum() / len(targets)
    features = [unit(dense(after.networks.predictor, row)) for row in batch.next_observation]
    return np.array([np.sort(np.linalg.norm(after.queue - f, axis=1))[2] for f in features]), loss


def diayn(before, after, batch, key):
    def logs(discriminator):
        rows = [log_softmax(dense(discriminator, row)) for row in batch.next_observation]
        return np.array([row[z.argmax()] for row, z in zip(rows, batch.skill, strict=True)])

    return logs(after.discriminator) - np.log(1 / 16), -logs(before.discriminator).mean()


def aps(before, after, batch, key):
    def features(network):
        return np.array([dense(network, row) for row in batch.next_observation])

    def products(network):
        return np.array([z @ unit(f) for z, f in zip(batch.skill, features(network), strict=True)])

    reward = entropy(features(after.feature_network), before.distance_moments) + products(
        after.feature_network
    )
    return reward, -products(before.feature_network).mean()


def smm(before, after, batch, key):
    noise = np.asarray(jax.random.normal(key, (len(batch.skill), 128)), np.float64)
    loss, reward = 0, []
    for o, z, e in zip(batch.observation, batch.skill, noise, strict=True):
        x = np.append(o, z)
        mean, log_variance = np.split(dense(before.autoencoder.encoder, x), 2)
        squared = (dense(before.autoencoder.decoder, mean + e * np.exp(log_variance / 2)) - x) ** 2
        divergence = -0.5 * (1 + log_variance - mean**2 - np.exp(log_variance)).sum()
        recognised = log_softmax(dense(before.discriminator, o))[z.argmax()]
        loss += (0.5 * divergence + squared.mean() - recognised) / len(noise)
        reward.append(squared.sum() - np.log(1 / 4) + recognised)
    return np.array(reward), loss


REFERENCES = (rnd, icm, disagreement, icm_apt, proto, diayn, aps, smm)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.__name__)
def test_reward_and_loss_match_a_plain_reference(explorers, reference):
    name = reference.__name__
    # With six observations, prototypes would draw each of them three times: the reward would be 0 everywhere.
    size = 600 if name == "proto" else 6
    step, state = explorers.step(name), explorers.start(name)
    for seed in range(2 if name == "proto" else 9):
        state = step(state, explorers.batch(name, seed, size), seed)[0]
    batch = explorers.batch(name, 20, size)
    # One observation far from all others.
    batch = batch._replace(observation=batch.observation.at[2, 1].set(40.0))
    after, reward, metrics = step(state, batch, 5)
    expected, loss = reference(
        *(jax.tree.map(np.asarray, x) for x in (state, after)),
        jax.tree.map(lambda x: np.asarray(x, np.float64), batch),
        jax.random.key(5),
    )
    assert np.ptp(expected) > 1e-3
    # Float32 through three layers, and differences of what they give.
    np.testing.assert_allclose(reward, expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(metrics["explorer_loss"], loss, rtol=2e-4)


def test_three_iterations_of_sinkhorn_match_loops_far_from_convergence():
    scores = np.random.default_rng(0).uniform(-10, 10, (6, 4)).astype(np.float32)
    expected = assign(scores.astype(np.float64))
    assert np.ptp(expected.sum(axis=0)) > 0.01
    np.testing.assert_allclose(sinkhorn(jnp.asarray(scores)), expected, rtol=1e-4)
