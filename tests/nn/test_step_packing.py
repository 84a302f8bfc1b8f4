"""What a decoding step needs of the host, in one array, and a module's arrays without their tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bpt_rl.nn.hashed_graph import flat_module
from bpt_rl.nn.step_packing import key_of, num_columns, pack, unpack
from bpt_rl.nn.trajectory_model import Step


def drawn_step(num_rows, observation_dim, action_dim):
    generator = np.random.default_rng(num_rows)
    reals = functools.partial(generator.normal, size=num_rows)

    def integers():
        return generator.integers(0, 2**31, num_rows, dtype=np.int32)

    return Step(
        previous_action=generator.uniform(-1, 1, (num_rows, action_dim)).astype(np.float32),
        previous_reward=reals().astype(np.float32),
        previous_completion=np.zeros(num_rows, np.float32),
        previous_step=integers(),
        previous_episode=integers(),
        return_to_go=reals().astype(np.float32),
        # Rounded as a device would round it.
        observation=generator.normal(size=(num_rows, observation_dim)),
        step=integers(),
        # As bits of a real, too small to be told from zero.
        episode=np.arange(num_rows, dtype=np.int32),
    )


@pytest.mark.parametrize(("num_rows", "observation_dim", "action_dim"), [(1, 1, 1), (5, 4, 2)])
def test_a_step_is_unpacked_as_it_was_packed(num_rows, observation_dim, action_dim):
    step = drawn_step(num_rows, observation_dim, action_dim)
    length = np.arange(7, 7 + num_rows, dtype=np.int32)
    packed = pack(step, length, 3)
    assert packed.shape == (num_rows, num_columns(observation_dim, action_dim))
    unpacked, unpacked_length = jax.jit(functools.partial(unpack, action_dim=action_dim))(packed)
    np.testing.assert_array_equal(unpacked_length, length)
    for name, value in step._asdict().items():
        found = np.asarray(getattr(unpacked, name))
        assert found.dtype == (np.int32 if value.dtype == np.int32 else np.float32), name
        np.testing.assert_array_equal(found, value.astype(found.dtype), err_msg=name)


@pytest.mark.parametrize("value", [-0.0, 1e-42, np.inf, np.nan])
def test_reals_keep_their_bits(value):
    step = drawn_step(2, 3, 2)._replace(return_to_go=np.full(2, value, np.float32))
    unpacked, _ = jax.jit(functools.partial(unpack, action_dim=2))(pack(step, np.zeros(2, np.int32), 0))
    found = np.asarray(unpacked.return_to_go).view(np.int32)
    np.testing.assert_array_equal(found, np.full(2, value, np.float32).view(np.int32))


def test_each_call_has_the_key_that_is_folded_in_by_its_number():
    key = jax.random.key(5)
    for call in (0, 1, 2**20):
        packed = pack(drawn_step(2, 3, 2), np.zeros(2, np.int32), call)
        found, expected = jax.jit(key_of)(key, packed), jax.random.fold_in(key, call)
        np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(expected))


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_flat_module_is_the_module(as_dict):
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(state) if as_dict else state)
    flat, arrays = flat_module(graph, params)
    # On their device, not sent there at every call; and the same static argument for the same tree.
    assert all(isinstance(array, jax.Array) for array in arrays)
    assert flat_module(graph, params)[0] is flat
    np.testing.assert_array_equal(flat.merge(arrays)(jnp.ones((1, 3))), module(jnp.ones((1, 3))))
