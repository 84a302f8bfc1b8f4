import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.agents.registry import make_agent
from bpt_rl.config import DataConfig, TrainConfig
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.ledger import Ledger
from bpt_rl.run.open_runs import OpenRun
from bpt_rl.run.train import train
from bpt_rl.run.train_seeds import train_seeds
from bpt_rl.run.train_td import restore_learner
from bpt_rl.td_config import TDConfig

CLOCKS = {"updates_per_second", "tokens_per_second"}
SEEDS = (0, 7)


class InterruptionError(Exception):
    pass


def interrupt_at(stop):
    def report(step, total, values):
        if step >= stop:
            raise InterruptionError

    return report


def assert_same_but_for_rounding(folder, other, read):
    """What one run left equals what another did; programs of other shapes add float32 in another order."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), read(folder), read(other)
    )
    assert len(folder.metrics()) == len(other.metrics()) > 0
    for line, twin in zip(folder.metrics(), other.metrics(), strict=True):
        assert line.keys() == twin.keys()
        for name in line.keys() - CLOCKS:
            np.testing.assert_allclose(line[name], twin[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for place in ("path", "checkpoints_path"):
        names = [{path.name for path in getattr(each, place).iterdir()} for each in (folder, other)]
        assert names[0] == names[1]
    assert dataclasses.replace(folder.config(), run="") == dataclasses.replace(other.config(), run="")
    assert folder.statistics() == other.statistics()


@pytest.fixture(scope="module")
def td3(store_path):
    """Returns small configurations, one a seed, in run folders below one of one's own."""

    def make(root, seeds=SEEDS):
        return [
            TrainConfig(
                run=str(root / f"seed{seed}"),
                agent="td3",
                seed=seed,
                data=DataConfig(store=str(store_path), task="cartpole_swingup"),
                td=TDConfig(num_updates=10, batch_size=4, hidden_dim=8, learning_rate=1e-3),
                log_every=2,
                checkpoint_every=4,
            )
            for seed in seeds
        ]

    return make


@pytest.fixture(scope="module")
def together(td3, tmp_path_factory):
    """Runs of all seeds at once, without an interruption. Not to be changed."""
    return train_seeds(td3(tmp_path_factory.mktemp("together")), command="bpt-rl ablate grid.toml")


def learnt(folder):
    return restore_learner(folder)[1]


def test_td_agents_trained_at_once_equal_those_trained_alone(td3, together, tmp_path):
    for config, folder in zip(td3(tmp_path), together, strict=True):
        assert_same_but_for_rounding(folder, train(config), learnt)
    versions = [folder.versions() for folder in together]
    assert [(v["command"], v["seeds_at_once"]) for v in versions] == [("bpt-rl ablate grid.toml", [0, 7])] * 2


def test_seeds_interrupted_together_end_with_the_same_bits(td3, together, tmp_path, assert_same_bits):
    seen = []
    with pytest.raises(InterruptionError):
        train_seeds(td3(tmp_path), interrupt_at(6))
    train_seeds(td3(tmp_path), lambda step, total, values: seen.append((step, total, values)))
    assert [told[:2] for told in seen] == [(6, 10), (8, 10), (10, 10)]
    lines = [folder.metrics()[-1]["critic_loss"] for folder in together]
    np.testing.assert_allclose(seen[-1][2]["critic_loss"], np.mean(lines), rtol=1e-6)
    for config, folder in zip(td3(tmp_path), together, strict=True):
        assert_same_bits(learnt(train(config)), learnt(folder))


def test_seeds_that_are_behind_catch_up_before_all_go_on_together(td3, together, tmp_path):
    ahead, behind = td3(tmp_path)
    with pytest.raises(InterruptionError):
        train(ahead, interrupt_at(6))  # With a checkpoint of step 4.
    seen = []
    folders = train_seeds([ahead, behind], lambda step, total, values: seen.append(step))
    assert seen == [2, 4, 6, 8, 10]
    for folder, whole in zip(folders, together, strict=True):
        assert_same_but_for_rounding(folder, whole, learnt)
    train_seeds([ahead, behind], lambda *_: pytest.fail("no step is left"))


