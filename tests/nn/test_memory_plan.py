"""Planned bytes and operations against what differentiation keeps, what compiled steps report, and an H100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bpt_rl import config_toml
from bpt_rl.config import ModelConfig, TrainConfig
from bpt_rl.nn.memory_plan import (
    IN_HOST,
    LEVELS,
    count_flops,
    kept_bytes_per_token,
    longest_context,
    plan_memory,
)
from bpt_rl.nn.transformer import Transformer
from bpt_rl.nn.workload import Workload

GIB = 2**30
SMALL = ModelConfig(
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    dropout=0.0,
    implementation="blockwise",
    query_chunk_size=16,
    key_chunk_size=16,
    compute_dtype="bfloat16",
)


def workload(model, tokens, implementation="blockwise", **changes):
    fields = {"num_parameters": 1000, **changes}
    return Workload(model=model, implementation=implementation, context_length=tokens, **fields)


def forward(model, tokens, num_rows=1):
    """Returns the transformer as a function of parameters and token embeddings, and the shapes of those."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0))))
    key = jax.random.key(0) if model.dropout else None

    def apply(state, x):
        return nnx.merge(graph, state)(x, None, key)

    return apply, (state, jax.ShapeDtypeStruct((num_rows, tokens, model.embed_dim), jnp.bfloat16))


