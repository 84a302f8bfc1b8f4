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


def reference_chain(store, config, generator):
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
        starts = [int(generator.integers(t.num_steps - config.window, endpoint=True)) for t in trajectories]
        windows = [slice(start, start + config.window) for start in starts]
    return build_chain(
        trajectories,
        config.task,
        relabel=config.relabel,
        completion=config.completion,
        loss_on=config.loss_on,
        windows=windows,
    )


def reference(store, config, sampler, seed, index):
    generator = np.random.default_rng([seed, index])
    chains = [reference_chain(store, config, generator) for _ in range(config.batch_size)]
    return pack(chains, sampler.context_length, layout="fused", num_rows=sampler.num_rows)


def check_same_bits(batch, expected, hint):
    for name, array in expected._asdict().items():
        got = np.asarray(getattr(batch, name))
        assert (got.dtype, got.shape) == (array.dtype, array.shape), (name, hint)
        assert got.tobytes() == array.tobytes(), (name, hint)


def samplers(store, config, seed):
    return {
        place: ChainSampler(store, dataclasses.replace(config, place=place), "fused", seed)
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
