"""Losses, gradients and targets of the TD agents beside plain NumPy in float64, and beside numbers worked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.agents.base import OfflineLearner, Policy
from bpt_rl.agents.cql import CQL, sample_actions
from bpt_rl.agents.crr import CRR
from bpt_rl.agents.iql import IQL, log_likelihood
from bpt_rl.agents.registry import make_learner
from bpt_rl.agents.td3 import TD3
from bpt_rl.agents.td3_bc import TD3BC
from bpt_rl.datasets.transitions import TransitionBatch
from bpt_rl.td_config import TD_AGENTS, CQLConfig, CRRConfig, IQLConfig, TDConfig

CLASSES = {"td3": TD3, "td3_bc": TD3BC, "crr": CRR, "cql": CQL, "iql": IQL}
O, A, B = 3, 2, 5  # noqa: E741
CONFIG = TDConfig(hidden_dim=4, learning_rate=1e-2, target_rate=0.25, discount=0.9)
VARIANTS = {
    "td3": CONFIG,
    "td3_bc": CONFIG,
    "crr": CONFIG,
    "crr exp": dataclasses.replace(CONFIG, crr=CRRConfig(weight="exp", num_value_samples=3)),
    "crr identity": dataclasses.replace(CONFIG, crr=CRRConfig(weight="identity", num_value_samples=3)),
    "cql": dataclasses.replace(CONFIG, cql=CQLConfig(alpha=0.5, num_samples=2)),
    "cql lagrangian": dataclasses.replace(CONFIG, cql=CQLConfig(is_lagrangian=True, target_penalty=2.0)),
    "iql": dataclasses.replace(CONFIG, iql=IQLConfig(temperature=2.0, max_weight=5.0)),
}


def fixed_normal(key, shape):
    """Stands for the normal distribution: whoever knows the shape knows the numbers."""
    return jnp.asarray(plain_normal(shape), jnp.float32)


def fixed_uniform(key, shape, *, minval, maxval):
    assert (minval, maxval) == (-1.0, 1.0)
    return jnp.asarray(plain_uniform(shape), jnp.float32)


def plain_normal(shape):
    return 2 * np.sin(1 + np.arange(np.prod(shape))).reshape(shape)


def plain_uniform(shape):
    return np.cos(3 * np.arange(np.prod(shape))).reshape(shape)


def random_batch():
    generator = np.random.default_rng(0)
    arrays = TransitionBatch(
        observation=generator.normal(size=(B, O)),
        action=generator.uniform(-0.9, 0.9, (B, A)),
        reward=generator.normal(size=B),
        discount=np.array([0.9, 0.9, 0.81, 0.9, 0.9]),
        next_observation=generator.normal(size=(B, O)),
    )
    return jax.tree.map(np.float32, arrays)


def random_state(learner, scale):
    """With biases, a target of its own, and critics so steep that all branches of the weights are met."""
    generator = np.random.default_rng(1)
    state = jax.jit(learner.init)(jax.random.key(0))
    state = jax.tree.map(
        lambda x: (
            np.asarray(x + 0.3 * generator.normal(size=x.shape)).astype(x.dtype)
            if x.dtype == np.float32
            else np.asarray(x)
        ),
        state,
    )
    moments = {
        name: jax.tree.map(np.zeros_like, part.moments)
        for name, part in state._asdict().items()
        if name != "target"
    }
    state = state._replace(**{name: getattr(state, name)._replace(moments=m) for name, m in moments.items()})
    for critic in (state.critic.params, state.target):
        critic["head"]["kernel"] *= np.float32(scale)
    return state


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def network(p, x):
    x = x @ p["trunk"]["kernel"] + p["trunk"]["bias"]
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    x = np.tanh(x * p["trunk"]["scale"] + p["trunk"]["shift"])
    x = np.maximum(x @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
    return x @ p["head"]["kernel"] + p["head"]["bias"]


def both(critic, observation, action):
    """Values of the two critics, one above the other."""
    x = np.concatenate([observation, action], axis=-1)
    return np.stack([network(jax.tree.map(lambda p, k=k: p[k], critic), x)[..., 0] for k in range(2)])


def noisy(actor, observation, shape):
    mean = np.tanh(network(actor, observation))
    action = mean + np.clip(CONFIG.noise * plain_normal(shape), -CONFIG.noise_clip, CONFIG.noise_clip)
    # Clipping has no gradient of its own here: it moves the action, as a constant.
    return mean, action, np.clip(action, -1 + 1e-6, 1 - 1e-6) - action


def squared_errors(critic, batch, target):
    values = both(critic, batch.observation, batch.action)
    return sum(((values[k] - target) ** 2).mean() for k in range(2))


def squashed(actor, observation, shape):
    mean, log_std = np.split(network(actor, observation), 2, axis=-1)
    log_std, noise = np.clip(log_std, -10, 2), plain_normal(shape)
    action = np.tanh(mean + np.exp(log_std) * noise)
    gaussian = -(noise**2) / 2 - log_std - np.log(2 * np.pi) / 2
    return action, (gaussian - np.log(1 - action**2)).sum(axis=-1)


def td3_target(before, batch):
    _, action, correction = noisy(before.actor.params, batch.next_observation, (B, A))
    values = both(before.target, batch.next_observation, action + correction)
    return batch.reward + batch.discount * np.minimum(*values)


def td3_losses(before, after, batch, config):
    target = td3_target(before, batch)
    _, _, correction = noisy(before.actor.params, batch.observation, (B, A))

    def actor(params):
        _, action, _ = noisy(params, batch.observation, (B, A))
        return -np.minimum(*both(after.critic.params, batch.observation, action + correction)).mean()

    return {"critic": lambda params: squared_errors(params, batch, target), "actor": actor}


def td3_bc_losses(before, after, batch, config):
    losses = td3_losses(before, after, batch, config)
    _, action, correction = noisy(before.actor.params, batch.observation, (B, A))
    size = np.abs(np.minimum(*both(after.critic.params, batch.observation, action + correction))).mean()

    def actor(params):
        mean = np.tanh(network(params, batch.observation))
        return 2.5 / size * losses["actor"](params) + ((mean - batch.action) ** 2).mean()

    return {"critic": losses["critic"], "actor": actor}


def crr_losses(before, after, batch, config):
    losses, crr = td3_losses(before, after, batch, config), config.crr
    samples = np.broadcast_to(batch.observation, (crr.num_value_samples, B, O))
    _, action, correction = noisy(before.actor.params, samples, (crr.num_value_samples, B, A))
    own = np.minimum(*both(after.critic.params, samples, action + correction)).mean(axis=0)
    advantage = np.minimum(*both(after.critic.params, batch.observation, batch.action)) - own
    assert advantage.min() < 0 < advantage.max()
    weight = {
        "indicator": np.where(advantage > 0, 1.0, 0.0),
        "exp": np.minimum(np.exp(advantage), 20),
        "identity": advantage,
    }[crr.weight]
    assert crr.weight != "exp" or (weight == 20).any()

    def actor(params):
        deviation = (batch.action - np.tanh(network(params, batch.observation))) / 0.2
        density = np.exp(-(deviation**2) / 2) / (0.2 * np.sqrt(2 * np.pi))
        return -(weight * np.log(density).sum(axis=-1)).mean()

    return {"critic": losses["critic"], "actor": actor}


def penalty_of(critic, batch, candidates):
    values = [both(critic, batch.observation, action) for action in [*candidates, batch.action]]
    return (np.log(np.exp(values).sum(axis=0)) - values[-1]).mean(axis=1).sum()


def cql_losses(before, after, batch, config):
    cql, actor_before = config.cql, before.actor.params
    action, _ = squashed(actor_before, batch.next_observation, (B, A))
    target = batch.reward + batch.discount * np.minimum(*both(before.target, batch.next_observation, action))
    shape = (cql.num_samples, B, A)
    candidates = [*plain_uniform(shape)]
    for observation in (batch.observation, batch.next_observation):
        candidates += [
            *squashed(actor_before, np.broadcast_to(observation, (cql.num_samples, B, O)), shape)[0]
        ]
    alpha = np.exp(after.log_alpha.params) if cql.is_lagrangian else cql.alpha
    excess = penalty_of(before.critic.params, batch, candidates) - cql.target_penalty
    _, log_density = squashed(actor_before, batch.observation, (B, A))
    surplus = (log_density - A).mean()

    def critic(params):
        return squared_errors(params, batch, target) + alpha * penalty_of(params, batch, candidates)

    def actor(params):
        action, log_density = squashed(params, batch.observation, (B, A))
        values = np.minimum(*both(after.critic.params, batch.observation, action))
        return (np.exp(after.log_temperature.params) * log_density - values).mean()

    losses = {"critic": critic, "actor": actor, "log_temperature": lambda log: -log * surplus}
    if cql.is_lagrangian:
        losses["log_alpha"] = lambda log: -np.exp(log) * excess / 2
    return losses


def iql_losses(before, after, batch, config):
    best = np.minimum(*both(before.target, batch.observation, batch.action))
    new_value = network(after.value.params, batch.observation)[:, 0]
    weight = np.minimum(np.exp(2.0 * (best - new_value)), 5.0)
    assert weight.min() < 5 == weight.max()
    target = batch.reward + batch.discount * network(after.value.params, batch.next_observation)[:, 0]

    def value(params):
        difference = best - network(params, batch.observation)[:, 0]
        return np.mean([d * d * (0.7 if d > 0 else 0.3) for d in difference])

    def actor(params):
        std = np.exp(params.log_std)
        deviation = (batch.action - np.tanh(network(params.network, batch.observation))) / std
        density = np.exp(-(deviation**2) / 2) / (std * np.sqrt(2 * np.pi))
        return -(weight * np.log(density).sum(axis=-1)).mean()

    return {"critic": lambda p: squared_errors(p, batch, target), "value": value, "actor": actor}


LOSSES = {"td3": td3_losses, "td3_bc": td3_bc_losses, "crr": crr_losses, "cql": cql_losses, "iql": iql_losses}


def numeric_gradient(loss, params):
    """Central differences, entry by entry."""
    leaves, structure = jax.tree.flatten(params)
    gradients = []
    for i, leaf in enumerate(leaves):
        gradient = np.zeros_like(leaf)
        for place in np.ndindex(leaf.shape):
            around = []
            for step in (1e-6, -1e-6):
                moved = [np.array(x) for x in leaves]
                moved[i][place] += step
                around.append(loss(jax.tree.unflatten(structure, moved)))
            gradient[place] = (around[0] - around[1]) / 2e-6
        gradients.append(gradient)
    return gradients


def update_once(learner, state, batch, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "normal", fixed_normal)
        patch.setattr(jax.random, "uniform", fixed_uniform)
        return jax.jit(learner.update)(state, batch, jax.random.key(0))


def test_every_name_is_tested():
    assert set(CLASSES) == set(LOSSES) == set(TD_AGENTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_descends_each_loss_by_its_own_gradient_alone(variant, monkeypatch):
    name, config = variant.split()[0], VARIANTS[variant]
    learner, batch = make_learner(name, config, O, A), random_batch()
    before = random_state(learner, scale=16.0 if variant == "crr exp" else 1.0)
    after, metrics = update_once(learner, before, batch, monkeypatch)
    losses = LOSSES[name](double(before), double(after), double(batch), config)
    for part, loss in losses.items():
        old, new = getattr(before, part), getattr(after, part)
        if f"{part}_loss" in metrics:
            # float32 against float64.
            np.testing.assert_allclose(metrics[f"{part}_loss"], loss(double(old.params)), rtol=2e-5)
        # Adam's first moment after its first step is a tenth of the gradient.
        gradients = [10 * np.asarray(m) for m in jax.tree.leaves(new.moments[0].mu)]
        expected = numeric_gradient(loss, double(old.params))
        largest = max(np.abs(gradient).max() for gradient in expected)
        assert largest > 1e-3
        for found, gradient in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(found, gradient, atol=1e-4 * largest)
        for p, q, g in zip(*(jax.tree.leaves(x) for x in (old.params, new.params, gradients)), strict=True):
            np.testing.assert_allclose(q, p - config.learning_rate * g / (np.abs(g) + 1e-8), atol=1e-5)
    expected = jax.tree.map(lambda t, c: 0.75 * t + 0.25 * c, before.target, after.critic.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.target, expected)
    if name == "cql" and not config.cql.is_lagrangian:
        assert after.log_alpha.params == before.log_alpha.params


HAND = {
    # y = (1 + 0.9 * 2, 0.9 * 2): (1 - y)^2 and (4 - y)^2 have means 1.94 and 3.14.
    "td3": ({"critic_loss": 5.08, "actor_loss": -1.0, "value": 2.3}, {}),
    # -2.5 * 1 / 1 + 0.5^2.
    "td3_bc": ({"critic_loss": 5.08, "actor_loss": -2.25, "value": 2.3}, {}),
    # No action is better than another.
    "crr": ({"critic_loss": 5.08, "actor_loss": 0.0, "weight": 0.0}, {}),
    # 0.5^2 / (2 * 0.2^2) + log(0.2) + log(2 pi) / 2.
    "crr exp": ({"actor_loss": 2.434501, "weight": 1.0}, {"crr": CRRConfig(weight="exp")}),
    # 5.08 + 0.01 * 2 * log(10); -log(2 pi) / 2 - 1, the density of the normal distribution at its mean.
    "cql": ({"critic_loss": 5.126052, "actor_loss": -1.918939, "penalty": 4.605170, "entropy": 0.918939}, {}),
    # Q' = 2 and V = 1.5: 0.7 * 0.5^2; y = (1 + 0.9 * 1.5, 0.9 * 1.5): (2.35, 1.35).
    # exp(3 * 0.5) * (0.5^2 / 2 + log(2 pi) / 2).
    "iql": (
        {"value_loss": 0.175, "critic_loss": 5.845, "actor_loss": 4.678608, "weight": 4.481689},
        {},
    ),
    "iql clipped": ({"weight": 2.0, "actor_loss": 2.087877}, {"iql": IQLConfig(max_weight=2.0)}),
}


@pytest.mark.parametrize("case", HAND)
def test_losses_are_those_worked_out_by_hand(case, monkeypatch):
    """Networks that say the same of everything: critics 1 and 4, targets 2 and 3, values 1.5, actions 0."""
    numbers, changes = HAND[case]
    config = TDConfig(hidden_dim=2, learning_rate=1e-9, **changes)
    learner = make_learner(case.split()[0], config, 1, 1)
    state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(learner.init, jax.random.key(0))
    )
    state.critic.params["head"]["bias"][:] = [[1.0], [4.0]]
    state.target["head"]["bias"][:] = [[2.0], [3.0]]
    if "iql" in case:
        state.value.params["head"]["bias"][:] = 1.5
    batch = TransitionBatch(
        observation=np.zeros((2, 1), np.float32),
        action=np.array([[0.5], [-0.5]], np.float32),
        reward=np.array([1.0, 0.0], np.float32),
        discount=np.full(2, 0.9, np.float32),
        next_observation=np.zeros((2, 1), np.float32),
    )
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape))
        _, metrics = jax.jit(learner.update)(state, batch, jax.random.key(0))
    for name, number in numbers.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TD_AGENTS)
def test_learners_and_their_policies_meet_the_protocols(name):
    learner = make_learner(name, CONFIG, O, A)
    assert type(learner) is CLASSES[name]
    assert isinstance(learner, OfflineLearner)
    state = random_state(learner, scale=1.0)
    policy = learner.policy(state)
    assert isinstance(policy, Policy)
    observation = random_batch().observation
    actor = double(state.actor.params)
    mean = network(actor.network if name == "iql" else actor, observation)
    _, action = policy.act(policy.start(B), observation, np.zeros(B))
    # float32.
    np.testing.assert_allclose(action, np.tanh(mean[:, :A]), atol=1e-6)


def test_deviations_stay_within_bounds():
    batch = random_batch()
    actor = random_state(IQL(CONFIG, O, A), scale=1.0).actor.params
    likelihood = jax.jit(log_likelihood)
    for extreme, bound in ((-50.0, -5.0), (9.0, 2.0)):
        found, expected = (
            likelihood(actor._replace(log_std=np.full(A, log_std, np.float32)), batch)
            for log_std in (extreme, bound)
        )
        np.testing.assert_array_equal(found, expected)
    actor = random_state(CQL(CONFIG, O, A), scale=1.0).actor.params
    sample = jax.jit(sample_actions)
    for extreme, bound in ((-90.0, -10.0), (90.0, 2.0)):
        actor["head"]["kernel"][:, A:], found = 0, []
        for log_std in (extreme, bound):
            actor["head"]["bias"][A:] = log_std
            found.append(sample(actor, batch.observation, jax.random.key(0)))
        jax.tree.map(np.testing.assert_array_equal, *found)


def test_two_critics_have_no_parameter_in_common():
    state = jax.jit(TD3(CONFIG, O, A).init)(jax.random.key(0))
    for leaf, twin in zip(jax.tree.leaves(state.critic.params), jax.tree.leaves(state.target), strict=True):
        np.testing.assert_array_equal(leaf, twin)
    for layer in state.critic.params.values():
        one, other = layer["kernel"]
        assert np.abs(one - other).max() > 0.1
        size = min(one.shape)
        square = one.T @ one if one.shape[1] == size else one @ one.T
        np.testing.assert_allclose(square, np.eye(size), atol=1e-5)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"discount must lie in \(0, 1\]; got 1\.5"):
        TDConfig(discount=1.5)
    with pytest.raises(ValueError, match=r"expectile must lie in \(0, 1\); got 1\.0"):
        IQLConfig(expectile=1.0)
    with pytest.raises(ValueError, match="num_value_samples must be positive; got 0"):
        CRRConfig(num_value_samples=0)
