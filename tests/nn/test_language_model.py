import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bpt_rl.config import ModelConfig
from bpt_rl.nn.language_model import GPT_SHAPES, GPT_VOCABULARY_SIZE, LanguageModel

VOCABULARY_SIZE = 19
CONFIG = ModelConfig(
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    dropout=0.0,
    implementation="reference",
    activations="keep",
)


@pytest.fixture(scope="module")
def make(draw_parameters):
    """Returns (graph, parameters) of a changed configuration; the parameters are always the same."""
    return lambda **changes: draw_parameters(
        lambda: LanguageModel(dataclasses.replace(CONFIG, **changes), VOCABULARY_SIZE, nnx.Rngs(0))
    )


@pytest.fixture(scope="module")
def text():
    """Returns tokens and targets, two rows of eleven."""
    whole = np.random.default_rng(2).integers(VOCABULARY_SIZE, size=(2, 12))
    whole = jnp.asarray(whole, jnp.int32)
    return whole[:, :-1], whole[:, 1:]


@functools.partial(jax.jit, static_argnums=(0, 4))
def losses_and_gradient(graph, params, tokens, targets, vocabulary_chunk_size=7):
    def mean(params):
        model = nnx.merge(graph, params)
        losses = model.losses(tokens, targets, vocabulary_chunk_size=vocabulary_chunk_size)
        return losses.mean(), losses

    gradient, losses = jax.grad(mean, has_aux=True)(params)
    return losses, gradient


@functools.partial(jax.jit, static_argnums=0)
def plain_losses_and_gradient(graph, params, tokens, targets):
    def mean(params):
        embedding = params["embed"]["embedding"]
        logits = nnx.merge(graph, params)(tokens) @ embedding.T
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -chosen.mean(), -chosen

    gradient, losses = jax.grad(mean, has_aux=True)(params)
    return losses, gradient


def assert_close(found, expected, rounding):
    for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=rounding * np.abs(wanted).max())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feedforward_chunk_size": 4},
        {"activations": "save_attention", "implementation": "blockwise", "query_chunk_size": 4},
        {"activations": "recompute", "feedforward_chunk_size": 5},
        {"activations": "offload", "feedforward_chunk_size": 6},
    ],
    ids=str,
)
def test_losses_and_every_gradient_equal_whole_logits_at_every_level(make, text, changes):
    expected = plain_losses_and_gradient(*make(), *text)
    # Sums in another order through two layers: float32 rounding, relative to each leaf's largest entry.
    assert_close(losses_and_gradient(*make(**changes), *text), expected, 2e-5)


def test_the_embedding_learns_from_both_of_its_uses(make, text):
    graph, params = make()
    tokens, targets = jnp.full_like(text[0], 3), jnp.full_like(text[1], 5)
    _, gradient = losses_and_gradient(graph, params, tokens, targets)

    def split_losses(read_in, read_out):
        model = nnx.merge(graph, params | {"embed": {"embedding": read_in}})
        logits = model(tokens) @ read_out.T
        return -jax.nn.log_softmax(logits)[..., 5].mean()

    embedding = params["embed"]["embedding"]
    read_in, read_out = jax.jit(jax.grad(split_losses, argnums=(0, 1)))(embedding, embedding)
    assert np.flatnonzero(np.abs(read_in).sum(axis=1)).tolist() == [3]
    assert np.abs(read_out).min(axis=1).max() > 0
    assert_close(gradient["embed"]["embedding"], read_in + read_out, 2e-5)


def test_a_token_changes_only_what_is_predicted_after_it(make, text):
    tokens, targets = text
    model = make()
    changed = tokens.at[:, 6].set((tokens[:, 6] + 1) % VOCABULARY_SIZE)
    before, _ = losses_and_gradient(*model, tokens, targets)
    after, _ = losses_and_gradient(*model, changed, targets)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.all(before[:, 6:] != after[:, 6:])


def test_dropout_is_drawn_only_with_a_key(make, text):
    graph, params = make(dropout=0.5)
    losses = jax.jit(lambda key: nnx.merge(graph, params).losses(*text, key))
    silent = losses(None)
    # Another program of the same sums: a rounding or two of float32, or on a GPU sums in another order.
    rounding = 1e-6 if jax.default_backend() == "cpu" else 1e-5
    assert_close(silent, losses_and_gradient(*make(), *text)[0], rounding)
    first, second = losses(jax.random.key(0)), losses(jax.random.key(1))
    assert np.all(first != silent)
    assert np.all(first != second)


def test_bfloat16_losses_are_float32_and_near_float32_ones(make, text):
    losses, gradient = losses_and_gradient(*make(compute_dtype="bfloat16"), *text)
    expected, _ = losses_and_gradient(*make(), *text)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((losses, gradient))} == {"float32"}
    # Eight bits in every activation of two layers, of losses up to 8.
    np.testing.assert_allclose(losses, expected, rtol=0, atol=0.1)


def test_a_frequent_tokens_gradient_is_summed_in_float32_however_small_its_terms(make):
    tokens = jnp.full((1, 1024), 3, jnp.int32)
    changes = {"num_layers": 1, "feedforward_chunk_size": 256}
    gradients = [
        losses_and_gradient(*make(compute_dtype=dtype, **changes), tokens, tokens + 2)[1]["embed"][
            "embedding"
        ]
        for dtype in ("bfloat16", "float32")
    ]
    # 1024 nearly equal terms of eight bits each; a bfloat16 sum would stop growing at 256 times one of them.
    np.testing.assert_allclose(
        gradients[0][3], gradients[1][3], rtol=0, atol=0.05 * np.abs(gradients[1][3]).max()
    )


@pytest.mark.parametrize(
    ("shape", "num_parameters"), [("1.3B", 1_310_986_240), ("2.7B", 2_645_406_720), ("6.7B", 6_648_569_856)]
)
def test_shapes_have_the_parameters_that_their_names_say(shape, num_parameters):
    config = GPT_SHAPES[shape]
    model = nnx.eval_shape(lambda: LanguageModel(config, GPT_VOCABULARY_SIZE, nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    # 12 D^2 a layer, V D once, and the norms.
    assert sum(leaf.size for leaf in leaves) == num_parameters
    # Names are rounded, and count learnt positions that rotary ones replace.
    assert num_parameters / 1e9 == pytest.approx(float(shape[:-1]), rel=0.03)
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    assert config.embed_dim == 128 * config.num_heads


def test_a_step_holds_neither_logits_nor_hidden_tensors_of_the_sequence():
    length, vocabulary_size = 4096, 8192
    chunks = {
        "activations": "recompute",
        "query_chunk_size": 128,
        "key_chunk_size": 128,
        "feedforward_chunk_size": 256,
    }
    config = dataclasses.replace(CONFIG, num_layers=1, implementation="blockwise", **chunks)
    model = nnx.eval_shape(lambda: LanguageModel(config, vocabulary_size, nnx.Rngs(0)))
    graph, params = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def temporary_bytes(step, *chunk_size):
        compiled = step.lower(graph, params, tokens, tokens, *chunk_size).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logit_bytes = 4 * length * vocabulary_size
    assert temporary_bytes(plain_losses_and_gradient) > logit_bytes
    # A chunk's logits are a 256th; those of the attention and the [S, 8] streams are smaller.
    assert temporary_bytes(losses_and_gradient, 512) < logit_bytes / 16
