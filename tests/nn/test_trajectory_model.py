import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bpt_rl.config import ModelConfig
from bpt_rl.nn.trajectory_model import ActionDistribution, TrajectoryModel, action_loss
from bpt_rl.types import LAYOUTS, WITHOUT_RETURN, PackedBatch

CONFIG = ModelConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    feedforward_dim=24,
    dropout=0.0,
    activation="silu",  # unlike relu, it is never flat, so that every dependence shows in a gradient
    episode_embedding=3,
    implementation="reference",
    activations="keep",
)
OBSERVED = ("observation", "return_to_go")
OUTCOME = ("action", "reward", "completion")
CONDITIONED = [layout for layout in LAYOUTS if layout not in WITHOUT_RETURN]
FIRST, SECOND = slice(0, 7), slice(7, 11)
"""Steps of the two chains in the packed row of twelve."""


jit_graph = functools.partial(jax.jit, static_argnums=0)


class Result(NamedTuple):
    mean: np.ndarray
    loss: np.ndarray
    parameter_gradient: dict
    """Of the loss."""
    batch_gradient: dict
    """Of the mean, weighted by the cotangent."""


@jit_graph
def _run(graph, params, batch, cotangent):
    def outputs(params, floats):
        mean, log_std = nnx.merge(graph, params)(batch._replace(**floats))
        predicted = ActionDistribution(mean, log_std)
        return mean, action_loss(predicted, batch.action, batch.loss_mask, "deterministic")

    floats = {name: getattr(batch, name) for name in OBSERVED + OUTCOME}
    (mean, loss), pullback = jax.vjp(outputs, params, floats)
    parameter_gradient, _ = pullback((jnp.zeros_like(mean), jnp.ones_like(loss)))
    _, batch_gradient = pullback((cotangent, jnp.zeros_like(loss)))
    return Result(mean, loss, parameter_gradient, batch_gradient)


@jit_graph
def embed(graph, params, batch):
    return nnx.merge(graph, params).embed(batch)


@jit_graph
def distribution(graph, params, batch, key=None):
    return nnx.merge(graph, params)(batch, key)


def run(graph_and_params, batch, cotangent=None):
    zeros = np.zeros(batch.action.shape, np.float32)
    return jax.tree.map(np.asarray, _run(*graph_and_params, batch, zeros if cotangent is None else cotangent))


@pytest.fixture(scope="module")
def make(draw_parameters):
    """Returns (graph, parameters) of a layout; equal parameters for equal layouts, whatever else changes."""
    return lambda layout, **changes: draw_parameters(
        lambda: TrajectoryModel(
            dataclasses.replace(CONFIG, layout=layout, **changes),
            observation_dim=3,
            action_dim=2,
            episode_steps=5,
            rngs=nnx.Rngs(0),
        )
    )


def random_steps(seed, lengths):
    """Steps of one chain of episodes of these lengths."""
    generator = np.random.default_rng(seed)
    T = sum(lengths)
    return PackedBatch(
        observation=generator.normal(size=(T, 3)).astype(np.float32),
        action=generator.uniform(-1, 1, (T, 2)).astype(np.float32),
        reward=generator.random(T).astype(np.float32),
        return_to_go=generator.random(T).astype(np.float32),
        completion=generator.integers(0, 2, T).astype(np.float32),
        step=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        episode=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        segment_ids=np.ones(T, np.int32),
        loss_mask=generator.integers(0, 2, T).astype(np.float32),
    )


CHAINS = (random_steps(1, (5, 2)), random_steps(2, (1, 3)))


def rows(*placed):
    """A batch of three rows of twelve steps with (chain, row, start, segment id) in their places."""
    fields = {}
    for name in PackedBatch._fields:
        like = getattr(CHAINS[0], name)
        fields[name] = np.zeros((3, 12, *like.shape[1:]), like.dtype)
        for chain, row, start, segment in placed:
            steps = getattr(chain, name)
            fields[name][row, start : start + len(steps)] = segment if name == "segment_ids" else steps
    return PackedBatch(**fields)


