"""Blocks of keys by cuDNN: what compiles for a GPU anywhere, and on a GPU what comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bpt_rl.nn import blockwise, cudnn_block
from bpt_rl.nn.blockwise import Attended, ChunkSizes, Operands
from bpt_rl.nn.context_parallel import ContextAxis
from bpt_rl.nn.ring_attention import Ring, ring_attention

needs_gpu = pytest.mark.skipif(
    "NVIDIA" not in jax.devices()[0].device_kind,
    reason="cuDNN needs an NVIDIA GPU; blockwise covers the ring",
)


def drawn(num_queries, num_keys, dtype=jnp.bfloat16):
    generator = np.random.default_rng(num_queries + num_keys)
    shapes = [(2, num_queries, 4, 64), (2, num_keys, 2, 64), (2, num_keys, 2, 64), (2, num_queries, 4, 64)]
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def test_a_block_is_two_kernels_of_cudnn():
    """JAX's private rules take what this version gives them, and nothing runs twice."""
    assert cudnn_block.obstacle() == ""
    query, key, value, cotangent = drawn(64, 32)

    def both(query, key, value, cotangent):
        operands = Operands(query, key, value, None)
        out, log_sum_exp = cudnn_block.attend_to_block(operands, is_causal=False)
        attended = Attended(out, log_sum_exp, cotangent)
        return out, log_sum_exp, cudnn_block.block_gradient(operands, attended, is_causal=False)

    lowered = jax.jit(both).trace(query, key, value, cotangent).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert [leaf.dtype for leaf in jax.tree.leaves(lowered.out_info)] == [jnp.float32] * 5
    assert [leaf.shape for leaf in lowered.out_info[2]] == [query.shape, key.shape, value.shape]


@needs_gpu
@pytest.mark.parametrize(("num_queries", "num_keys", "is_causal"), [(192, 192, True), (192, 96, False)])
def test_cudnn_finds_in_a_block_what_blockwise_finds(num_queries, num_keys, is_causal):
    query, key, value, cotangent = drawn(num_queries, num_keys)
    # Statistics of more keys than the block's.
    more_key, more_value = drawn(num_queries, 2 * num_keys)[1:3]
    everything = Operands(
        query, jnp.concatenate([key, more_key], 1), jnp.concatenate([value, more_value], 1), None
    )
    sizes = ChunkSizes(64, 64)
    exact = [
        jax.tree.map(lambda x: x.astype(jnp.float32), x)
        for x in (Operands(query, key, value, None), everything)
    ]
    out, log_sum_exp = blockwise.attend_to_block(exact[1], sizes, is_causal=False)
    attended = Attended(out, log_sum_exp, cotangent)

    def of(kernel, operands):
        attend = functools.partial(kernel.attend_to_block, is_causal=is_causal)
        gradient = functools.partial(kernel.block_gradient, is_causal=is_causal)
        if kernel is blockwise:
            return *attend(operands, sizes), *gradient(operands, attended, sizes)
        return *attend(operands), *gradient(operands, attended)

    expected = jax.jit(functools.partial(of, blockwise))(exact[0])
    got = jax.jit(functools.partial(of, cudnn_block))(Operands(query, key, value, None))
    # Weights and results are rounded to 8 bits; the log-sum-exp, second, is not.
    for place, (one, other) in enumerate(zip(got, expected, strict=True)):
        bound = 1e-3 if place == 1 else 2.0**-6
        assert jnp.abs(one - other).max() < bound * jnp.abs(other).max(), place


@needs_gpu
@pytest.mark.devices(2)
def test_a_ring_of_cudnn_finds_what_a_ring_of_blockwise_finds():
    query, key, value, cotangent = drawn(256, 256)
    axis = ContextAxis(name="context", num_devices=2, method="ring")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("context",))

    def values_and_gradients(implementation, *operands):
        ring = Ring("context", 2, axis.placement, True, ChunkSizes(64, 64), implementation)
        attend = jax.shard_map(
            lambda *operands: ring_attention(*operands, None, ring),
            mesh=mesh,
            in_specs=P(None, "context"),
            out_specs=P(None, "context"),
            check_vma=False,
        )
        out, pullback = jax.vjp(attend, *operands[:3])
        return out, *pullback(operands[3].astype(out.dtype))

    operands = (query, key, value, cotangent)
    exact = [x.astype(jnp.float32) for x in operands]
    expected = jax.jit(functools.partial(values_and_gradients, "blockwise"))(*exact)
    got = jax.jit(functools.partial(values_and_gradients, "cudnn"))(*operands)
    for one, other in zip(got, expected, strict=True):
        # As on one device: all is rounded to 8 bits.
        assert jnp.abs(one.astype(jnp.float32) - other).max() < 2.0**-6 * jnp.abs(other).max()
