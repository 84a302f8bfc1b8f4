"""Tests of the policy of a model that was trained on windows."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from bpt_rl.agents.registry import make_agent
from bpt_rl.config import DataConfig, ModelConfig, TrainConfig
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.types import DataStatistics, PackedBatch

WINDOW, EPISODE_STEPS, NUM_ENVIRONMENTS = 3, 5, 2
TARGET = 4.0
STATISTICS = DataStatistics(
    task="cartpole_swingup",
    observation_mean=(0.1, -0.2),
    observation_std=(1.0, 2.0),
    action_dim=1,
    action_repeat=1,
    episode_steps=EPISODE_STEPS,
    returns=(1.0, TARGET),
    reward_abs_max=1.0,
    num_episodes=2,
    source="",
    subset="full",
    subset_digest="0" * 64,
    digest="",
)


def config_of(layout="fused", num_trajectories=1, distribution="deterministic", agent="dt"):
    return TrainConfig(
        agent=agent,
        data=DataConfig(num_trajectories=num_trajectories, window=WINDOW),
        model=ModelConfig(
            layout=layout,
            embed_dim=16,
            num_layers=1,
            dropout=0.0,
            action_distribution=distribution,
            implementation="reference",
            activations="keep",
        ),
    )


@pytest.fixture(scope="module")
def make(draw_parameters):
    """Returns the agent of a configuration, its graph and parameters."""

    def agent_of(config):
        drawn = draw_parameters(lambda: TrajectoryModel(config.model, 2, 1, EPISODE_STEPS, rngs=nnx.Rngs(0)))
        return make_agent(config, STATISTICS), *drawn

    return agent_of


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)  # halves the compile time
def full_pass(graph, params, batch):
    return nnx.merge(graph, params)(batch).mean


def play(policy, num_episodes=2):
    """Returns every step of a rollout on made-up observations and rewards, as an unpacked batch [B, T]."""
    generator = np.random.default_rng(0)
    carry, asked, steps = policy.start(NUM_ENVIRONMENTS), np.full(NUM_ENVIRONMENTS, TARGET, np.float32), []
    for t in range(num_episodes * EPISODE_STEPS):
        observation = generator.normal(size=(NUM_ENVIRONMENTS, 2)).astype(np.float32)
        reward = generator.uniform(size=NUM_ENVIRONMENTS)
        done = np.full(NUM_ENVIRONMENTS, (t + 1) % EPISODE_STEPS == 0)
        carry, action = policy.act(carry, observation, asked)
        place = np.full(NUM_ENVIRONMENTS, t % EPISODE_STEPS, np.int32)
        reached = (done & (asked <= reward)).astype(np.float32)
        ones = np.ones(NUM_ENVIRONMENTS, np.int32)
        steps.append(
            PackedBatch(
                observation, action, reward.astype(np.float32), asked, reached, place, 0 * ones, ones, ones
            )
        )
        carry = policy.observe(carry, reward, done)
        asked = np.where(done, TARGET, asked - reward).astype(np.float32)
    return PackedBatch(*(np.stack(field, axis=1) for field in zip(*steps, strict=True)))


@pytest.mark.parametrize("layout", ["fused", "return_state_action", "return_state_action_reward"])
def test_windowed_policy_equals_the_model_on_the_last_window_of_the_episode(make, layout):
    agent, graph, params = make(config_of(layout))
    played = play(agent.policy(params))
    normalizer = Normalizer.from_statistics(STATISTICS, "largest_return")
    for t in range(2 * EPISODE_STEPS):
        start = max(t - t % EPISODE_STEPS, t + 1 - WINDOW)
        # Padding behind it, so that every window has one shape.
        spare = WINDOW - (t + 1 - start)
        window = PackedBatch(
            *(
                np.pad(field[:, start : t + 1], ((0, 0), (0, spare)) + ((0, 0),) * (field.ndim - 2))
                for field in played
            )
        )
        expected = full_pass(graph, params, normalizer(window))[:, t - start]
        np.testing.assert_allclose(played.action[:, t], expected, atol=1e-5)  # float32, other summation order


def test_drawn_actions_repeat_with_their_seed_alone(make):
    agent, _, params = make(config_of(distribution="gaussian"))
    first, same, other = (play(agent.policy(params, sample_seed=s), 1).action for s in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3


def test_drawing_from_a_deterministic_head_is_refused(make):
    agent, _, params = make(config_of())
    with pytest.raises(ValueError, match="Drawing actions needs a Gaussian head"):
        agent.policy(params, sample_seed=0)


def test_trajectories_as_context_are_refused(make):
    agent, _, params = make(config_of())
    with pytest.raises(ValueError, match=r"model of whole episodes only.*trained on windows of 3 steps"):
        agent.policy(params).start(0, [])


def test_a_chain_of_windows_is_refused():
    with pytest.raises(ValueError, match=r"got window 3 and num_trajectories 2\. Set window to 0"):
        make_agent(config_of(agent="at", num_trajectories=2), STATISTICS)


def test_an_episode_longer_than_any_of_the_data_is_refused(make):
    agent, _, params = make(config_of())
    policy = agent.policy(params)
    carry = policy.start(NUM_ENVIRONMENTS)
    carry = carry._replace(step=np.full(NUM_ENVIRONMENTS, EPISODE_STEPS, np.int32))
    with pytest.raises(ValueError, match=f"up to {EPISODE_STEPS} steps; got step {EPISODE_STEPS + 1}"):
        policy.act(carry, np.zeros((NUM_ENVIRONMENTS, 2), np.float32), np.ones(NUM_ENVIRONMENTS))
