import dataclasses

import jax
import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_agent, make_learner
from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.transitions import TransitionDraw, load_transitions
from bpt_rl.run.train import train
from bpt_rl.run.train_td import compile_updates, restore_learner
from bpt_rl.td_config import TD_AGENTS, TDConfig

TASK = "cartpole_swingup"
TD = TDConfig(num_updates=10, batch_size=4, hidden_dim=8, learning_rate=1e-3)


class InterruptionError(Exception):
    pass


@pytest.fixture(scope="module")
def small(store_path):
    """Returns a small configuration in a run folder of one's own; keywords are fields of TDConfig or TrainConfig."""

    def make(run, **changes):
        own = {"agent": "td3", "seed": 5, "log_every": 2, "checkpoint_every": 4}
        fields = {field.name for field in dataclasses.fields(TDConfig)}
        td = {name: value for name, value in changes.items() if name in fields}
        own |= {name: value for name, value in changes.items() if name not in fields}
        data = DataConfig(store=str(store_path), task=TASK)
        return TrainConfig(**{"run": str(run), "data": data, "td": dataclasses.replace(TD, **td), **own})

    return make


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run without an interruption. Not to be changed."""
    return train(small(tmp_path_factory.mktemp("runs") / "td3"))


def interrupt_at(stop):
    def report(step, total, values):
        assert total == 10
        if step >= stop:
            raise InterruptionError

    return report


def without_clock(folder):
    return [{k: v for k, v in line.items() if k != "updates_per_second"} for line in folder.metrics()]


def test_an_interrupted_run_ends_like_an_uninterrupted_one_bit_for_bit(
    small, whole, tmp_path, assert_same_bits
):
    # Before the first checkpoint, at that of step 4, and between those of steps 4 and 8.
    for stop in (2, 4, 6):
        with pytest.raises(InterruptionError):
            train(small(tmp_path / "td3"), interrupt_at(stop))
    seen = []
    folder = train(small(tmp_path / "td3"), lambda step, total, values: seen.append(step))
    assert seen == [6, 8, 10]
    assert_same_bits(restore_learner(folder)[1], restore_learner(whole)[1])
    assert [line["step"] for line in folder.metrics()] == [2, 4, 6, 8, 10]
    assert without_clock(folder) == without_clock(whole)


def test_calls_end_at_lines_of_metrics_and_at_checkpoints(small, tmp_path):
    folder = train(small(tmp_path / "td3", log_every=4, checkpoint_every=6, num_updates=8))
    assert [line["step"] for line in folder.metrics()] == [4, 6, 8]
    assert sorted(path.name for path in folder.checkpoints_path.iterdir()) == ["6", "8"]


def test_steps_are_the_learner_s_updates_on_batches_of_the_store_one_by_one(small, whole, store_path):
    config = small(whole.path)
    with Store.open(store_path) as store:
        transitions = load_transitions(store, TASK)
        learner = make_learner("td3", config.td, store.observation_dim, store.action_dim)
    draw = TransitionDraw(batch_size=4, discount=0.99)
    state, key = jax.jit(learner.init)(jax.random.key(5)), jax.random.fold_in(jax.random.key(5), 1)
    update, losses = jax.jit(learner.update), []
    for step in range(10):
        draw_key, update_key = jax.random.split(jax.random.fold_in(key, step))
        batch = draw.gather(transitions, draw.indices(transitions, draw_key))
        state, metrics = update(state, batch, update_key)
        losses.append(float(metrics["critic_loss"]))
    # Fused by the compiler in one program or in ten: float32 rounding, which Adam's first steps enlarge.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), restore_learner(whole)[1], state)
    means = [line["critic_loss"] for line in whole.metrics()]
    np.testing.assert_allclose(means, np.mean(np.reshape(losses, (5, 2)), axis=1), rtol=1e-3)


def test_one_call_of_many_updates_equals_many_calls_of_few(whole, store_path, assert_same_bits):
    with Store.open(store_path) as store:
        transitions = load_transitions(store, TASK)
    learner, _, _ = restore_learner(whole)
    run, key = compile_updates(learner, TransitionDraw(batch_size=4, discount=0.99)), jax.random.key(5)
    together, _ = run(restore_learner(whole)[1], transitions, np.int32(0), key=key, num_updates=4)
    state = restore_learner(whole)[1]
    for first in (0, 2):
        state, metrics = run(state, transitions, np.int32(first), key=key, num_updates=2)
    assert_same_bits(together, state)
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == np.float32]
    squares = sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in leaves)
    np.testing.assert_allclose(metrics["state_norm"], np.sqrt(squares), rtol=1e-5)


# Of the two whose states and policies are not those of TD3, which the other tests train.
@pytest.mark.parametrize("agent", ["cql", "iql"])
def test_the_command_line_trains_an_agent_from_its_preset_and_its_run_acts(cli, store_path, tmp_path, agent):
    run = tmp_path / agent
    small = "--td.num-updates 2 --td.batch-size 4 --td.hidden-dim 8 --log-every 2 --checkpoint-every 2"
    out = cli.succeed(f"train {agent} --data.store {store_path} --data.task {TASK} {small} --run {run}")
    assert out == f"Run: {run}\n"
    config = config_toml.load(TrainConfig, str(run / "config.toml"))
    assert (config.agent, config.td.num_updates, config.data.task) == (agent, 2, TASK)
    learner, state, step = restore_learner(train(config))
    assert step == 2
    policy = learner.policy(state)
    observation = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    carry, action = policy.act(policy.start(3), observation, np.zeros(3))
    assert (action.shape, action.dtype) == ((3, 1), np.float32)
    assert np.abs(action).max() < 1
    carry = policy.observe(carry, np.ones(3), np.zeros(3, bool))
    again = policy.act(carry, observation[::-1], np.ones(3))[1]
    # Another order and another wish make no difference, but for float32 rounding.
    np.testing.assert_allclose(again[::-1], action, rtol=1e-5)


def test_presets_have_exorl_s_sizes():
    for agent in TD_AGENTS:
        config = config_toml.load(TrainConfig, agent)
        expected = TDConfig(num_updates=500_000, batch_size=1024, hidden_dim=1024)
        assert (config.agent, config.run, config.td) == (agent, f"runs/{agent}", expected)


def test_the_folder_says_what_the_run_is(whole, store_path):
    statistics = whole.statistics()
    assert (statistics.task, statistics.num_episodes) == (TASK, 6)
    data = whole.versions()["data"]
    # Six episodes of 50 transitions and 51 rows; 5 observations, 1 action and 1 reward a row; 8 bytes a transition.
    assert (data["place"], data["num_bytes"]) == ("accelerator", 4 * 6 * 51 * 7 + 8 * 6 * 50)
    assert {"critic_loss", "actor_loss", "value", "state_norm", "updates_per_second"} < set(
        whole.metrics()[0]
    )


def test_nothing_that_is_not_finite_is_ever_saved(small, tmp_path):
    config = small(tmp_path / "td3", learning_rate=1e30, checkpoint_every=2)
    message = r"must stay finite; got \w+ \S+ with seed 5 between steps 0 and 2\. Last .*: step none .*Lower td\.learn"
    with pytest.raises(FloatingPointError, match=message):
        train(config)
    folder = tmp_path / "td3"
    assert (list((folder / "checkpoints").iterdir()), (folder / "metrics.jsonl").read_text()) == ([], "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8}, r"td\.batch_size = 4, and got 8"),
        ({"agent": "td3_bc"}, r"agent = 'td3', and got 'td3_bc'"),
        ({"seed": 3}, r"seed = 5, and got 3"),
    ],
)
def test_a_run_folder_keeps_one_configuration(small, whole, changes, message):
    with pytest.raises(ValueError, match=f"keeps one configuration; .* was trained with {message}"):
        train(small(whole.path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig(embed_dim=64)}, r"td3 reads td\.\*, .*got model\.embed_dim 64.*preset td3"),
        ({"optimizer": OptimizerConfig(num_steps=900)}, r"got optimizer\.num_steps 900"),
        ({"data": DataConfig(top_fraction=0.1)}, r"got data\.top_fraction 0\.1"),
        ({"data": DataConfig(place="stream")}, r"data\.place must be auto or accelerator; got 'stream'"),
    ],
)
def test_settings_that_nobody_would_read_are_refused_before_a_folder_is_made(
    small, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        train(small(tmp_path / "td3", **changes))
    assert not list(tmp_path.iterdir())


def test_agents_that_learn_from_trajectories_refuse_settings_of_the_others(tiny, tmp_path):
    config = dataclasses.replace(tiny(tmp_path / "at"), td=TD)
    with pytest.raises(ValueError, match=r"read td\.\*; got agent 'at' and TDConfig\(num_updates=10, "):
        train(config)
    assert not list(tmp_path.iterdir())


def test_agents_of_one_kind_are_not_made_as_the_other(small, whole, trained):
    with pytest.raises(ValueError, match=r"from trajectories: at, .*; got 'td3'"):
        make_agent(whole.config(), whole.statistics())
    with pytest.raises(ValueError, match=r"must be one of td3, .*; .* has 'at'"):
        restore_learner(trained)