def kept_bytes(model, tokens):
    """Returns the bytes that JAX keeps, layer by layer, between the forward and the backward pass."""
    apply, shapes = forward(model, tokens)
    kept = jax.eval_shape(lambda *operands: jax.vjp(apply, *operands)[1], *shapes)
    # Layers are scanned: what each keeps is stacked, what they share is not. No other axis has that length.
    leaves = [leaf for leaf in jax.tree.leaves(kept) if leaf.shape[:1] == (model.num_layers,)]
    # A chunk's dropout key is a few bytes a chunk, not a token.
    arrays = [leaf for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


@pytest.mark.parametrize(
    ("activations", "changes"),
    [
        ("keep", {}),
        ("keep", {"feedforward_chunk_size": 16, "dropout": 0.1, "compute_dtype": "float32"}),
        ("keep", {"num_kv_heads": 2, "feedforward_dim": 96, "activation": "gelu"}),
        ("keep", {"activation": "silu", "dropout": 0.1, "compute_dtype": "float32"}),
        ("save_attention", {}),
        ("save_attention", {"num_kv_heads": 2, "feedforward_chunk_size": 16, "compute_dtype": "float32"}),
        ("offload_attention", {}),
        ("recompute", {"dropout": 0.1}),
    ],
)
def test_a_layer_keeps_of_a_token_what_differentiation_keeps(activations, changes):
    # More layers than are ever compiled one by one.
    model = dataclasses.replace(SMALL, num_layers=33, activations=activations, **changes)
    # What weights take does not grow with tokens.
    grown = kept_bytes(model, 64) - kept_bytes(model, 32)
    is_sixth_kept = model.activation == "gelu" and jax.__version_info__ < (0, 11)
    sixth = 2 * model.feedforward_dim * is_sixth_kept
    assert grown == 33 * 32 * (kept_bytes_per_token(workload(model, 64), activations) + sixth)


def product_flops(jaxpr):
    """Returns twice the multiplications of all matrix products of a program, loops of known length unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([operand[axis] for axis in contracted]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * product_flops(inner)
    return total


@pytest.mark.parametrize(
    ("activations", "chunk", "groups", "num_forward"),
    [
        ("keep", 64, {}, 1),
        ("keep", 16, {}, 1),
        ("keep", 64, {"layer_groups": 2}, 2),
        ("recompute", 64, {}, 2),
        ("recompute", 16, {}, 2),
        ("recompute", 16, {"layer_groups": 2, "num_layers": 4}, 3),
    ],
)
def test_operations_are_those_of_the_differentiated_program(activations, chunk, groups, num_forward):
    changes = {"activations": activations, "feedforward_chunk_size": chunk, "num_kv_heads": 2, **groups}
    model = dataclasses.replace(SMALL, implementation="reference", feedforward_dim=80, **changes)
    apply, shapes = forward(model, 64, num_rows=3)
    step = jax.grad(lambda *operands: apply(*operands).astype(jnp.float32).sum(), argnums=(0, 1))
    counted = product_flops(jax.make_jaxpr(step)(*shapes).jaxpr)
    flops = count_flops(workload(model, 64, num_rows=3), activations)
    # The reference computes both halves of the matrix and keeps the weights: two products forward and four backward,
    # where a fused kernel has five, of half the matrix.
    half_products = flops.attention // (model.num_layers * 3 * 64**2 * 32)
    assert half_products == 5 + 2 * num_forward
    assert counted == flops.matrices + 2 * (half_products - 1) * (model.num_layers * 3 * 64**2 * 32)


def compiled_bytes(model, tokens):
    """Returns the temporary bytes of a compiled gradient of all parameters."""
    apply, shapes = forward(model, tokens)
    step = jax.jit(jax.grad(lambda *operands: apply(*operands).astype(jnp.float32).sum()))
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_compiled_memory_grows_with_layers_as_planned():
    # float32, since XLA widens 16-bit products on a CPU, and keeps both forms; the reference compiles fastest.
    changes = {"compute_dtype": "float32", "implementation": "reference", "activations": "recompute"}
    model = dataclasses.replace(SMALL, **changes)

    def grown(tokens):
        temporary = [
            compiled_bytes(dataclasses.replace(model, num_layers=layers), tokens) for layers in (2, 6)
        ]
        return temporary[1] - temporary[0]

    # Between lengths, so that weights, their gradients and the stacks of them go out.
    expected = 4 * 256 * kept_bytes_per_token(workload(model, 512), "recompute")
    np.testing.assert_allclose(grown(512) - grown(256), expected, rtol=0.02)


# Temporary GiB of the compiled training step on one H100 80 GB (`bpt-rl bench step at_350m --compile-only`): 24 layers,
# width 1024, 8 heads of 128, bfloat16, gelu, no dropout, feedforward chunks of 4096, one row of one chain; 3.4 GiB of
# parameters, AdamW and batch beside. Last, how far off the plan may be: a tenth is asked for.
MEASURED = [
    (32_768, "save_attention", {}, 4.971, 0.02),
    (32_768, "offload_attention", {}, 1.997, 0.02),
    (32_768, "recompute", {}, 3.448, 0.02),
    # Compiled for an H100 without one.
    (32_768, "keep", {}, 30.711, 0.05),
    (131_072, "save_attention", {}, 16.332, 0.01),
    (131_072, "offload_attention", {}, 4.488, 0.01),
    (131_072, "recompute", {}, 10.238, 0.01),
    (131_072, "recompute", {"layer_groups": 4}, 7.301, 0.03),
    (131_072, "save_attention", {"layer_groups": 4}, 8.824, 0.03),
    (131_072, "offload", {"layer_groups": 4}, 5.051, 0.03),
    (131_072, "offload", {}, 4.488, 0.01),
    (524_288, "save_attention", {}, 61.829, 0.01),
    (524_288, "offload_attention", {}, 14.453, 0.01),
    (524_288, "recompute", {}, 37.453, 0.01),
    (524_288, "recompute", {"head_groups": 8}, 31.731, 0.01),
    (524_288, "offload", {"head_groups": 8}, 8.739, 0.01),
    (524_288, "save_attention", {"head_groups": 8}, 56.786, 0.01),
    # From here on the compiler does with one stream less.
    (1_048_576, "offload_attention", {}, 25.241, 0.1),
    (1_048_576, "recompute", {}, 71.231, 0.04),
    (1_048_576, "recompute", {"head_groups": 2}, 69.256, 0.02),
    (1_048_576, "save_attention", {"layer_groups": 4}, 58.491, 0.06),
    (1_048_576, "recompute", {"layer_groups": 4}, 46.303, 0.06),
    (1_048_576, "offload", {"layer_groups": 4}, 28.303, 0.1),
    (2_097_152, "offload", {}, 49.315, 0.1),
    (2_097_152, "offload", {"head_groups": 8}, 31.297, 0.02),
    (4_194_304, "offload", {"head_groups": 8}, 59.381, 0.04),
    (4_194_304, "offload", {"head_groups": 8, "layer_groups": 6}, 59.733, 0.04),
    (65_536, "recompute", {"implementation": "blockwise"}, 6.034, 0.03),
    (65_536, "save_attention", {"implementation": "blockwise"}, 9.407, 0.03),
]
LARGE = config_toml.load(TrainConfig, "at_350m").model


@pytest.mark.parametrize(("tokens", "activations", "changes", "temporary", "tolerance"), MEASURED)
def test_planned_bytes_are_those_of_a_compiled_step(tokens, activations, changes, temporary, tolerance):
    model = dataclasses.replace(LARGE, **changes)
    implementation = changes.get("implementation", "cudnn")
    work = workload(model, tokens, implementation, num_parameters=303_109_126)
    plan = plan_memory(work, activations)
    assert plan.parameters + plan.optimizer == pytest.approx(3.4 * GIB, rel=0.01)
    assert plan.device == pytest.approx((3.4 + temporary) * GIB, rel=tolerance)


# Temporary GiB of a step of at_small, bfloat16, on 64 rows of 1000 tokens, compiled for an H100 by jax 0.11.2.
UNROLLED = [
    ({}, 2.825),
    ({"dropout": 0.0}, 2.657),
    ({"activation": "relu"}, 1.864),
    ({"activation": "silu", "num_kv_heads": 2}, 2.214),
    ({"num_layers": 2}, 1.537),
    ({"num_layers": 8}, 5.402),
    ({"compute_dtype": "float32", "implementation": "blockwise"}, 5.293),
]


@pytest.mark.parametrize(("changes", "temporary"), UNROLLED)
def test_planned_bytes_of_a_small_step_are_those_of_a_compiled_one(changes, temporary):
    model = config_toml.load(TrainConfig, "at_small").model
    model = dataclasses.replace(model, **{"compute_dtype": "bfloat16"} | changes)
    implementation = changes.get("implementation", "cudnn")
    num_parameters = model.num_layers * 12 * 256**2 + 300_000
    work = workload(model, 1000, implementation, num_parameters=num_parameters, num_rows=64)
    assert plan_memory(work, "keep").temporary == pytest.approx(temporary * GIB, rel=0.08)


def test_planned_host_bytes_are_those_of_a_compiled_step():
    def host_gib(tokens, activations, **changes):
        work = workload(dataclasses.replace(LARGE, **changes), tokens, "cudnn")
        return plan_memory(work, activations).host / GIB

    assert host_gib(1_048_576, "offload_attention") == 96.75
    assert host_gib(2_097_152, "offload") == 96
    assert host_gib(4_194_304, "offload", layer_groups=6, head_groups=8) == 80
    assert host_gib(131_072, "recompute") == 0


@pytest.mark.parametrize("activations", LEVELS)
def test_the_longest_context_fits_and_one_token_more_does_not(activations):
    work = workload(LARGE, 4096, "cudnn", num_parameters=303_109_126, num_rows=2)
    longest = longest_context(work, activations, 80 * GIB)

    def row(tokens):
        return dataclasses.replace(work, num_rows=1, context_length=tokens)

    here, more = (plan_memory(row(tokens), activations).device for tokens in (longest, longest + 1))
    assert here <= 80 * GIB < more
    assert longest_context(work, activations, 2**30) == 0
    halved = longest_context(
        work, activations, 80 * GIB, host_memory=plan_memory(row(longest), activations).host // 2
    )
    assert halved == (longest // 2 if activations in IN_HOST else longest)


def test_each_level_holds_less_and_computes_no_less_than_the_one_before():
    for chunk in (256, 4096):
        work = workload(dataclasses.replace(LARGE, feedforward_chunk_size=chunk), 2048, "cudnn")
        plans = [plan_memory(work, level) for level in LEVELS]
        # Levels in the host's memory hold nothing on the device, and in all what the same level holds there.
        device = [plan.device for level, plan in zip(LEVELS, plans, strict=True) if level not in IN_HOST]
        assert device == sorted(set(device), reverse=True)
        for moved, level in (("offload_attention", "save_attention"), ("offload", "recompute")):
            there, here = plan_memory(work, moved), plan_memory(work, level)
            arriving = 2048 * 1024 * 2
            assert (there.kept, there.host) == (0, here.kept)
            assert there.device == here.device - here.kept + arriving
        flops = [count_flops(work, level) for level in LEVELS]
        totals = [count.attention + count.matrices for count in flops]
        assert totals == sorted(totals)


def test_rows_and_micro_batches_count():
    one = workload(LARGE, 8192, "cudnn")
    rows = dataclasses.replace(one, num_rows=3)
    micro_batches = dataclasses.replace(one, accumulation=3)
    plans = [plan_memory(work, "save_attention") for work in (one, rows, micro_batches)]
    assert plans[1].kept == 3 * plans[0].kept
    assert plans[2] == dataclasses.replace(plans[0], gradients=2 * plans[0].gradients)
    flops = [count_flops(work, "recompute") for work in (one, rows, micro_batches)]
    assert flops[1] == flops[2]
    assert flops[1].attention == 3 * flops[0].attention


def test_shared_keys_take_less_and_their_whole_gradients_more():
    work = workload(LARGE, 131_072, "cudnn")
    shared = dataclasses.replace(work, model=dataclasses.replace(LARGE, num_kv_heads=2))
    saved = plan_memory(work, "recompute").layer - plan_memory(shared, "recompute").layer
    # Keys, values and their gradients of six heads fewer; a gradient a query head of both for a while.
    tensors = 4 * 6 * 128 - 2 * 1024
    weights = 2 * 2 * 6 * 128 * 1024
    assert saved == 2 * (131_072 * tensors + weights)


def test_a_feedforward_in_one_piece_makes_the_largest_temporary():
    def layer(chunk):
        model = dataclasses.replace(LARGE, feedforward_chunk_size=chunk)
        return plan_memory(workload(model, 131_072, "cudnn"), "recompute").layer

    whole, weights = layer(131_072), 2 * 2 * 12 * 1024**2
    # Nine 16-bit tensors of the stream's size; the norm's three in float32, two statistics and its 16-bit result; the
    # five hidden tensors that gelu's derivative reads, and the gradients before and behind it.
    token = 9 * 2 * 1024 + (3 * 4 * 1024 + 2 * 4 + 2 * 1024) + 4096 * (5 * 2 + 2 * 2)
    assert whole == 131_072 * token + weights
    assert layer(4096) == layer(2048) < whole / 2


def test_dropout_keeps_a_mask_of_the_embeddings():
    masked = workload(dataclasses.replace(LARGE, dropout=0.1), 4096, "cudnn")
    plans = [plan_memory(work, "recompute") for work in (workload(LARGE, 4096, "cudnn"), masked)]
    assert plans[1].embeddings - plans[0].embeddings == 4096 * 1024


def test_a_state_in_the_host_leaves_a_copy_in_the_compute_type_until_the_update():
    def both(tokens, **changes):
        model = dataclasses.replace(LARGE, **changes)
        here = workload(model, tokens, "cudnn", num_parameters=303_109_126)
        there = dataclasses.replace(here, optimizer_in_host=True)
        return plan_memory(here, "offload"), plan_memory(there, "offload")

    here, there = both(131_072)
    moments, kernels = 8 * 303_109_126, 24 * 12 * 1024**2
    assert (there.optimizer, there.host - here.host) == (0, moments + 4 * 303_109_126)
    assert here.device - there.device == moments + 2 * kernels
    here, there = both(131_072, compute_dtype="float32")
    assert here.device - there.device == moments
    # The update has two layers of parameters and moments beside all gradients, and what is no layer's.
    layer, rest = 12 * 1024**2, 303_109_126 - kernels
    assert there.update == 4 * 303_109_126 + 12 * (2 * layer + rest)
    assert here.update == 16 * 303_109_126
