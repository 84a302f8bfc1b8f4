import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from bpt_rl.agents.agentic_transformer import AgenticTransformer
from bpt_rl.agents.decision_transformer import DecisionTransformer
from bpt_rl.config import DataConfig, ModelConfig, TrainConfig
from bpt_rl.datasets.chains import build_chain
from bpt_rl.datasets.packing import STEP_FIELDS, pack
from bpt_rl.nn import chain_cache
from bpt_rl.nn.cached_policy import CachedPolicy
from bpt_rl.nn.hashed_graph import hashed_graph
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.step_packing import num_columns
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.types import LAYOUTS, DataStatistics, Trajectory

EPISODE_STEPS = 5
TARGET = 2.0
# Two environments, three episodes each, ending at different times. Returns ascend up to the target, which
# the second episode reaches, so that the third sees its completion flag; rewards of 0 then follow it.
REWARDS = (
    ([0.25, 0.25, 0.25, 0.25, 0], [1, 1, 0], [0.5, 1, 0.5, 0]),
    ([0.5, 0], [0, 2, 0, 0, 0], [0.5, 0.5, 0.5, 0.5, 0]),
)
NUM_STEPS = 12
REWARD = np.array([np.concatenate(rewards) for rewards in REWARDS], np.float32).T
DONE = np.array([np.concatenate([np.arange(len(r)) == len(r) - 1 for r in rewards]) for rewards in REWARDS]).T
OBSERVATION = np.random.default_rng(0).normal(size=(NUM_STEPS, 2, 3)).astype(np.float32)

MODEL = ModelConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    feedforward_dim=24,
    episode_embedding=3,
    implementation="reference",
    activations="keep",
)
STATISTICS = DataStatistics(
    task="task",
    observation_mean=(0.3, -0.2, 0.1),
    observation_std=(0.5, 2.0, 1.5),
    action_dim=2,
    action_repeat=1,
    episode_steps=EPISODE_STEPS,
    returns=(0.5, 3.0, 4.0),
    reward_abs_max=1.6,
    num_episodes=3,
    source="test",
    subset="full",
    subset_digest="0" * 64,
    digest="",
)
NORMALIZER = Normalizer.from_statistics(STATISTICS, "largest_return")


@pytest.fixture(scope="module")
def make(draw_parameters):
    """Returns (graph, parameters) of a configuration."""
    return lambda config: draw_parameters(
        lambda: TrajectoryModel(config, 3, 2, EPISODE_STEPS, rngs=nnx.Rngs(0))
    )


@functools.partial(jax.jit, static_argnums=0)
def full_pass(graph, params, batch):
    return nnx.merge(graph, params)(batch).mean


def play(policy):
    """Returns the actions [T, B, A] of the rollout that `REWARDS` describes."""
    carry, return_to_go, actions = policy.start(2), np.full(2, TARGET), []
    for observation, reward, done in zip(OBSERVATION, REWARD, DONE, strict=True):
        carry, action = policy.act(carry, observation, return_to_go)
        carry = policy.observe(carry, reward, done)
        return_to_go = np.where(done, TARGET, return_to_go - reward)
        actions.append(action)
    return np.stack(actions)


def played_chains(actions, completion):
    """The rollout as the chains that training would have made of it, one an environment."""
    chains = []
    for i, rewards in enumerate(REWARDS):
        stops = np.cumsum([len(r) for r in rewards])
        episodes = []
        for stop, reward in zip(stops, rewards, strict=True):
            steps = slice(stop - len(reward), stop)
            zeros = np.zeros((len(reward) + 1, 1), np.float32)
            episodes.append(
                Trajectory(
                    observation=np.concatenate([OBSERVATION[steps, i], np.full((1, 3), 9, np.float32)]),
                    action=np.concatenate([np.zeros((1, 2), np.float32), actions[steps, i]]),
                    reward=zeros,
                    discount=zeros,
                    physics=np.zeros((len(zeros), 2)),
                    task_reward={"task": np.array([0, *reward], np.float32)},
                )
            )
        chain = build_chain(episodes, "task", completion=completion)
        assert chain.target_return == TARGET
        # The order played is the chain's.
        np.testing.assert_array_equal(chain.observation, OBSERVATION[:, i])
        chains.append(chain)
    return chains


def episodes_alone(chains):
    """Each episode of the chains, asked for the same return, as the first and only one of a chain."""
    alone = []
    for chain in chains:
        for episode in range(3):
            rows = chain.episode == episode
            fields = {name: getattr(chain, name)[rows] for name in STEP_FIELDS}
            fields["episode"] = np.zeros_like(fields["episode"])
            alone.append(dataclasses.replace(chain, **fields))
    return alone


def expected_actions(make, config, chains, num_steps):
    """Actions of the full forward pass [T, B, A], of chains in turn."""
    packed = [pack([chain], num_steps * LAYOUTS[config.layout], layout=config.layout) for chain in chains]
    batch = NORMALIZER(jax.tree.map(lambda *rows: np.concatenate(rows), *packed))
    mean = np.asarray(full_pass(*make(config), batch))
    rows = [mean[i, : chain.num_steps] for i, chain in enumerate(chains)]
    return np.concatenate(rows).reshape(2, NUM_STEPS, 2).swapaxes(0, 1)


