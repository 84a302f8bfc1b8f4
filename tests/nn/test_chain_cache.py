"""Chains that eight virtual devices share, against the same chains on one device."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from bpt_rl.config import ModelConfig
from bpt_rl.datasets.chains import build_chain
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn import chain_cache
from bpt_rl.nn.cached_policy import CachedPolicy
from bpt_rl.nn.chain_cache import CACHE_SPEC, CacheDevices
from bpt_rl.nn.device_mesh import DATA
from bpt_rl.nn.hashed_graph import hashed_graph
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.step_packing import num_columns
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.types import LAYOUTS, PackedBatch, Trajectory

pytestmark = pytest.mark.devices(8)

EPISODE_STEPS = 5
NORMALIZER = Normalizer(
    observation_mean=np.array([0.3, -0.2, 0.1], np.float32),
    observation_std=np.array([0.5, 2.0, 1.5], np.float32),
    return_scale=4.0,
    reward_scale=1.6,
)
# Steps of the episodes that four chains play, and of those that their contexts begin with.
PLAYED = ((5, 3, 4), (2, 5, 5), (5, 5, 2), (4, 4, 4))
GIVEN = ((1, 4), (5, 4), (3, 2), (5, 5))


def model_config(layout):
    return ModelConfig(
        layout=layout,
        embed_dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        feedforward_dim=24,
        episode_embedding=3,
        implementation="blockwise",
        query_chunk_size=4,
        key_chunk_size=4,
    )


@pytest.fixture(scope="module")
def make(draw_parameters):
    """Returns (graph, parameters) of a configuration."""
    return lambda config: draw_parameters(
        lambda: TrajectoryModel(config, 3, 2, EPISODE_STEPS, rngs=nnx.Rngs(0))
    )


def drawn_chain(lengths, seed):
    generator = np.random.default_rng(seed)

    def episode(length):
        return Trajectory(
            observation=generator.normal(size=(length + 1, 3)).astype(np.float32),
            action=generator.uniform(-1, 1, (length + 1, 2)).astype(np.float32),
            reward=np.zeros((length + 1, 1), np.float32),
            discount=np.ones((length + 1, 1), np.float32),
            physics=np.zeros((length + 1, 2)),
            task_reward={"task": np.array([0, *generator.choice([0, 0.25, 1], length)], np.float32)},
        )

    return build_chain(
        [episode(length) for length in lengths],
        "task",
        completion="per_step",
        target_return=2.0,
        order="given",
    )


CONTEXT = [drawn_chain(lengths, seed) for seed, lengths in enumerate(GIVEN)]


def play(policy, context=CONTEXT):
    """Returns the actions [T, B, A] of four chains and the carry at their end."""
    generator = np.random.default_rng(1)
    carry, actions = policy.start(4, context), []
    ends = [set(np.cumsum(lengths) - 1) for lengths in PLAYED]
    for t in range(12):
        carry, action = policy.act(carry, generator.normal(size=(4, 3)).astype(np.float32), np.full(4, 2.0))
        carry = policy.observe(carry, generator.random(4), np.array([t in end for end in ends]))
        actions.append(action)
    return np.stack(actions), carry


def held(carry, layout, num_devices):
    """Returns each layer's keys and values of each row's tokens, dummies left out, in the order of their slots."""
    per_step = LAYOUTS[layout]
    num_dummy = {
        "return_state_action_reward": 2,
        "return_state_action": 1,
        "state_action_reward": 2,
        "fused": 0,
    }
    rows = []
    for array in (*carry.cache.keys, *carry.cache.values):
        B, H, C, K = array.shape
        parts = np.asarray(array).reshape(B, H, num_devices, -1, per_step, K)
        slots = parts.transpose(0, 1, 3, 2, 4, 5).reshape(B, H, C, K)
        rows += [
            slots[row, :, num_dummy[layout] : steps * per_step]
            for row, steps in enumerate(carry.end.num_steps)
        ]
    return rows


SETTINGS = {
    # Grows from 24 steps to 25, of which eight devices make 32.
    "growing": {"num_episodes": 3, "first_steps": 24},
    # Goes back to what its contexts began with at each episode's end.
    "cleared": {"clear_context": True},
    # Has room for one episode beside those: one chain forgets before the others, whose devices fill nothing in.
    "forgetting": {"full_context": "drop_oldest"},
}


@pytest.fixture(scope="module")
def played(make):
    """Returns the actions of a layout under some settings, and the carry at the end; each computed once."""

    @functools.cache
    def run(layout, name, mesh):
        settings = {"num_episodes": 1, "clear_context": False, "first_steps": 64} | SETTINGS[name]
        capacity = settings.pop("first_steps") * LAYOUTS[layout]
        graph, params = make(model_config(layout))
        return play(
            CachedPolicy(
                graph,
                params,
                NORMALIZER,
                completion="per_step",
                first_capacity=capacity,
                mesh=mesh,
                **settings,
            )
        )

    return run


@pytest.mark.parametrize(
    ("layout", "name", "mesh"),
    [
        # Four heads do not divide among eight devices: a ring fills the contexts in.
        ("return_state_action_reward", "growing", MeshConfig(context=8)),
        ("return_state_action", "cleared", MeshConfig(context=2, attention="ring")),
        ("fused", "forgetting", MeshConfig(context=4, data=2)),
        ("fused", "forgetting", MeshConfig(context=2, data=4, attention="ring")),
    ],
    ids=str,
)
def test_shared_chains_act_and_remember_as_on_one_device(played, layout, name, mesh):
    (alone, carry), (shared, shared_carry) = played(layout, name, None), played(layout, name, mesh)
    # float32, sums in another order.
    np.testing.assert_allclose(shared, alone, atol=1e-5)
    one, other = held(carry, layout, 1), held(shared_carry, layout, mesh.context)
    assert len(one) == len(other) == 16
    assert all(rows.size for rows in one)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), other, one)
    array = shared_carry.cache.keys[0]
    # A device has its share, of a cache no larger than one device's but for two turns of steps.
    assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // mesh.num_devices}
    assert array.shape[2] < carry.cache.keys[0].shape[2] + 2 * mesh.context * LAYOUTS[layout]


def test_what_is_acted_on_depends_on_what_the_context_began_with(played, make):
    graph, params = make(model_config("fused"))
    policy = CachedPolicy(
        graph,
        params,
        NORMALIZER,
        num_episodes=1,
        clear_context=False,
        completion="per_step",
        full_context="drop_oldest",
    )
    other, _ = play(policy, CONTEXT[::-1])
    # What the tolerance above is to tell apart.
    assert np.abs(other - played("fused", "forgetting", None)[0]).max() > 0.01


def test_drawn_actions_of_shared_chains_are_those_of_one_device(make):
    graph, params = make(dataclasses.replace(model_config("fused"), action_distribution="gaussian"))

    def drawn(**settings):
        options = {"num_episodes": 1, "clear_context": False, "completion": "per_step"}
        policy = CachedPolicy(graph, params, NORMALIZER, **options, **settings)
        carry, actions = policy.start(4), []
        for _ in range(2):
            carry, action = policy.act(carry, np.ones((4, 3)), np.ones(4))
            carry = policy.observe(carry, np.zeros(4), np.zeros(4, bool))
            actions.append(action)
        return np.stack(actions)

    shared = drawn(sample_seed=3, mesh=MeshConfig(data=2, context=2))
    np.testing.assert_allclose(shared, drawn(sample_seed=3), atol=1e-5)
    # Rows see the same: what tells them apart is their noise.
    assert np.abs(shared - shared[:, :1]).max(axis=(1, 2)).min() > 0.01


def lowered(make, mesh, num_steps, num_rows=2):
    """Returns the compiled programs of a step and of filling contexts in, and the bytes of a layer's keys."""
    # A key head for each query head: grouped, a CPU turns the keys of a layer round before it multiplies them.
    config = dataclasses.replace(model_config("fused"), num_kv_heads=4)
    graph, params = make(config)
    devices = CacheDevices(model=config, mesh=mesh)

    def abstract(shape, kind=np.float32, spec=chain_cache.ROWS_SPEC):
        return jax.ShapeDtypeStruct(shape, kind, sharding=devices.sharding(spec))

    cache = jax.eval_shape(lambda: nnx.merge(graph, params).init_cache(num_rows, num_steps))
    cache = jax.tree.map(lambda x: abstract(x.shape, x.dtype, CACHE_SPEC if x.ndim == 4 else P(DATA)), cache)
    index, packed = abstract((num_rows,), np.int32), abstract((num_rows, num_columns(3, 2)), np.int32)
    step = chain_cache.decode.lower(hashed_graph(graph), devices, params, cache, packed, None)
    numbers, kinds = abstract((num_rows, num_steps)), abstract((num_rows, num_steps), np.int32)
    wide = [abstract((num_rows, num_steps, size)) for size in (3, 2)]
    batch = PackedBatch(*wide, numbers, numbers, numbers, kinds, kinds, None, numbers)
    filled = chain_cache.prefill.lower(hashed_graph(graph), devices, params, cache, batch, index, index)
    return step.compile(), filled.compile(), cache.keys[0].size * 4


