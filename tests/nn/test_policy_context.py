"""Tests of contexts that begin with trajectories of a dataset, and of those that outgrow their cache."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from bpt_rl.config import ModelConfig
from bpt_rl.datasets.chains import build_chain
from bpt_rl.datasets.packing import pack
from bpt_rl.nn import chain_cache
from bpt_rl.nn.cached_policy import CachedPolicy
from bpt_rl.nn.hashed_graph import hashed_graph
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.types import LAYOUTS, PackedBatch, Trajectory

EPISODE_STEPS, TARGET = 5, 2.0
TOLERANCE = 1e-4
"""float32 through two layers, with other orders of sums."""
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
NORMALIZER = Normalizer(
    observation_mean=np.array([0.3, -0.2, 0.1], np.float32),
    observation_std=np.array([0.5, 2.0, 1.5], np.float32),
    return_scale=4.0,
    reward_scale=1.6,
)


def drawn(length, seed):
    """An episode; rewards add up without rounding, and about half of them reach the target."""
    generator = np.random.default_rng(seed)
    rows, reward = length + 1, np.array([0, *generator.choice([0, 0.25, 0.5, 1], length)], np.float32)
    return Trajectory(
        observation=generator.normal(size=(rows, 3)).astype(np.float32),
        action=generator.uniform(-1, 1, (rows, 2)).astype(np.float32),
        reward=np.zeros((rows, 1), np.float32),
        discount=np.ones((rows, 1), np.float32),
        physics=np.zeros((rows, 2)),
        task_reward={"task": reward},
    )


# Two environments, with trajectories of the data to begin with and three episodes each, ending at different times.
GIVEN = ((drawn(1, 0), drawn(4, 1)), (drawn(5, 2), drawn(4, 3)))
PLAYED = ((drawn(5, 4), drawn(3, 5), drawn(4, 6)), (drawn(2, 7), drawn(5, 8), drawn(5, 9)))
NUM_STEPS = 12


@pytest.fixture(scope="module")
def make(draw_parameters):
    """Returns (graph, parameters) of a configuration."""
    return lambda config: draw_parameters(
        lambda: TrajectoryModel(config, 3, 2, EPISODE_STEPS, rngs=nnx.Rngs(0))
    )


@pytest.fixture(scope="module")
def make_policy(make):
    def policy(config, num_episodes=3, completion="per_step", clear_context=False, **options):
        return CachedPolicy(
            *make(config),
            NORMALIZER,
            num_episodes=num_episodes,
            clear_context=clear_context,
            completion=completion,
            **options,
        )

    return policy


@functools.partial(jax.jit, static_argnums=0)
def full_pass(graph, params, batch):
    return nnx.merge(graph, params)(batch).mean


def chain_of(episodes, completion="per_step"):
    return build_chain(episodes, "task", completion=completion, target_return=TARGET, order="given")


def played_steps():
    """Yields observation, reward and end of each step of both environments."""
    fields = []
    for episodes in PLAYED:
        observation = np.concatenate([e.observation[:-1] for e in episodes])
        reward = np.concatenate([e.task_reward["task"][1:] for e in episodes])
        done = np.concatenate([np.arange(e.num_steps) == e.num_steps - 1 for e in episodes])
        fields.append((observation, reward, done))
    yield from zip(*(np.stack(rows, axis=1) for rows in zip(*fields, strict=True)), strict=True)


def play(policy, context):
    """Returns the carry at the end, the actions [T, B, A], and each environment's episodes with these actions."""
    carry, return_to_go, actions = policy.start(2, context), np.full(2, TARGET), []
    for observation, reward, done in played_steps():
        carry, action = policy.act(carry, observation, return_to_go)
        carry = policy.observe(carry, reward, done)
        return_to_go = np.where(done, TARGET, return_to_go - reward)
        actions.append(action)
    episodes = []
    for row, planned in enumerate(PLAYED):
        taken = iter([action[row] for action in actions])
        episodes.append(
            [
                dataclasses.replace(
                    e, action=np.stack([e.action[0], *(next(taken) for _ in range(e.num_steps))])
                )
                for e in planned
            ]
        )
    return carry, episodes


