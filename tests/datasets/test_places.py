"""Every place against the slow reference: chains built and packed from episodes read one at a time."""

import dataclasses
import functools
import itertools
import shutil

import jax
import numpy as np
import pytest

from bpt_rl.config import DataConfig
from bpt_rl.datasets.chains import build_chain
from bpt_rl.datasets.packing import pack
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store

PLACES = ("accelerator", "host", "stream")
LONGEST = 12


@pytest.fixture(scope="module")
def store(short_store):
    with Store.open(short_store) as opened:
        yield opened


@functools.cache
def episodes_and_returns(store, task):
    """All episodes, with the reward of a task that the store may have to compute."""
    name = f"reward/{task}"
    reward = store.block((name,), 0, store.num_episodes)[name]
    episodes = [store.episode(i) for i in range(store.num_episodes)]
    relabelled = [
        dataclasses.replace(episode, task_reward={task: values[: episode.num_steps + 1]})
        for episode, values in zip(episodes, reward, strict=True)
    ]
    return relabelled, store.returns(task)


def reference_chain(store, config, generator, expected=None):
    episodes, returns = episodes_and_returns(store, config.task)
    ascending = np.argsort(returns, kind="stable")
    eligible = ascending[-max(1, round(config.top_fraction * len(ascending))) :]
    if config.draw == "uniform":
        picked = generator.choice(eligible, config.num_trajectories, replace=False)
    else:
        picked = [generator.choice(band) for band in np.array_split(eligible, config.num_trajectories)]
    trajectories = [episodes[i] for i in picked]
    windows = None
    if config.window:
        kept = config.window if config.window_start == "inside" else 1
        starts = [int(generator.integers(t.num_steps - kept, endpoint=True)) for t in trajectories]
        stops = [min(s + config.window, t.num_steps) for s, t in zip(starts, trajectories, strict=True)]
        windows = [slice(*pair) for pair in zip(starts, stops, strict=True)]
    if config.order == "collected":
        order = np.argsort(picked)
        trajectories = [trajectories[i] for i in order]
        windows = windows and [windows[i] for i in order]
        picked = np.sort(picked)
    return build_chain(
        trajectories,
        config.task,
        relabel=config.relabel,
        expected=None if expected is None else [expected[i] for i in picked],
        completion=config.completion,
        loss_on=config.loss_on,
        windows=windows,
        order="ascending" if config.order == "ascending" else "given",
    )


def reference(store, config, sampler, seed, index, expected=None):
    generator = np.random.default_rng([seed, index])
    chains = [reference_chain(store, config, generator, expected) for _ in range(config.batch_size)]
    return pack(chains, sampler.context_length, layout="fused", num_rows=sampler.num_rows)


def reference_of_a_mixture(store, config, sampler, seed, index, expected=None):
    """Each row is packed for itself, with as many chains of its size as are sure to fit."""
    generator = np.random.default_rng([seed, index])
    sizes = generator.choice(sorted(set(config.mixture)), sampler.num_rows)
    rows = {}
    for size in np.unique(sizes).tolist():
        one = dataclasses.replace(config, num_trajectories=size, mixture=())
        per_row = sampler.context_length // (size * min(config.window or LONGEST, LONGEST))
        for row in np.flatnonzero(sizes == size).tolist():
            chains = [reference_chain(store, one, generator, expected) for _ in range(per_row)]
            rows[row] = pack(chains, sampler.context_length, layout="fused", num_rows=1)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *(rows[i] for i in range(len(rows))))


def check_same_bits(batch, expected, hint):
    for name, array in expected._asdict().items():
        got = np.asarray(getattr(batch, name))
        assert (got.dtype, got.shape) == (array.dtype, array.shape), (name, hint)
        assert got.tobytes() == array.tobytes(), (name, hint)


def samplers(store, config, seed, **options):
    return {
        place: ChainSampler(store, dataclasses.replace(config, place=place), "fused", seed, **options)
        for place in PLACES
    }


# Two chains a row and one step of padding; the best six of eight.
@pytest.mark.parametrize("shared_rows", [False, True])
@pytest.mark.parametrize("window", [0, 4])
def test_all_places_give_the_bits_of_the_reference_under_every_option(store, window, shared_rows):
    options = itertools.product(
        ("uniform", "return_stratified"),
        ("chain_maximum", "own_return"),
        ("per_episode", "per_step"),
        ("all", "last"),
    )
    for seed, (draw, relabel, completion, loss_on) in enumerate(options):
        config = DataConfig(
            # The store computes the reward of every other sampler's task as it is read.
            task=("cartpole_swingup", "cartpole_balance")[seed % 2],
            num_trajectories=3,
            batch_size=5,
            draw=draw,
            relabel=relabel,
            completion=completion,
            loss_on=loss_on,
            window=window,
            context_length=shared_rows * (2 * 3 * (window or LONGEST) + 1),
            top_fraction=0.75 if shared_rows else 1.0,
        )
        made = samplers(store, config, seed)
        for index in (0, 7):
            expected = reference(store, config, made["host"], seed, index)
            for place, sampler in made.items():
                assert sampler.choice.place == place
                check_same_bits(sampler.batch(index), expected, (place, config))