def agent_of(kind, layout, completion, **changes):
    config = TrainConfig(
        data=DataConfig(num_trajectories=1 if kind is DecisionTransformer else 3, completion=completion),
        model=dataclasses.replace(MODEL, layout=layout, **changes),
    )
    return kind(config, STATISTICS), config.model


def growing_policy(make, config, completion, *, first_steps, clear_context=False):
    """A policy whose cache is made for some steps and doubles, up to the whole context."""
    return CachedPolicy(
        *make(config),
        NORMALIZER,
        num_episodes=3,
        clear_context=clear_context,
        completion=completion,
        first_capacity=first_steps * LAYOUTS[config.layout],
    )


@pytest.mark.parametrize(
    ("layout", "completion", "changes"),
    [
        ("return_state_action_reward", "per_episode", {}),
        ("return_state_action_reward", "per_step", {"positions": "episode"}),
        ("return_state_action", "per_episode", {"positions": "none", "norm": "layer"}),
        ("state_action_reward", "per_step", {}),
        ("fused", "per_episode", {}),
        ("fused", "per_step", {"positions": "episode"}),
    ],
)
def test_actions_are_those_of_the_full_pass_over_the_chain_played(make, layout, completion, changes):
    config = dataclasses.replace(MODEL, layout=layout, **changes)
    # One cache grows thrice, from 2 steps to 4, 8 and 15, the others once.
    first_steps = 2 if (layout, completion) == ("fused", "per_episode") else 8
    actions = play(growing_policy(make, config, completion, first_steps=first_steps))
    expected = expected_actions(make, config, played_chains(actions, completion), NUM_STEPS)
    # float32 through two layers, with other orders of sums.
    np.testing.assert_allclose(actions, expected, atol=1e-4)
    # What the tolerance is to tell apart: a full pass in which the past is another.
    moved = [dataclasses.replace(c, completion=1 - c.completion) for c in played_chains(actions, completion)]
    reads_completion = layout in ("return_state_action_reward", "fused")
    difference = np.abs(actions - expected_actions(make, config, moved, NUM_STEPS)).max()
    assert difference > 0.01 if reads_completion else difference < 1e-4


@pytest.mark.parametrize("kind", ["at", "at, growing", "dt"])
def test_a_cleared_context_is_a_fresh_start_of_each_environments_episode(make, kind):
    agent_kind = DecisionTransformer if kind == "dt" else AgenticTransformer
    agent, config = agent_of(agent_kind, "return_state_action_reward", "per_step")
    if kind == "at, growing":
        policy = growing_policy(make, config, "per_step", first_steps=4, clear_context=True)
    else:
        policy = agent.policy(make(config)[1], clear_context=kind == "at")
    actions = play(policy)
    chains = episodes_alone(played_chains(actions, "per_step"))
    expected = expected_actions(make, config, chains, EPISODE_STEPS)
    np.testing.assert_allclose(actions, expected, atol=1e-4)


def test_a_cache_doubles_when_its_longest_context_is_full_up_to_the_whole_context(make):
    config = dataclasses.replace(MODEL, layout="fused")

    def capacities(policy):
        """Returns the steps that the cache holds after each action."""
        carry, sizes = policy.start(2), []
        for observation, reward, done in zip(OBSERVATION, REWARD, DONE, strict=True):
            before = carry
            carry, _ = policy.act(carry, observation, np.full(2, TARGET))
            # Whether it grew or was written in place, the cache that was given is gone.
            assert all(array.is_deleted() for array in (*before.cache.keys, *before.cache.values))
            assert len({array.shape for array in (*carry.cache.keys, *carry.cache.values)}) == 1
            sizes.append(carry.cache.keys[0].shape[2])
            carry = policy.observe(carry, reward, done)
        return sizes

    kept = capacities(growing_policy(make, config, "per_step", first_steps=2))
    assert kept == [2] * 2 + [4] * 2 + [8] * 4 + [15] * 4
    # The first row's first episode is the longest there is; nothing follows the fifth step.
    cleared = capacities(growing_policy(make, config, "per_step", first_steps=2, clear_context=True))
    assert cleared == [2] * 2 + [4] * 2 + [5] * 8


def test_a_step_is_written_into_the_cache_that_was_given(make):
    # A key head for each query head: grouped, a CPU turns the keys of a layer round before it multiplies them.
    config = dataclasses.replace(MODEL, layout="fused", num_kv_heads=2)
    graph, params = make(config)
    cache = jax.eval_shape(lambda: nnx.merge(graph, params).init_cache(2, 2**20))
    packed = np.zeros((2, num_columns(3, 2)), np.int32)
    alone = chain_cache.CacheDevices(model=config)
    compiled = chain_cache.decode.lower(hashed_graph(graph), alone, params, cache, packed, None).compile()
    memory, arrays = compiled.memory_analysis(), (*cache.keys, *cache.values)
    num_bytes = 4 * arrays[0].size
    assert memory.alias_size_in_bytes >= num_bytes * len(arrays)
    # What is given over may still be copied; one layer's keys alone would be as large as this.
    assert memory.temp_size_in_bytes < num_bytes