def deviation(make, config, kept, episodes, completion="per_step"):
    """Returns how far actions are from the full pass over what was `kept` of the past before each episode."""
    chains = [
        chain_of([*past, episode], completion)
        for past, episode in zip(kept, (e for row in episodes for e in row), strict=True)
    ]
    longest = max(chain.num_steps for chain in chains)
    length = -(-longest // EPISODE_STEPS) * EPISODE_STEPS * LAYOUTS[config.layout]
    packed = [pack([chain], length, layout=config.layout) for chain in chains]
    batch = NORMALIZER(jax.tree.map(lambda *rows: np.concatenate(rows), *packed))
    means = np.asarray(full_pass(*make(config), batch))
    now = [chain.episode == chain.episode[-1] for chain in chains]
    return max(
        np.abs(chain.action[rows] - mean[: len(rows)][rows]).max()
        for chain, mean, rows in zip(chains, means, now, strict=True)
    )


def pasts(given, episodes):
    """Returns, before each episode of each environment, all that came before it."""
    return [[*given[row], *episodes[row][:e]] for row in range(2) for e in range(3)]


@pytest.mark.parametrize(
    ("layout", "completion", "positions"),
    [
        ("return_state_action_reward", "per_episode", "episode"),
        ("return_state_action", "per_episode", "context"),
        ("fused", "per_step", "context"),
        ("fused_without_return", "per_step", "episode"),
    ],
)
def test_actions_after_given_trajectories_are_those_of_the_full_pass(
    make, make_policy, layout, completion, positions
):
    config = dataclasses.replace(MODEL, layout=layout, positions=positions)
    policy = make_policy(config, completion=completion)
    _, episodes = play(policy, [chain_of(g, completion) for g in GIVEN])
    assert deviation(make, config, pasts(GIVEN, episodes), episodes, completion) < TOLERANCE
    # What the tolerance is to tell apart: a full pass over other trajectories.
    assert deviation(make, config, pasts(GIVEN[::-1], episodes), episodes, completion) > 0.1


@pytest.mark.parametrize("layout", ["return_state_action_reward", "return_state_action", "fused"])
def test_a_pass_leaves_what_decoding_step_by_step_leaves(make_policy, layout):
    config = dataclasses.replace(MODEL, layout=layout)
    chains = [chain_of(g) for g in GIVEN]
    filled = make_policy(config).start(2, chains)
    for row, chain in enumerate(chains):
        # As many steps in all, so that both ways have a cache of one shape.
        policy = make_policy(config, num_episodes=5)
        carry = policy.start(2)
        for t in range(chain.num_steps):
            twice = np.broadcast_to(chain.observation[t], (2, 3))
            carry, _ = policy.act(carry, twice, np.full(2, chain.return_to_go[t]))
            taken = np.broadcast_to(chain.action[t], (2, 2))
            carry = carry._replace(end=carry.end._replace(previous_action=taken))
            is_last = chain.step[t] == np.flatnonzero(chain.episode == chain.episode[t]).size - 1
            carry = policy.observe(carry, np.full(2, chain.reward[t]), np.full(2, is_last))
        for name, one, other in zip(carry.end._fields, filled.end, carry.end, strict=True):
            np.testing.assert_array_equal(one[row], other[0], err_msg=name)
            assert one.dtype == other.dtype
        num_tokens = chain.num_steps * LAYOUTS[layout]
        assert filled.cache.length[row] == carry.cache.length[0] == num_tokens
        num_dummy = {"return_state_action_reward": 2, "return_state_action": 1, "fused": 0}[layout]
        arrays = zip(
            (*filled.cache.keys, *filled.cache.values), (*carry.cache.keys, *carry.cache.values), strict=True
        )
        for one, other in arrays:
            visible = slice(num_dummy, num_tokens)
            # float32; entries are of order 1.
            np.testing.assert_allclose(one[row, :, visible], other[0, :, visible], atol=1e-5)


def kept_of(given, episodes, most):
    """Returns what is left of the past before each episode, where the oldest are dropped to leave `most` steps."""
    kept = []
    for row in range(2):
        past = list(given[row])
        for episode in episodes[row]:
            while sum(e.num_steps for e in past) > most:
                past.pop(0)
            kept.append(list(past))
            past.append(episode)
    return kept


@pytest.mark.parametrize(("layout", "num_given"), [("return_state_action_reward", 2), ("fused", 0)])
def test_a_full_context_forgets_its_oldest_trajectories_whole(make, make_policy, layout, num_given):
    config = dataclasses.replace(MODEL, layout=layout)
    # Room for three episodes of full length, given ones among them, or for one alone.
    policy = make_policy(config, num_episodes=1, full_context="drop_oldest", first_capacity=6)
    given = [g[:num_given] for g in GIVEN]
    carry, episodes = play(policy, [chain_of(g) for g in given] if num_given else None)
    most = num_given * EPISODE_STEPS
    assert carry.cache.keys[0].shape[2] <= (most + EPISODE_STEPS) * LAYOUTS[layout]
    kept = kept_of(given, episodes, most)
    assert [len(past) for past in kept] == ([2, 3, 2, 2, 2, 2] if num_given else [0] * 6)
    assert deviation(make, config, kept, episodes) < TOLERANCE
    assert deviation(make, config, pasts(given, episodes), episodes) > 0.1


def test_forgetting_changes_nothing_while_everything_fits(make_policy):
    contexts = [chain_of(g) for g in GIVEN]
    kept, dropping = (
        play(make_policy(dataclasses.replace(MODEL, layout="fused"), full_context=rule), contexts)[1]
        for rule in ("refuse", "drop_oldest")
    )
    for one, other in zip(
        [e for row in kept for e in row], [e for row in dropping for e in row], strict=True
    ):
        np.testing.assert_array_equal(one.action, other.action)


def test_a_cleared_context_goes_back_to_the_trajectories_it_was_given(make, make_policy):
    config = dataclasses.replace(MODEL, layout="return_state_action_reward")
    _, episodes = play(make_policy(config, clear_context=True), [chain_of(g) for g in GIVEN])
    kept = [GIVEN[row] for row in range(2) for _ in range(3)]
    assert deviation(make, config, kept, episodes) < TOLERANCE


def largest_size(jaxpr):
    """Returns the entries of the largest array that a program makes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest_size(inner))
    return max(sizes)


def test_a_pass_makes_no_matrix_of_logits_and_no_hidden_tensor_and_fills_the_cache_given(make):
    num_steps = 2**14
    config = dataclasses.replace(
        MODEL, layout="fused", feedforward_dim=512, implementation="auto", num_kv_heads=2
    )
    graph, params = make(config)
    cache = jax.eval_shape(lambda: nnx.merge(graph, params).init_cache(2, num_steps))
    place = (2, num_steps)
    row, index = (jax.ShapeDtypeStruct(place, kind) for kind in (np.float32, np.int32))
    observation, action = (jax.ShapeDtypeStruct((*place, dim), np.float32) for dim in (3, 2))
    batch = PackedBatch(observation, action, row, row, row, index, index, None, row)
    inputs = (params, cache, batch, np.arange(2), np.zeros(2, np.int32))
    devices = chain_cache.CacheDevices(model=config)
    program = jax.make_jaxpr(functools.partial(chain_cache.prefill, hashed_graph(graph), devices))(*inputs)
    # The stream is as large as a layer's keys; the hidden tensor would be 32 times and the logits 2048 times as large.
    assert largest_size(program.jaxpr) <= 8 * cache.keys[0].size
    memory = chain_cache.prefill.lower(hashed_graph(graph), devices, *inputs).compile().memory_analysis()
    num_bytes = 4 * cache.keys[0].size
    assert memory.alias_size_in_bytes >= 4 * num_bytes
    # Streams, queries, keys and values, each as large: never those of all layers and their copies at once.
    assert memory.temp_size_in_bytes < 16 * num_bytes


def test_contexts_that_do_not_fit_are_refused(make_policy):
    policy = make_policy(dataclasses.replace(MODEL, layout="fused"))
    one, two = chain_of(GIVEN[0][:1]), chain_of(GIVEN[1])
    with pytest.raises(ValueError, match=r"got 1 chains of \[2\] trajectories for 2 environments"):
        policy.start(2, [two])
    with pytest.raises(ValueError, match=r"got 2 chains of \[1, 2\] trajectories for 2 environments"):
        policy.start(2, [one, two])
    long = chain_of([drawn(6, 0)])
    with pytest.raises(ValueError, match="up to 5 steps; got step 6"):
        policy.start(2, [one, long])
