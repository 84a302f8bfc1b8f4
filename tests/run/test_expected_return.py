"""Expected returns in a run: the labels, a run that goes on, and its evaluation."""

import dataclasses

import numpy as np
import pytest

from bpt_rl.config import EvaluateConfig
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store
from bpt_rl.expected_return_config import ExpectedReturnConfig
from bpt_rl.nn.value_function import Steps, fit_value
from bpt_rl.run.evaluate import evaluate_run
from bpt_rl.run.train import train

FIT = ExpectedReturnConfig(num_updates=40, batch_size=64, hidden_dim=8, held_out=0.34)
TASK = "cartpole_swingup"


class InterruptionError(Exception):
    pass


@pytest.fixture(scope="module")
def make(tiny):
    """Returns a configuration that is relabelled by expected returns, on a mixture of one and two trajectories."""
    changes = {"relabel": "expected_return", "mixture": (1, 2), "expected_return": FIT}
    return lambda run, **more: tiny(run, **(changes | more))


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    """A run whose every two steps were trained in a process of their own, as far as it can tell."""
    path = tmp_path_factory.mktemp("expected") / "at"
    announced = []

    def stop(step, *_):
        if step == 3:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        train(make(path), stop, announce=announced.append)
    run = train(make(path), announce=announced.append)
    found = [line for line in announced if line.startswith("Expected returns")]
    assert "held-out error" in found[0]
    assert found[1] == "Expected returns: as when the run began."
    return run


def test_a_step_is_asked_for_its_reward_and_what_follows_from_the_next_state(folder, store_path):
    statistics = folder.statistics()
    labels = np.load(folder.expected_return_path)
    with Store.open(store_path) as store:
        episodes = [store.episode(i) for i in range(store.num_episodes)]
    drawn = np.random.default_rng(FIT.seed).permutation(6)

    def steps(chosen):
        parts = []
        for i in sorted(chosen):
            reward = episodes[i].task_reward[TASK][1:].astype(np.float64)
            observation = (episodes[i].observation - statistics.observation_mean) / statistics.observation_std
            parts.append((observation[:-1], np.arange(50) / 50, np.cumsum(reward[::-1])[::-1]))
        return Steps(*(np.concatenate(p).astype(np.float32) for p in zip(*parts, strict=True)))

    fit = fit_value(FIT, steps(drawn[2:]), steps(drawn[:2]))
    for episode, label in zip(episodes, labels, strict=True):
        reward = episode.task_reward[TASK][1:]
        observation = (episode.observation - statistics.observation_mean) / statistics.observation_std
        after = np.asarray(
            fit(observation[1:50].astype(np.float32), (np.arange(1, 50) / 50).astype(np.float32))
        )
        # 40 updates of a network that saw the same numbers up to their rounding.
        np.testing.assert_allclose(label[:50], reward + np.append(after, 0), atol=1e-3)
        assert label[50] == 0


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    folder, make, tmp_path, read_state, assert_same_bits
):
    whole = train(make(tmp_path / "whole", place="stream"))
    assert whole.expected_return_path.read_bytes() == folder.expected_return_path.read_bytes()
    assert_same_bits(read_state(whole), read_state(folder))


def test_training_and_evaluation_ask_for_what_was_expected(folder, store_path, environments):
    config, labels = folder.config(), np.load(folder.expected_return_path)
    with Store.open(store_path) as store:
        sampler = ChainSampler(
            store, config.data, "fused", config.seed, expected_return=folder.expected_return_path
        )
        batch = sampler.batch(0)
        first = {tuple(store.episode(i).observation[0]): i for i in range(6)}
    starts = np.argwhere((batch.step == 0) & (batch.segment_ids > 0))
    assert len(starts) == 4
    for row, t in starts:
        label = labels[first[tuple(np.asarray(batch.observation)[row, t])]]
        np.testing.assert_array_equal(batch.return_to_go[row, t : t + 50], label[:50])
    asked = EvaluateConfig(
        num_chains=3, num_episodes=1, random=False, context_order="best", num_context_trajectories=1
    )
    record = evaluate_run(folder.path, asked, environments=environments)
    assert record["target_return"] == labels[:, 0].max()
    assert record["target_rule"] == "largest expected return in the data"
    # It stands apart from the largest return that came.
    assert abs(record["target_return"] - folder.statistics().largest_return) > 1e-3


def test_settings_of_the_fit_are_refused_where_nothing_is_fitted(make, tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"expected_return\.\* is read where data\.relabel is expected_return"
    ):
        tiny(tmp_path, expected_return=FIT)
    with pytest.raises(ValueError, match="Behaviour cloning is asked for no return"):
        train(dataclasses.replace(make(tmp_path), agent="bc"))
    assert not list(tmp_path.iterdir())