PACKED = rows((CHAINS[0], 0, 0, 1), (CHAINS[1], 0, 7, 2))
ONE_A_ROW = rows((CHAINS[0], 1, 0, 1), (CHAINS[1], 2, 0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_action_depends_on_the_past_of_its_chain_and_on_nothing_else(make, layout):
    model = make(layout)
    weights = np.random.default_rng(0).normal(size=2).astype(np.float32)
    for t in range(11):
        cotangent = np.zeros((3, 12, 2), np.float32)
        cotangent[0, t] = weights
        gradient = run(model, PACKED, cotangent).batch_gradient
        start = FIRST.start if t < FIRST.stop else SECOND.start
        for name in OBSERVED + OUTCOME:
            # Everything that observation_t follows, and of step t itself what is known before its action.
            is_known = np.zeros((3, 12), bool)
            is_known[0, start : t + (name in OBSERVED)] = True
            unread = ("reward", "completion") if layout == "return_state_action" else ()
            unread = ("return_to_go", "completion") if layout in WITHOUT_RETURN else unread
            if name in unread:
                is_known[:] = False
            depends = gradient[name].reshape(3, 12, -1).any(axis=-1)
            np.testing.assert_array_equal(depends, is_known, err_msg=f"{name} for action {t}")


@pytest.mark.parametrize("layout", CONDITIONED)
def test_chains_packed_in_one_row_are_as_if_alone(make, layout):
    model = make(layout)
    packed, alone = run(model, PACKED), run(model, ONE_A_ROW)
    # Other positions in the row, equal distances: float32 rounding of the rotary angles.
    np.testing.assert_allclose(packed.mean[0, FIRST], alone.mean[1, :7], atol=1e-5)
    np.testing.assert_allclose(packed.mean[0, SECOND], alone.mean[2, :4], atol=1e-5)
    np.testing.assert_allclose(packed.loss, alone.loss, rtol=1e-5)
    for got, expected in zip(*map(jax.tree.leaves, (packed[2], alone[2])), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("layout", CONDITIONED)
def test_what_stands_in_another_chain_changes_nothing(make, layout):
    model = make(layout)
    packed = run(model, PACKED)
    for kept, other in ((FIRST, SECOND), (SECOND, FIRST)):
        changed = jax.tree.map(np.copy, PACKED)
        for name in OBSERVED + OUTCOME:
            getattr(changed, name)[0, other] += 1
        changed.step[0, other] = 0
        changed.episode[0, other] = 2
        got = run(model, changed)
        np.testing.assert_array_equal(got.mean[0, kept], packed.mean[0, kept])
        assert np.abs(got.mean[0, other] - packed.mean[0, other]).max() > 0.01


@pytest.mark.parametrize("layout", CONDITIONED)
def test_padding_does_not_train_whatever_stands_there(make, layout, assert_unmoved):
    model = make(layout)
    expected = run(model, PACKED)
    filled = jax.tree.map(np.copy, PACKED)
    padding = filled.segment_ids == 0
    for name in OBSERVED + OUTCOME:
        getattr(filled, name)[padding] = 7
    filled.step[padding] = 4
    got = run(model, filled)
    assert_unmoved((got.loss, got.parameter_gradient), (expected.loss, expected.parameter_gradient))


def test_loss_is_that_of_the_steps_that_count_alone(make):
    got = run(make("fused"), PACKED)
    squared = np.square(got.mean - PACKED.action).mean(axis=-1)
    counted = PACKED.loss_mask > 0
    assert 0 < counted.sum() < 11
    # float32 sums in another order.
    np.testing.assert_allclose(got.loss, squared[counted].mean(), rtol=1e-6)
    nothing = action_loss(
        ActionDistribution(got.mean, jnp.zeros_like(got.mean)),
        PACKED.action,
        np.zeros((3, 12)),
        "deterministic",
    )
    assert nothing == 0


def test_chunks_and_remat_change_neither_loss_nor_gradients(make):
    layout = "return_state_action_reward"
    changes = {"query_chunk_size": 16, "key_chunk_size": 20, "feedforward_chunk_size": 10}
    expected = run(make(layout), PACKED)
    got = run(make(layout, implementation="blockwise", activations="recompute", **changes), PACKED)
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-5)
    for g, e in zip(*map(jax.tree.leaves, (got.parameter_gradient, expected[2])), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize("layout", CONDITIONED)
def test_rows_of_one_chain_need_no_segment_ids(make, layout):
    expected, got = run(make(layout), ONE_A_ROW), run(make(layout), ONE_A_ROW._replace(segment_ids=None))
    # Padding, which does not count, may now see the chain before it: only what XLA fuses differs, which on a GPU is
    # also how it sums.
    rounding = 1e-6 if jax.default_backend() == "cpu" else 1e-5
    np.testing.assert_allclose(got.loss, expected.loss, rtol=rounding)
    for g, e in zip(
        *map(jax.tree.leaves, (got.parameter_gradient, expected.parameter_gradient)), strict=True
    ):
        np.testing.assert_allclose(g, e, rtol=0, atol=rounding * max(np.abs(e).max(), 1e-6))


def test_tokens_of_a_step_stand_together_in_the_order_of_the_layout(make):
    """A change of one field at step 3 of row 0 changes the tokens that carry it, and no others."""
    carriers = {
        "return_state_action_reward": {
            "return_to_go": 12,
            "observation": 13,
            "action": 14,
            "reward": 15,
            "completion": 15,
        },
        "return_state_action": {"return_to_go": 9, "observation": 10, "action": 11},
        "state_action_reward": {"observation": 9, "action": 10, "reward": 11},
        "fused": {"return_to_go": 3, "observation": 3, "action": 4, "reward": 4, "completion": 4},
        "fused_without_return": {"observation": 3, "action": 4, "reward": 4},
    }
    for layout, places in carriers.items():
        model = make(layout)
        before = np.asarray(embed(*model, PACKED))
        assert before.shape == (3, 12 * LAYOUTS[layout], 16)
        for name, place in places.items():
            changed = jax.tree.map(np.copy, PACKED)
            getattr(changed, name)[0, 3] += 1
            moved = np.abs(np.asarray(embed(*model, changed)) - before).max(axis=-1) > 1e-6
            np.testing.assert_array_equal(np.argwhere(moved), [[0, place]], err_msg=f"{layout} {name}")
        for name in ("step", "episode"):
            changed = jax.tree.map(np.copy, PACKED)
            getattr(changed, name)[0, 3] -= 1 if name == "step" else -1
            moved = np.abs(np.asarray(embed(*model, changed)) - before).max(axis=-1) > 1e-6
            own = range(3 * LAYOUTS[layout], 4 * LAYOUTS[layout])
            np.testing.assert_array_equal(np.argwhere(moved), [[0, s] for s in own])


def test_positions_count_the_context_or_the_episode_or_nothing(make):
    # Through one layer, the order of past tokens shows in their positions alone.
    swapped = jax.tree.map(np.copy, ONE_A_ROW)
    for values in swapped:
        values[1, :2] = values[1, 1::-1].copy()
    means = {}
    for positions in ("context", "episode", "none"):
        model = make("return_state_action", positions=positions, num_layers=1)
        kept, moved = (np.asarray(distribution(*model, batch).mean)[1] for batch in (ONE_A_ROW, swapped))
        follows_the_context = np.abs(kept - moved)[2:7].max() > 1e-3
        assert follows_the_context == (positions == "context")
        means[positions] = kept
    # Both counts are one within the first episode.
    np.testing.assert_allclose(means["context"][:5], means["episode"][:5], atol=1e-5)
    assert np.abs(means["context"] - means["episode"])[5:7].max() > 1e-3
    assert np.abs(means["none"] - means["episode"])[1:5].max() > 1e-3


def test_layer_norm_takes_away_the_mean_that_the_root_mean_square_keeps(make):
    for norm, is_kept in (("rms", True), ("layer", False)):
        graph, params = make("fused", norm=norm)
        assert all(
            ("bias" in params["transformer"]["blocks"][f"{part}_norm"]) == (norm == "layer")
            for part in ("attention", "feedforward")
        )
        raised = params | {"embed_step": {"embedding": params["embed_step"]["embedding"] + 1}}
        before, after = (np.asarray(embed(graph, p, PACKED)) for p in (params, raised))
        assert (np.abs(after - before).max() > 0.01) == is_kept


def test_episodes_beyond_the_embedding_share_its_last_entry(make):
    model = make("fused")
    two, three, nine = (
        np.asarray(embed(*model, PACKED._replace(episode=np.full((3, 12), e, np.int32)))) for e in (1, 2, 9)
    )
    np.testing.assert_array_equal(three, nine)
    assert np.abs(three - two).max() > 0.01


def test_without_episode_embedding_the_episode_is_not_seen(make):
    model = make("fused", episode_embedding=0)
    one, two = (
        np.asarray(embed(*model, PACKED._replace(episode=np.full((3, 12), e, np.int32)))) for e in (0, 1)
    )
    np.testing.assert_array_equal(one, two)


def test_gaussian_loss_is_the_negative_log_likelihood_up_to_its_constant():
    generator = np.random.default_rng(0)
    mean, action = generator.uniform(-1, 1, (2, 3, 4, 2))
    log_std = generator.uniform(-3, 1, (3, 4, 2))
    mask = generator.integers(0, 2, (3, 4)).astype(np.float64)
    std = np.exp(log_std)
    density = np.exp(-0.5 * ((action - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    expected = (-np.log(density).mean(axis=-1) * mask).sum() / mask.sum() - 0.5 * np.log(2 * np.pi)
    arrays = (jnp.asarray(x, jnp.float32) for x in (mean, log_std, action, mask))
    mean, log_std, action, mask = arrays
    # float32 against float64.
    got = action_loss(ActionDistribution(mean, log_std), action, mask, "gaussian")
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gaussian_head_has_a_deviation_of_its_own_within_bounds(make):
    graph, params = make("fused", action_distribution="gaussian")
    head = {"kernel": np.zeros((16, 4), np.float32), "bias": np.array([0.5, -9, -7, 0.5], np.float32)}
    mean, log_std = distribution(graph, params | {"head": head}, PACKED)
    np.testing.assert_allclose(mean[0, 0], np.tanh([0.5, -9]), rtol=1e-6)
    np.testing.assert_allclose(log_std[0, 0], [-5, 0.5], rtol=1e-6)


def test_dropout_of_the_embedding_follows_the_key(make):
    graph, params = make("fused", dropout=0.5)
    # With no residual branch, all the noise there can be is the embedding's.
    blocks = jax.tree.map(np.zeros_like, params["transformer"]["blocks"])
    params = params | {"transformer": params["transformer"] | {"blocks": blocks}}
    first, again, other = (
        np.asarray(distribution(graph, params, PACKED, jax.random.key(seed)).mean) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