def first_loss(config, folder):
    """The loss of the seed's own parameters, batches and dropout at the first step; each step of a batch counts."""
    agent, key = make_agent(config, folder.statistics()), jax.random.key(config.seed)
    loss, params, losses = jax.jit(agent.loss), agent.init(key), []
    with Store.open(config.data.store) as store:
        sampler = ChainSampler(store, config.data, config.model.layout, config.seed)
        for index in range(config.optimizer.accumulation):
            micro_key = jax.random.fold_in(jax.random.fold_in(key, 0), index)
            losses.append(loss(params, sampler.batch(index), micro_key)[0])
    return np.mean(losses)


def test_agents_of_chains_trained_at_once_equal_those_trained_alone(tiny, trained, tmp_path, read_state):
    zero, seven = (tiny(tmp_path / f"seed{seed}", seed=seed) for seed in SEEDS)
    folders = train_seeds([zero, seven])
    alone = train(dataclasses.replace(seven, run=str(tmp_path / "alone")))
    for folder, other in zip(folders, (trained, alone), strict=True):
        assert_same_but_for_rounding(folder, other, read_state)
    np.testing.assert_allclose(alone.metrics()[0]["loss"], first_loss(seven, alone), rtol=1e-5)


def test_each_seed_goes_on_with_its_own_micro_batches(tiny, tmp_path, read_state):
    changes = {"agent": "bc", "accumulation": 2, "place": "accelerator"}
    configs = [tiny(tmp_path / f"seed{seed}", seed=seed, **changes) for seed in SEEDS]
    # Checkpoints of steps 2, 4 and 6; the interruption comes after the first.
    with pytest.raises(InterruptionError):
        train_seeds(configs, interrupt_at(3))
    seen = []
    folders = train_seeds(configs, lambda *told: seen.append(told[:2]))
    assert seen == [(3, 6), (4, 6), (5, 6), (6, 6)]
    for config, folder in zip(configs, folders, strict=True):
        alone = train(dataclasses.replace(config, run=f"{config.run}_alone"))
        assert_same_but_for_rounding(folder, alone, read_state)
        np.testing.assert_allclose(folder.metrics()[0]["loss"], first_loss(config, folder), rtol=1e-5)


def test_a_number_that_is_not_finite_is_told_with_its_seed(tiny, tmp_path):
    logged = {seed: [] for seed in SEEDS}
    with Checkpoints(tmp_path) as saved:
        runs = [OpenRun(config=tiny(tmp_path, seed=s), saved=saved, log=logged[s].append) for s in SEEDS]
        ledger = Ledger(runs, 10, None)
        ledger.add(1, {"loss": jnp.array([1.0, 2.0])})
        ledger.add(2, {"loss": jnp.array([1.0, np.nan])})
        with pytest.raises(FloatingPointError, match=r"got loss nan with seed 7 at step 2, batch index 1"):
            ledger.settle()
    assert {seed: [line["loss"] for line in lines] for seed, lines in logged.items()} == {0: [1.0], 7: [2.0]}


def test_what_cannot_be_trained_at_once_is_refused_before_a_folder_is_made(td3, tiny, tmp_path):
    one, two = td3(tmp_path)
    for configs, message in (
        ([], r"needs a configuration at least; got none"),
        (
            [one, dataclasses.replace(two, log_every=5)],
            r"differ in seed and run alone; got log_every 2 and 5",
        ),
        (
            [one, dataclasses.replace(two, data=dataclasses.replace(two.data, task="cartpole_balance"))],
            r"got data\.task 'cartpole_swingup' and 'cartpole_balance'",
        ),
        ([one, dataclasses.replace(two, seed=0)], r"Each seed is trained once, .* got seed 0 2 times"),
        ([one, dataclasses.replace(two, run=one.run)], r"in a run folder of its own; got run /\S+ 2 times"),
        ([dataclasses.replace(each, logger=("wandb",)) for each in (one, two)], r"one run of a process"),
        (
            [tiny(tmp_path / str(seed), seed=seed, **{"optimizer.place": "host"}) for seed in SEEDS],
            r"keep their parameters on the device; got optimizer\.place 'host' and 2 seeds",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train_seeds(configs)
    assert not list(tmp_path.iterdir())