MIXED = {"mixture": (1, 2, 4), "num_trajectories": 4, "batch_size": 3}
"""Rows hold four chains of one, two of two or one of four."""


@pytest.mark.parametrize(
    "changes",
    [
        MIXED | {"loss_on": "last", "completion": "per_step", "context_length": 2 * 4 * LONGEST + 1},
        MIXED | {"order": "collected", "relabel": "own_return"},
        MIXED | {"relabel": "expected_return", "completion": "per_step", "window": 5},
        {"num_trajectories": 2, "relabel": "expected_return", "order": "collected", "batch_size": 3},
        {"num_trajectories": 1, "window": 14, "window_start": "anywhere", "batch_size": 9},
    ],
    ids=["mixture", "collected", "expected", "expected, no mixture", "windows that end with their episode"],
)
def test_all_places_give_the_bits_of_the_reference_of_what_varies_in_size_or_order(store, changes, tmp_path):
    config, expected, options = DataConfig(task="cartpole_swingup", **changes), None, {}
    if config.relabel == "expected_return":
        expected = np.random.default_rng(0).normal(size=(store.num_episodes, 13)).astype(np.float32)
        np.save(tmp_path / "expected.npy", expected)
        options = {"expected_return": tmp_path / "expected.npy"}
    make = reference_of_a_mixture if config.mixture else reference
    made = samplers(store, config, 3, **options)
    shapes = set()
    for index in range(6):
        wanted = make(store, config, made["host"], 3, index, expected)
        shapes |= {np.shape(array) for array in made["host"].plan(index)}
        for place, sampler in made.items():
            check_same_bits(sampler.batch(index), wanted, (place, index))
    # No step is compiled anew, whatever sizes were drawn.
    assert len(shapes) == 1


def test_a_batch_made_on_the_accelerator_stays_there(store):
    config = DataConfig(task="cartpole_swingup", num_trajectories=2, batch_size=1)
    batches = {place: sampler.batch(0) for place, sampler in samplers(store, config, 0).items()}
    assert all(isinstance(array, jax.Array) for array in batches["accelerator"])
    assert all(isinstance(array, np.ndarray) for place in ("host", "stream") for array in batches[place])


def test_batches_in_memory_share_nothing_with_the_episodes_or_each_other(store):
    config = DataConfig(task="cartpole_swingup", num_trajectories=8, batch_size=1, place="host")
    sampler = ChainSampler(store, config, "fused", 0)
    first = sampler.batch(0)
    expected = [array.copy() for array in first]
    for array in sampler.batch(0):
        array[...] = 99
    for array, values in zip(first, expected, strict=True):
        np.testing.assert_array_equal(array, values)
    check_same_bits(sampler.batch(0), first._make(expected), "after writing into another batch")


def test_only_the_stream_reads_the_file_after_the_first_batch(short_store, tmp_path):
    path = tmp_path / "store.h5"
    shutil.copy(short_store, path)
    config = DataConfig(task="cartpole_swingup", num_trajectories=2, batch_size=2)
    with Store.open(path) as store:
        made = samplers(store, config, 0)
        expected = {place: sampler.batch(1) for place, sampler in made.items()}
    for place in ("accelerator", "host"):
        check_same_bits(made[place].batch(1), type(expected[place])(*map(np.asarray, expected[place])), place)
    with pytest.raises(KeyError, match="invalid identifier"):
        made["stream"].batch(1)


@pytest.mark.parametrize("place", PLACES)
def test_rewards_that_are_not_finite_are_refused_in_every_place(short_store, edited, tmp_path, place):
    path = tmp_path / "store.h5"
    shutil.copy(short_store, path)
    with edited(path) as file:
        file["reward/cartpole_swingup"][3, 5] = np.nan
    with Store.open(path) as store:
        config = DataConfig(task="cartpole_swingup", num_trajectories=8, batch_size=1, place=place)
        sampler = ChainSampler(store, config, "fused", 0)
        with pytest.raises(ValueError, match=r"only finite values; got \d+ steps, 1 of them not finite"):
            sampler.batch(0)
