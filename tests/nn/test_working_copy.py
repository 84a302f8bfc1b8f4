"""A working copy in the compute type against the float32 parameters it was made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bpt_rl.config import ModelConfig
from bpt_rl.nn.transformer import Transformer
from bpt_rl.nn.working_copy import NarrowKernel, narrowed, slots_of, with_slots


@pytest.fixture(scope="module")
def compiled():
    """Returns the loss of a transformer by chunks, its parameters, and both compiled gradients."""
    model = ModelConfig(
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        dropout=0.0,
        implementation="reference",
        activations="recompute",
        feedforward_chunk_size=4,
        compute_dtype="bfloat16",
    )
    graph, params = nnx.split(Transformer(model, nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    x = jax.random.normal(jax.random.key(1), (2, 24, 16), jnp.bfloat16)

    def loss(params):
        return jnp.sin(3 * nnx.merge(graph, params)(x, None).astype(jnp.float32)).sum()

    whole = jax.jit(jax.value_and_grad(loss))
    of_slots = jax.jit(
        lambda working: jax.value_and_grad(lambda s: loss(with_slots(working, s)))(slots_of(working))
    )
    return loss, params, whole, of_slots


def test_loss_and_float32_gradients_are_those_of_the_float32_parameters_bit_for_bit(compiled):
    _, params, whole, of_slots = compiled
    (expected_loss, expected), (loss, gradient) = whole(params), of_slots(narrowed(params, "bfloat16"))
    assert float(loss) == float(expected_loss)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(gradient), strict=True
    ):
        assert want.dtype == got.dtype == jnp.float32
        assert np.any(want != 0), path
        np.testing.assert_array_equal(got, want, err_msg=jax.tree_util.keystr(path))


def test_gradients_of_narrow_kernels_without_slots_would_be_rounded(compiled):
    """What the slots are for: sums over chunks in bfloat16 are off by its rounding, 2**-9 each."""
    loss, params, whole, _ = compiled
    _, expected = whole(params)
    plain = jax.jit(jax.grad(loss))(narrowed(params, "bfloat16"))
    kernel, want = (tree["blocks"]["expand"]["kernel"] for tree in (plain, expected))
    error = np.linalg.norm(kernel.astype(np.float32) - want) / np.linalg.norm(want)
    assert 2**-10 < error < 2**-6


def test_only_kernels_of_layers_are_narrow():
    params = {
        "head": {"kernel": jnp.ones((2, 3))},
        "transformer": {
            "blocks": {"query": {"kernel": jnp.ones((4, 2, 2))}, "norm": {"scale": jnp.ones((4, 2))}}
        },
    }
    working = narrowed(params, "bfloat16")
    dtypes = jax.tree.map(lambda leaf: leaf.dtype.name, working)
    assert dtypes == {
        "head": {"kernel": "float32"},
        "transformer": {"blocks": {"query": {"kernel": "bfloat16"}, "norm": {"scale": "float32"}}},
    }
    slots = slots_of(working)
    assert slots["head"] is working["head"] or slots["head"]["kernel"] is working["head"]["kernel"]
    paired = with_slots(working, slots)
    assert isinstance(paired["transformer"]["blocks"]["query"]["kernel"], NarrowKernel)
    assert not np.any(paired["transformer"]["blocks"]["query"]["kernel"].slot)
    # A copy in float32 is the parameters themselves.
    same = with_slots(*(functools.partial(narrowed, dtype="float32")(params) for _ in range(2)))
    assert jax.tree.structure(same) == jax.tree.structure(params)
