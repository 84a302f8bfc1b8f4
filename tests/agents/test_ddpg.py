import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.agents.ddpg import DDPG
from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.types import Transition

OBSERVATION, ACTION, B, WIDTH = 3, 2, 4, 8
CONFIG = ExplorationConfig(hidden_dim=WIDTH, learning_rate=1e-2, target_rate=0.25)
# So little that a float32 action is the same with it.
CALM = dataclasses.replace(CONFIG, noise=1e-12)


@dataclasses.dataclass
class Skills:
    """What the learner must know of an explorer."""

    skill_dim: int = 0
    skill_steps: int = 0
    has_successor_features: bool = False

    def init(self, key):
        raise NotImplementedError

    draw_skills = update = init


def batch_of(skill_dim, num_rows=B):
    generator = np.random.default_rng(0)

    def normal(size):
        return generator.normal(size=(num_rows, size)).astype(np.float32)

    return Transition(
        observation=normal(OBSERVATION),
        action=np.tanh(normal(ACTION)),
        discount=np.full(num_rows, 0.9**2, np.float32),
        next_observation=normal(OBSERVATION),
        skill=normal(skill_dim),
    )


def fresh(learner, seed):
    """In NumPy's arrays, which nothing is compiled for."""
    return jax.tree.map(np.asarray, jax.jit(learner.init)(jax.random.key(seed)))


def layer_norm(x):
    return (x - x.mean()) / jnp.sqrt(jnp.mean((x - x.mean()) ** 2) + 1e-5)


def plain_trunk(trunk, x):
    return jnp.tanh(layer_norm(x @ trunk["kernel"] + trunk["bias"]) * trunk["scale"] + trunk["shift"])


def plain_action(actor, observation, skill):
    hidden = plain_trunk(actor["trunk"], jnp.concatenate([observation, skill]))
    hidden = jnp.maximum(hidden @ actor["hidden"]["kernel"] + actor["hidden"]["bias"], 0)
    return jnp.tanh(hidden @ actor["head"]["kernel"] + actor["head"]["bias"])


def plain_values(critic, observation, action, skill, features):
    trunk = plain_trunk(critic["trunk"], jnp.concatenate([observation, skill, action]))
    values = []
    for k in range(2):
        hidden = jnp.maximum(trunk @ critic["hidden"]["kernel"][k] + critic["hidden"]["bias"][k], 0)
        head = hidden @ critic["head"]["kernel"][k] + critic["head"]["bias"][k]
        values.append(head @ skill if features else head[0])
    return values


def after_a_first_adam_step(params, loss):
    """Adam's first step, by its formula: moments are the gradient and its square once the bias is out."""
    gradient = jax.jit(jax.grad(loss))(params)
    return jax.tree.map(lambda p, g: p - CONFIG.learning_rate * g / (np.abs(g) + 1e-8), params, gradient)


def all_close(tree, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, expected)


@pytest.mark.parametrize(("skill_dim", "features"), [(2, False), (3, True)])
def test_an_update_moves_each_network_by_its_own_loss_alone(skill_dim, features):
    learner = DDPG(CALM, OBSERVATION, ACTION, Skills(skill_dim, has_successor_features=features))
    state = fresh(learner, 0)
    # Of its own, so that a target from the wrong network is seen.
    state = state._replace(target=fresh(learner, 1).critic)
    batch, reward = batch_of(skill_dim), jnp.arange(B, dtype=jnp.float32)
    updated, metrics = jax.jit(learner.update)(state, batch, reward, jax.random.key(2))

    def target(row, reward):
        action = plain_action(state.actor, row.next_observation, row.skill)
        values = plain_values(state.target, row.next_observation, action, row.skill, features)
        return reward + row.discount * jnp.minimum(*values)

    def critic_loss(critic):
        def errors(row, target):
            return [
                v - target for v in plain_values(critic, row.observation, row.action, row.skill, features)
            ]

        return sum(jnp.mean(error**2) for error in jax.vmap(errors)(batch, targets))

    def actor_loss(actor):
        def value(row):
            action = plain_action(actor, row.observation, row.skill)
            return jnp.minimum(*plain_values(updated.critic, row.observation, action, row.skill, features))

        return -jax.vmap(value)(batch).mean()

    targets = jax.jit(jax.vmap(target))(batch, reward)
    # float32 in another order; Adam's first step divides the gradient by its own size.
    all_close(updated.critic, after_a_first_adam_step(state.critic, critic_loss), atol=1e-4)
    all_close(updated.actor, after_a_first_adam_step(state.actor, actor_loss), atol=1e-4)
    all_close(
        updated.target,
        jax.tree.map(lambda t, c: 0.75 * t + 0.25 * c, state.target, updated.critic),
        atol=1e-6,
    )
    np.testing.assert_allclose(metrics["critic_loss"], critic_loss(state.critic), rtol=1e-5)
    np.testing.assert_allclose(metrics["actor_loss"], actor_loss(state.actor), rtol=1e-5)