def test_memory_of_earlier_episodes_matters_to_the_actions(make):
    agent, config = agent_of(AgenticTransformer, "return_state_action_reward", "per_step")
    params = make(config)[1]
    kept = play(agent.policy(params, num_episodes=3))
    cleared = play(agent.policy(params, num_episodes=3, clear_context=True))
    is_first = np.cumsum(DONE, axis=0) - DONE == 0
    # Equal while nothing is to be forgotten, but for the shape of the cache.
    np.testing.assert_allclose(kept[is_first], cleared[is_first], atol=1e-5)
    assert np.abs(kept - cleared)[~is_first].max() > 0.01


@pytest.fixture(scope="module")
def gaussian(make):
    """Returns a policy by its sample seed; the head says the same of every step."""
    agent, config = agent_of(AgenticTransformer, "fused", "per_episode", action_distribution="gaussian")
    head = {"kernel": np.zeros((16, 4), np.float32), "bias": np.array([0.2, -0.1, -2, -1.5], np.float32)}
    params = make(config)[1] | {"head": head}
    return lambda seed: agent.policy(params, sample_seed=seed)


def act_twice(policy, num_environments=4000):
    carry, actions = policy.start(num_environments), []
    for _ in range(2):
        carry, action = policy.act(carry, np.zeros((num_environments, 3)), np.ones(num_environments))
        carry = policy.observe(carry, np.zeros(num_environments), np.zeros(num_environments, bool))
        actions.append(action)
    return np.stack(actions)


def test_drawn_actions_have_the_mean_and_deviation_of_the_head(gaussian):
    actions = act_twice(gaussian(0)).astype(np.float64)
    assert np.abs(actions).max() <= 1
    std = np.exp([-2, -1.5])
    # Standard errors of 8000 draws, std / sqrt(8000) and std / sqrt(16000); five of each. Clipping at 1 is
    # 3.6 deviations away.
    flat = actions.reshape(-1, 2)
    assert (np.abs(flat.mean(axis=0) - np.tanh([0.2, -0.1])) < 5 * std / np.sqrt(8000)).all()
    assert (np.abs(flat.std(axis=0) - std) < 5 * std / np.sqrt(16000)).all()
    # Between steps, and between entries of an action: noise of its own, standard error 1 / sqrt(4000).
    correlation = np.corrcoef(actions.transpose(0, 2, 1).reshape(4, -1))
    assert np.abs(correlation - np.eye(4)).max() < 5 / np.sqrt(4000)


def test_drawn_actions_depend_on_the_seed_alone(gaussian):
    first, again, other = (act_twice(gaussian(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - other) > 0).mean() > 0.99


def test_without_a_seed_a_gaussian_head_gives_its_mean(gaussian):
    actions = act_twice(gaussian(None), 2)
    np.testing.assert_allclose(actions, np.broadcast_to(np.tanh([0.2, -0.1]), (2, 2, 2)), rtol=1e-5)


def test_deterministic_head_refuses_to_draw(make):
    agent, config = agent_of(AgenticTransformer, "fused", "per_episode")
    with pytest.raises(ValueError, match=r"needs a Gaussian head.*'deterministic'"):
        agent.policy(make(config)[1], sample_seed=0)


def test_an_agents_full_context_may_drop_its_oldest_episodes(make):
    agent, config = agent_of(AgenticTransformer, "fused", "per_episode")
    policy = agent.policy(make(config)[1], num_episodes=3, full_context="drop_oldest")
    carry = policy.start(2)
    for t in range(16):
        carry, _ = policy.act(carry, OBSERVATION[0], np.ones(2))
        carry = policy.observe(carry, np.zeros(2), np.full(2, t in (4, 9, 14)))
    np.testing.assert_array_equal(carry.end.num_steps, [11, 11])
    np.testing.assert_array_equal(carry.end.episode, [2, 2])


@pytest.mark.parametrize(
    ("ends_at", "message"), [((4, 9, 14), "holds 15 and step 16 came"), ((), "up to 5 steps; got step 6")]
)
def test_full_context_and_episode_longer_than_any_of_the_data_are_refused(make, ends_at, message):
    agent, config = agent_of(AgenticTransformer, "fused", "per_episode")
    policy = agent.policy(make(config)[1], num_episodes=3)
    carry = policy.start(2)
    for t in range(max(ends_at, default=4) + 1):
        carry, action = policy.act(carry, OBSERVATION[0], np.ones(2))
        assert np.isfinite(action).all()
        carry = policy.observe(carry, np.zeros(2), np.array([t in ends_at] * 2))
    with pytest.raises(ValueError, match=message):
        policy.act(carry, OBSERVATION[0], np.ones(2))