def collectives(program):
    """Returns how often each collective occurs in a compiled program."""
    names = "all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter"
    return collections.Counter(re.findall(rf" ({names})(?:-start)?\(", program.as_text()))


def test_a_step_exchanges_what_queries_found_and_each_device_writes_its_own_part_in_place(make):
    (step, filled, num_bytes), (_, filled_alone, _) = (
        lowered(make, MeshConfig(context=count), 2**14) for count in (4, 1)
    )
    assert collectives(step) == {"all-gather": 2}
    # From each device [B, S, H, K + 1] numbers, once a layer.
    assert len(re.findall(r"= f32\[4,2,1,4,1,5\]\S* all-gather\(", step.as_text())) == 2
    # Of one layer, queries with keys and values there, and what was found back; and of both layers, keys and values to
    # whose slots they are: nothing reads what would leave the last layer. The last step of each part is the next's too.
    assert collectives(filled) == {"all-to-all": 2 + 2, "collective-permute": 1}
    for program in (step, filled):
        assert program.memory_analysis().alias_size_in_bytes >= 4 * num_bytes // 4
    assert step.memory_analysis().temp_size_in_bytes < num_bytes // 4
    shares = [program.memory_analysis().temp_size_in_bytes for program in (filled, filled_alone)]
    # A quarter, and what travels.
    assert shares[0] < 0.4 * shares[1]


def test_devices_that_cannot_share_chains_are_refused(make):
    def start(num_rows, mesh):
        graph, params = make(model_config("fused"))
        options = {"num_episodes": 1, "clear_context": False, "completion": "per_step"}
        CachedPolicy(graph, params, NORMALIZER, mesh=mesh, **options).start(num_rows)

    with pytest.raises(ValueError, match=r"mesh\.fsdp must be 1; got 2\. Use mesh\.data"):
        start(4, MeshConfig(fsdp=2))
    with pytest.raises(ValueError, match=r"a multiple of mesh\.data; got 3 chains and mesh\.data 2"):
        start(3, MeshConfig(data=2))
    with pytest.raises(ValueError, match="must not have more devices than there are"):
        start(4, MeshConfig(context=16))
    with pytest.raises(ValueError, match=r"by one process.* got mesh\.coordinator 'host:1'"):
        start(4, MeshConfig(data=2, coordinator="host:1", num_processes=2))
