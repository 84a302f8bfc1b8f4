import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from bpt_rl import config_toml
from bpt_rl.agents.agentic_transformer import AgenticTransformer
from bpt_rl.agents.algorithm_distillation import AlgorithmDistillation
from bpt_rl.agents.base import Agent, Policy
from bpt_rl.agents.behaviour_cloning import BehaviourCloning
from bpt_rl.agents.decision_transformer import DecisionTransformer
from bpt_rl.agents.ornstein_uhlenbeck import OrnsteinUhlenbeckPolicy
from bpt_rl.agents.random import RandomPolicy
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import CHAIN_AGENTS, DataConfig, ModelConfig, TrainConfig
from bpt_rl.types import DataStatistics, PackedBatch

CLASSES = {
    "at": AgenticTransformer,
    "dt": DecisionTransformer,
    "ad": AlgorithmDistillation,
    "bc": BehaviourCloning,
}
OWN = {
    "at": {"num_trajectories": 2},
    "ad": {"num_trajectories": 2, "draw": "consecutive", "order": "collected"},
}
"""What an agent's data must be like; the others see one trajectory."""
QUICK = {"xla_backend_optimization_level": 0}
"""Halves the compile time."""
MODEL = ModelConfig(
    layout="fused", embed_dim=16, num_layers=1, dropout=0.0, implementation="reference", activations="keep"
)
STATISTICS = DataStatistics(
    task="task",
    observation_mean=(0.3, -0.2, 0.1),
    observation_std=(0.5, 2.0, 1.5),
    action_dim=2,
    action_repeat=1,
    episode_steps=3,
    returns=(1.0, 2.0),
    reward_abs_max=1.0,
    num_episodes=2,
    source="test",
    subset="full",
    subset_digest="0" * 64,
    digest="",
)


def make(name, data=None, **changes):
    layout = {"layout": "fused_without_return"} if name == "ad" else {}
    return make_agent(
        TrainConfig(
            agent=name,
            data=DataConfig(**({"num_trajectories": 1} | OWN.get(name, {}) | (data or {}))),
            model=dataclasses.replace(MODEL, **(layout | changes)),
        ),
        STATISTICS,
    )


@functools.cache
def parameters(name):
    return jax.tree.map(np.asarray, jax.jit(make(name).init, compiler_options=QUICK)(jax.random.key(0)))


def tiny_batch():
    """Two rows of two episodes of three steps; the last step of the second row is padding."""
    generator = np.random.default_rng(0)
    counted = np.ones((2, 6), np.float32)
    counted[1, -1] = 0
    return PackedBatch(
        observation=generator.normal(size=(2, 6, 3)).astype(np.float32),
        action=generator.uniform(-0.9, 0.9, (2, 6, 2)).astype(np.float32),
        reward=generator.random((2, 6)).astype(np.float32),
        return_to_go=generator.random((2, 6)).astype(np.float32),
        completion=np.zeros((2, 6), np.float32),
        step=np.tile(np.arange(3, dtype=np.int32), (2, 2)),
        episode=np.repeat(np.arange(2, dtype=np.int32), 3)[None].repeat(2, axis=0),
        segment_ids=counted.astype(np.int32),
        loss_mask=counted,
    )


BATCH = tiny_batch()


def play(policy, rewards=(1.0, 0.0, 0.5), target=2.0):
    """Actions [2 episodes, 3 steps, B, A]; both episodes show the same observations."""
    observation = np.random.default_rng(1).normal(size=(3, 2, 3)).astype(np.float32)
    carry, actions = policy.start(2), []
    for t in range(6):
        carry, action = policy.act(carry, observation[t % 3], np.full(2, target))
        carry = policy.observe(carry, np.full(2, rewards[t % 3]), np.full(2, t % 3 == 2))
        actions.append(action)
    return np.stack(actions).reshape(2, 3, 2, 2)


@pytest.mark.parametrize("name", CLASSES)
def test_agents_and_their_policies_meet_the_protocols(name):
    agent = make(name)
    assert type(agent) is CLASSES[name]
    assert isinstance(agent, Agent)
    assert isinstance(agent.policy(parameters(name), num_episodes=2), Policy)


@pytest.mark.parametrize("preset", ["at_paper", "at_small", "at_350m", "dt", "ad", "bc", "bc10"])
def test_a_preset_is_one_that_its_agent_takes(preset):
    config = config_toml.load(TrainConfig, preset)
    assert type(make_agent(config, STATISTICS)) is CLASSES[config.agent]
    # A grid may name an agent and its number of trajectories alone.
    if config.agent in CHAIN_AGENTS:
        data = dataclasses.replace(config.data, num_trajectories=16)
        make_agent(dataclasses.replace(config, data=data), STATISTICS)


def test_explorers_meet_the_protocol_of_policies():
    for policy in (RandomPolicy(2, 0), OrnsteinUhlenbeckPolicy(2, 0, decay=0.1, scale=1.0)):
        assert isinstance(policy, Policy)


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_float32_and_follow_the_key(name):
    first = parameters(name)
    again, other = (jax.jit(make(name).init, compiler_options=QUICK)(jax.random.key(seed)) for seed in (0, 1))
    leaves = [jax.tree.leaves(params) for params in (first, again, other)]
    for a, b in zip(*leaves[:2], strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(leaves[0], leaves[2], strict=True))