def test_targets_are_those_worked_out_by_hand():
    """The trunk turns the sign of the action into (t, -t) or (-t, t), t = tanh(1); see the heads below."""
    learner = DDPG(dataclasses.replace(CONFIG, hidden_dim=2), 1, 1, Skills())
    zeros = jax.tree.map(np.zeros_like, fresh(learner, 0))
    actor = zeros.actor | {"head": zeros.actor["head"] | {"bias": jnp.array([-3.0])}}
    target = {
        "trunk": {
            "kernel": jnp.array([[0.0, 0.0], [1000.0, -1000.0]]),
            "bias": jnp.zeros(2),
            "scale": jnp.ones(2),
            "shift": jnp.zeros(2),
        },
        "hidden": {"kernel": jnp.stack([jnp.eye(2)] * 2), "bias": jnp.zeros((2, 2))},
        # After an action below 0: 0.5 - t from the first, 4 t from the second.
        "head": {
            "kernel": jnp.array([[[2.0], [-1.0]], [[1.0], [4.0]]]),
            "bias": jnp.array([[0.5], [0.0]]),
        },
    }
    state = zeros._replace(actor=actor, target=target)
    one = jnp.ones((1, 1))
    batch = Transition(
        observation=one, action=one, discount=jnp.array([0.81]), next_observation=one, skill=jnp.zeros((1, 0))
    )
    targets = jax.jit(learner.targets)(state, batch, jnp.array([2.0]), jax.random.key(0))
    # 2 + 0.81 (0.5 - 0.761594); the action is tanh(-3) and at most 0.3 more.
    np.testing.assert_allclose(targets, [1.788109], rtol=1e-5)


def test_noise_in_targets_is_clipped():
    config = dataclasses.replace(CONFIG, noise=1e6, noise_clip=0.3)
    learner = DDPG(config, OBSERVATION, 1, Skills())
    state = fresh(learner, 0)
    batch = jax.tree.map(lambda x: np.tile(x[:1], (32, 1)[: x.ndim]), batch_of(0))
    batch = batch._replace(action=batch.action[:, :1])
    targets = jax.jit(learner.targets)(state, batch, jnp.zeros(32), jax.random.key(1))
    observation, skill = batch.next_observation[0], batch.skill[0]
    mean = plain_action(state.actor, observation, skill)
    expected = [
        0.81 * min(plain_values(state.target, observation, jnp.clip(mean + noise, -1, 1), skill, False))
        for noise in (-0.3, 0.3)
    ]
    distance = np.abs(np.asarray(targets)[:, None] - np.array(expected))
    # float32; both sides of the noise are met.
    assert distance.min(axis=1).max() < 1e-5
    assert set(distance.argmin(axis=1)) == {0, 1}


def test_actions_are_noisy_means_within_bounds_or_uniform():
    learner = DDPG(CONFIG, OBSERVATION, ACTION, Skills(1))
    state = fresh(learner, 0)
    # A thousand times larger weights make actions of -1 and 1.
    bold = state._replace(actor=jax.tree.map(lambda p: 1000 * p, state.actor))
    observation = np.tile(batch_of(0).observation[:1], (4000, 1))
    skill = np.ones((4000, 1))
    act = jax.jit(learner.act)
    actions = act(state, observation, skill, jax.random.key(1), is_uniform=False)
    mean = plain_action(state.actor, observation[0], skill[0])
    middle = np.abs(mean) < 0.3
    assert middle.any()
    # Four standard errors, of a mean of 4000 and of their spread.
    assert np.abs(actions.mean(axis=0) - mean)[middle].max() < 4 * 0.2 / np.sqrt(4000)
    assert np.abs(actions.std(axis=0) - 0.2)[middle].max() < 4 * 0.2 / np.sqrt(8000)
    assert np.abs(act(bold, observation, skill, jax.random.key(1), is_uniform=False)).max() <= 1
    uniform = np.asarray(act(bold, observation, skill, jax.random.key(1), is_uniform=True))
    np.testing.assert_allclose(np.quantile(uniform, [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=0.04)
    assert np.abs(uniform).max() <= 1