@pytest.mark.parametrize(
    ("name", "distribution"),
    [(name, "deterministic") for name in CLASSES] + [("at", "gaussian")],
)
def test_loss_falls_on_one_batch_seen_again_and_again(name, distribution):
    agent, optimizer = make(name, action_distribution=distribution), optax.adam(1e-2)

    def step(state, _):
        params, moments = state
        (loss, metrics), gradient = jax.value_and_grad(agent.loss, has_aux=True)(params, BATCH, None)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), (loss, metrics["loss"])

    def train(key):
        params = agent.init(key)
        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)[1]

    losses, reported = (np.asarray(x) for x in jax.jit(train, compiler_options=QUICK)(jax.random.key(0)))
    np.testing.assert_array_equal(losses, reported)
    if distribution == "deterministic":
        assert 0.1 < losses[0] < 2
        assert losses[-1] < 0.1 * losses[0]
    else:
        # A log-likelihood knows no 0: ten times as likely an action.
        assert losses[-1] < losses[0] - np.log(10)


def test_loss_takes_arrays_of_numpy_outside_of_jit_too():
    agent, params = make("at"), parameters("at")
    loss, _ = agent.loss(params, BATCH, None)
    jitted, _ = jax.jit(agent.loss, compiler_options=QUICK)(params, BATCH, None)
    # Fused by the compiler or not: float32 rounding.
    np.testing.assert_allclose(loss, jitted, rtol=1e-5)


def test_behaviour_cloning_acts_on_the_present_observation_as_it_was_trained():
    agent, params = make("bc"), parameters("bc")
    policy = agent.policy(params)
    action = np.stack(
        [policy.act(policy.start(2), BATCH.observation[:, t], np.zeros(2))[1] for t in range(6)], axis=1
    )
    expected = np.square(action - BATCH.action).mean(axis=-1)[BATCH.loss_mask > 0].mean()
    np.testing.assert_allclose(agent.loss(params, BATCH, None)[0], expected, rtol=1e-5)
    # Another past and another wish make no difference.
    np.testing.assert_array_equal(play(policy), play(policy, rewards=(5.0, 5.0, 5.0), target=99.0))
    first, second = play(policy)
    np.testing.assert_array_equal(first, second)
    assert np.abs(first[0] - first[1]).max() > 0.01


def test_decision_transformer_clears_its_context_whatever_is_asked():
    agent, params = make("dt"), parameters("dt")
    expected = play(agent.policy(params, clear_context=True))
    for clear_context in (False, True):
        actions = play(agent.policy(params, num_episodes=2, clear_context=clear_context))
        np.testing.assert_array_equal(actions, expected)
        np.testing.assert_array_equal(actions[0], actions[1])
    # It does see the steps before within the episode.
    other = play(agent.policy(params), rewards=(0.0, 1.0, 0.5))
    assert np.abs(other[:, 1:] - expected[:, 1:]).max() > 1e-3


def test_agentic_transformer_remembers_unless_its_context_is_cleared():
    agent, params = make("at"), parameters("at")
    first, second = play(agent.policy(params, num_episodes=2))
    assert np.abs(first - second).max() > 1e-3
    first, second = play(agent.policy(params, num_episodes=2, clear_context=True))
    np.testing.assert_array_equal(first, second)


def test_algorithm_distillation_is_asked_for_nothing_and_sees_no_completion():
    agent, params = make("ad"), parameters("ad")
    other = BATCH._replace(return_to_go=BATCH.return_to_go + 9, completion=1 - BATCH.completion)
    np.testing.assert_array_equal(agent.loss(params, other, None)[0], agent.loss(params, BATCH, None)[0])
    # What nobody asks for is NaN in a rollout; with 0.0, the second episode would begin behind a completed one.
    expected = play(agent.policy(params, num_episodes=2))
    for target in (np.nan, 0.0, 99.0):
        np.testing.assert_array_equal(play(agent.policy(params, num_episodes=2), target=target), expected)
    assert np.abs(play(agent.policy(params, num_episodes=2), rewards=(0.0, 1.0, 0.5)) - expected).max() > 1e-3
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    # The Agentic Transformer on the same body does what it is asked for.
    at, at_params = make("at"), parameters("at")
    asked = [play(at.policy(at_params, num_episodes=2), target=target) for target in (2.0, 99.0)]
    assert np.abs(asked[0] - asked[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "data", "layout", "message"),
    [
        (
            "ad",
            {},
            "fused",
            "asked for no return; got layout 'fused', which carries one. Set model.layout to",
        ),
        (
            "ad",
            {"order": "ascending"},
            "state_action_reward",
            "got order 'ascending'. Set data.order to coll",
        ),
        (
            "ad",
            {"relabel": "own_return"},
            "state_action_reward",
            "none is relabelled; got relabel 'own_return'",
        ),
        (
            "at",
            {},
            "state_action_reward",
            "at is asked for a return, which layout 'state_action_reward' does not",
        ),
        (
            "dt",
            {},
            "fused_without_return",
            "dt is asked for a return, which layout 'fused_without_return' does",
        ),
    ],
)
def test_layouts_and_chains_that_do_not_fit_the_agent_are_refused(name, data, layout, message):
    with pytest.raises(ValueError, match=message):
        make(name, data, layout=layout)


def test_decision_transformer_refuses_chains():
    config = TrainConfig(agent="dt", data=DataConfig(num_trajectories=2), model=MODEL)
    with pytest.raises(ValueError, match=r"num_trajectories 2\. Set data\.num_trajectories to 1"):
        make_agent(config, STATISTICS)


def test_behaviour_cloning_refuses_distributions_and_drawing():
    with pytest.raises(ValueError, match=r"deterministic head only; got action_distribution 'gaussian'"):
        make("bc", action_distribution="gaussian")
    with pytest.raises(ValueError, match="needs a Gaussian head; behaviour cloning has none"):
        make("bc").policy(parameters("bc"), sample_seed=0)
