import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from bpt_rl.agents.random import RandomPolicy
from bpt_rl.config import DataConfig, EvaluateConfig, TrainConfig
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store
from bpt_rl.envs import tasks
from bpt_rl.envs.episodes import start_seed
from bpt_rl.run import protocols, records
from bpt_rl.run.conditioning import context_chains
from bpt_rl.run.episode_log import LogPlan, _Count, play
from bpt_rl.run.evaluate import evaluate, evaluate_run
from bpt_rl.run.evaluated_run import EvaluatedRun, load_params
from bpt_rl.run.evaluation_record import describe_record
from bpt_rl.run.film_sources import run_episodes
from bpt_rl.run.rollout import Start, Transition, rollout
from bpt_rl.run.train import train
from bpt_rl.td_config import TDConfig
from bpt_rl.types import EpisodeFailure

TASK = "cartpole_swingup"
CONFIG = EvaluateConfig(num_chains=3, seed=11)


@pytest.fixture(scope="module")
def run_path(trained, tmp_path_factory):
    """A copy of the trained run that evaluations may be written to."""
    return shutil.copytree(trained.path, tmp_path_factory.mktemp("evaluate") / "at")


@pytest.fixture(scope="module")
def opened(trained):
    return EvaluatedRun.open(trained, CONFIG)


@pytest.fixture(scope="module")
def record(run_path, environments):
    return evaluate_run(run_path, CONFIG, environments=environments, command="bpt-rl evaluate runs/at")


def log_of(record, context):
    return records.log_from_json(record["logs"][context])


def test_n_trajectories_mean_n_in_training_and_n_at_evaluation(tiny, store_path, record, tmp_path):
    config = tiny(tmp_path)
    assert config.data.num_trajectories == 2
    with Store.open(store_path) as store:
        batch = ChainSampler(store, config.data, config.model.layout, seed=0).batch(0)
    for ids, episode, step in zip(batch.segment_ids, batch.episode, batch.step, strict=True):
        for chain in range(1, ids.max() + 1):
            # Two whole episodes of 50 steps, one after the other.
            assert episode[ids == chain].tolist() == [0] * 50 + [1] * 50
            assert step[ids == chain].tolist() == [*range(50), *range(50)]
    assert record["num_episodes"] == record["num_trajectories"] == 2
    for context in ("chain", "memoryless", "random"):
        log = log_of(record, context)
        assert log.returns.shape == (3, 2)
        assert (log.num_steps == 50).all()


def test_returns_are_the_sums_of_the_rewards_of_the_same_actions(environments):
    progress = []
    log = evaluate(
        RandomPolicy(1, seed=4),
        TASK,
        2,
        3,
        seed=5,
        action_repeat=20,
        context="random",
        environments=environments,
        report_progress=lambda *values: progress.append(values),
    )
    assert progress == [("random", 1, 2), ("random", 2, 2)]
    assert math.isnan(log.target_return)
    assert log.num_steps.tolist() == [[50, 50]] * 3
    for i in range(3):
        # One control step at a time: the 20 that an action is held for are counted here.
        environment = tasks.make(TASK, 0)
        policy = RandomPolicy(1, seed=4)
        carry = policy.start(3)
        for episode in range(2):
            environment.seed(start_seed(5, i, episode))
            observation, total = environment.reset().observation, 0.0
            for t in range(1000):
                if t % 20 == 0:
                    carry, action = policy.act(carry, np.stack([observation] * 3), np.zeros(3))
                total += environment.step(action[i]).reward
            np.testing.assert_allclose(log.returns[i, episode], total, rtol=1e-12)


def test_every_policy_begins_every_episode_in_the_same_states(environments):
    def starts(policy):
        steps = list(rollout(policy, environments, Start(seed=11, num_episodes=3)))
        return [steps[t].observation for t in (0, 50, 100)]

    one, other = (starts(RandomPolicy(1, seed)) for seed in (0, 1))
    np.testing.assert_array_equal(one, other)
    assert np.abs(one[0] - one[1]).max() > 0
    assert np.abs(one[0][0] - one[0][1]).max() > 0


def test_environments_made_play_side_by_side_the_episodes_that_given_ones_play_one_after_another(
    record, run_path, monkeypatch
):
    played = []
    monkeypatch.setattr(
        "bpt_rl.run.evaluate.play", lambda *args, **kwargs: played.append(args) or play(*args, **kwargs)
    )
    wide = evaluate_run(run_path, dataclasses.replace(CONFIG, num_workers=2))
    assert wide["logs"].keys() == record["logs"].keys()
    assert [(plan.context, plan.width, environments.num_envs) for _, environments, plan in played] == [
        ("chain", 1, 3),
        ("memoryless", 2, 6),
        ("random", 2, 6),
    ]
    for context in ("chain", "memoryless"):
        np.testing.assert_allclose(log_of(wide, context).returns, log_of(record, context).returns, rtol=1e-5)


def test_every_step_of_episodes_side_by_side_counts_for_its_own():
    plan = LogPlan(
        task=TASK, num_episodes=4, num_chains=2, action_repeat=20, context="random", start=Start(seed=0)
    ).widened(5)
    assert (plan.width, plan.start.num_episodes) == (2, 2)
    assert plan.start.chain.tolist() == [0, 1, 0, 1]
    assert plan.start.first_episode.tolist() == [0, 0, 2, 2]
    count = _Count(plan)
    everyone = np.arange(4)
    for t in range(4):
        count.add(
            Transition(
                observation=np.zeros((4, 5)),
                return_to_go=np.zeros(4),
                action=10.0 * t + everyone[:, None],
                reward=10.0 * t + everyone,
                done=np.full(4, t % 2 == 1),
                environment=everyone,
                failures={3: "fell"} if t == 2 else {},
            )
        )
    log, (first, last) = count.log(0.0), count.episodes()
    assert log.returns.tolist() == [[10, 50, 14, 54], [12, 52, 16, 56]]
    assert log.failures == (EpisodeFailure(1, 3, 0, "fell"),)
    assert [first.action.tolist(), last.action.tolist()] == [[[0], [10]], [[22], [32]]]
    assert (first.episode, last.episode, last.seed) == (0, 3, start_seed(0, 0, 3))


def test_memoryless_is_a_fresh_policy_in_each_episode_and_the_chain_is_not(record, run_path, environments):
    agent, params, step = load_params(records.RunFolder(run_path))
    assert step == record["step"] == 6
    returns = np.zeros((3, 2))
    observation, _ = environments.reset(seed=CONFIG.seed)
    for episode in range(2):
        policy = agent.policy(params, num_episodes=1)
        carry, return_to_go = policy.start(3), np.full(3, record["target_return"])
        done = np.zeros(3, bool)
        while not done.any():
            carry, action = policy.act(carry, observation, return_to_go)
            observation, reward, _, done, _ = environments.step(action)
            carry = policy.observe(carry, reward, done)
            return_to_go = return_to_go - reward
            returns[:, episode] += reward
    # Batches and caches of other sizes sum in another order; what is remembered changes far more.
    np.testing.assert_allclose(log_of(record, "memoryless").returns, returns, rtol=1e-5)
    chain = log_of(record, "chain").returns
    np.testing.assert_allclose(chain[:, 0], returns[:, 0], rtol=1e-5)
    assert np.abs(chain[:, 1] - returns[:, 1]).min() > 1e-3


def test_an_evaluation_is_strict_json_that_reads_back_as_its_logs(record, run_path):
    def refuse(token):
        pytest.fail(f"{token} is not JSON")

    [file] = [p for p in (run_path / "evaluations").glob("*.json") if json.loads(p.read_text()) == record]
    assert file.name.startswith("00000006_")
    values = json.loads(file.read_text(), parse_constant=refuse)
    assert values["schema"] == 2
    assert values["command"] == "bpt-rl evaluate runs/at"
    assert values["data"]["subset"] == "first-6-episodes"
    for context, target in (("chain", values["target_return"]), ("random", math.nan)):
        log = records.log_from_json(values["logs"][context])
        assert (log.context, log.task, log.action_repeat, log.seed) == (context, TASK, 20, 11)
        np.testing.assert_array_equal(log.target_return, target)
        for name in ("first", "last", "mean", "max"):
            assert values["estimates"][context][name]["value"] == getattr(protocols, name)(log).value
        assert values["estimates"][context]["curve"] == [e.value for e in protocols.curve(log)]


def test_one_chain_has_no_interval_and_says_so(run_path):
    config = EvaluateConfig(num_chains=1, num_episodes=1, random=False)
    record = evaluate_run(run_path, config)
    assert list(record["logs"]) == ["chain"]
    assert record["estimates"]["chain"]["mean"]["low"] is None
    assert "[one chain, no interval]" in describe_record(record)
    assert record in records.RunFolder(run_path).evaluations()


@pytest.mark.parametrize("agent", ["bc", "td3"])
def test_a_policy_without_memory_is_asked_for_nothing_and_has_no_second_control(
    tiny, store_path, tmp_path, environments, agent
):
    if agent == "bc":
        config = tiny(tmp_path / agent, agent=agent, num_steps=3)
    else:
        td = TDConfig(num_updates=3, batch_size=4, hidden_dim=8)
        config = TrainConfig(
            run=str(tmp_path / agent), agent=agent, data=DataConfig(store=str(store_path), task=TASK), td=td
        )
    folder = train(config)
    record = evaluate_run(folder.path, dataclasses.replace(CONFIG, num_episodes=1), environments=environments)
    assert list(record["logs"]) == ["chain", "random"]
    assert (record["agent"], record["step"], record["actions"]) == (agent, 3, "mean")
    assert record["logs"]["chain"]["target_return"] is None
    assert record["logs"]["chain"]["returns"] != record["logs"]["random"]["returns"]


@pytest.mark.parametrize(
    ("changes", "target", "rule"),
    [
        ({}, 8.0, "largest return in the data"),
        ({"target_multiple": 1.5}, 12.0, "largest return in the data, times 1.5"),
        ({"target": "quantile", "target_quantile": 0.5}, 3.0, "0.5 quantile of the data's returns"),
        (
            {"target": "quantile", "target_quantile": 0.25, "target_multiple": 2.0},
            4.0,
            "0.25 quantile of the data's returns, times 2.0",
        ),
    ],
)
def test_target_returns_come_from_the_data_by_a_named_rule(opened, changes, target, rule):
    statistics = dataclasses.replace(opened.statistics, returns=(1.0, 2.0, 3.0, 5.0, 8.0))
    asked = dataclasses.replace(opened, config=EvaluateConfig(**changes), statistics=statistics)
    assert asked.target == (target, rule)


@pytest.fixture(scope="module")
def shown(run_path, environments):
    """An evaluation whose contexts begin with two trajectories, outgrow their capacity, and ask for three targets."""
    config = dataclasses.replace(
        CONFIG,
        num_episodes=3,
        context_order="ascending",
        num_context_trajectories=2,
        context_capacity=3,
        full_context="drop_oldest",
        target="explicit",
        target_value=40.0,
        target_sweep=(0.5, 1.0),
        random=False,
    )
    return config, evaluate_run(run_path, config, environments=environments)


def test_contexts_begin_with_the_datas_trajectories_and_drop_the_oldest(
    shown, run_path, store_path, environments
):
    _, record = shown
    assert record["context"] == {
        "num_trajectories": 2,
        "order": "ascending",
        "capacity": 3,
        "overflow": "drop_oldest",
    }
    assert (record["target_return"], record["target_rule"]) == (40.0, "explicit")
    # By hand: the same policy, begun with the same trajectories.
    folder = records.RunFolder(run_path)
    agent, params, _ = load_params(folder)
    policy = agent.policy(params, num_episodes=1, full_context="drop_oldest")
    with Store.open(store_path) as store:
        contexts = context_chains(
            store,
            folder.config().data,
            num_trajectories=2,
            order="ascending",
            target_return=40.0,
            num_chains=3,
            seed=11,
        )
    start = Start(seed=11, target_return=40.0, contexts=contexts, num_episodes=3)
    returns = np.zeros((3, 3))
    episode = np.zeros(3, int)
    for transition in rollout(policy, environments, start):
        running = np.flatnonzero(episode < 3)
        returns[running, episode[running]] += transition.reward[running]
        episode += transition.done
    # The evaluation acts in two parts, and sums in another order may differ in the last bits, which chaos lets grow.
    np.testing.assert_allclose(log_of(record, "chain").returns, returns, rtol=1e-3)
    assert "each context begun with 2 trajectories of the data (ascending)" in describe_record(record)


def test_a_sweep_asks_for_multiples_of_the_target(shown):
    _, record = shown
    assert [asked["target_return"] for asked in record["sweep"]] == [20.0, 40.0]
    logs = [records.log_from_json(asked["log"]) for asked in record["sweep"]]
    assert [log.returns.shape for log in logs] == [(3, 1), (3, 1)]
    assert [log.target_return for log in logs] == [20.0, 40.0]
    # The second asks for what the chains' first episodes asked for, in the same environments and contexts.
    np.testing.assert_allclose(logs[1].returns[:, 0], log_of(record, "chain").returns[:, 0], rtol=1e-3)
    assert record["sweep"][0]["estimates"]["mean"]["value"] == logs[0].returns.mean()
    assert "asked for 20.0: mean" in describe_record(record)


@pytest.mark.parametrize(
    ("agent", "changes", "words"),
    [
        ("at", {"context_capacity": 1}, "context_capacity 1 for 0 given and 2 played"),
        ("at", {"target_sweep": (1.0,), "sweep_episodes": 9, "context_capacity": 3}, "and 9 played"),
        (
            "at",
            {
                "num_context_trajectories": 3,
                "context_order": "best",
                "context_capacity": 3,
                "full_context": "drop_oldest",
            },
            "room for the trajectories it begins with and one episode; got num_context_trajectories 3",
        ),
        ("dt", {"num_context_trajectories": 1, "context_order": "best"}, "got num_context_trajectories 1"),
        ("bc", {"target_sweep": (0.5,)}, "asked for a return can be swept over targets; got 'bc'"),
    ],
)
def test_what_the_agent_cannot_be_asked_is_refused(opened, tiny, tmp_path, agent, changes, words):
    asked = dataclasses.replace(
        opened, config=dataclasses.replace(CONFIG, **changes), trained=tiny(tmp_path, agent=agent)
    )
    with pytest.raises(ValueError, match=words):
        asked.check()


def test_trajectories_of_other_data_are_not_shown(opened, trained):
    config = dataclasses.replace(CONFIG, num_context_trajectories=1, context_order="best")
    other = dataclasses.replace(trained.statistics(), digest="f" * 64)
    asked = dataclasses.replace(opened, config=config, statistics=other)
    with pytest.raises(ValueError, match="must be of the training data, digest ffffffff"):
        asked.contexts(1.0)


def test_the_first_and_the_last_episode_are_simulated_again_as_they_were_played(shown, run_path, tmp_path):
    _, record = shown
    [path] = sorted(run_path.glob("evaluations/*_episodes.npz"), key=lambda p: p.stat().st_mtime_ns)[-1:]
    with np.load(path) as file:
        values = dict(file)
    # Summed, as the log's were, from the rewards that the simulators paid; `run_episodes` holds its own against them.
    returns = log_of(record, "chain").returns[0]
    assert values["first_reward"].sum() == pytest.approx(returns[0], rel=1e-12)
    assert values["last_reward"].sum() == pytest.approx(returns[2], rel=1e-12)
    first, last = run_episodes(run_path)
    assert (first.name, last.name) == tuple(
        f"{path.stem.removesuffix('_episodes')}_{n}" for n in ("first", "last")
    )
    assert first.physics.shape == last.physics.shape == (51, 4)
    assert not np.array_equal(first.physics, last.physics)
    other = tmp_path / "run" / "evaluations"
    other.mkdir(parents=True)
    np.savez(other / path.name, **(values | {"last_action": -values["last_action"]}))
    with pytest.raises(ValueError, match="must be simulated again as it was played, with a return of"):
        run_episodes(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="must have been evaluated for its episodes to be drawn"):
        run_episodes(tmp_path / "nothing")


def test_what_is_no_finished_run_is_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold config\.toml; there is none in .*nothing"):
        evaluate_run(tmp_path / "nothing", CONFIG)
    path = shutil.copytree(trained.path, tmp_path / "at")
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text.replace("embed_dim = 16", "embed_dim = 32"))
    message = r"match the configured architecture; params/embed_action/bias is \(16,\) .* and \(32,\)"
    with pytest.raises(ValueError, match=message):
        evaluate_run(path, CONFIG)
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"must have a complete checkpoint to be evaluated; .*at has"):
        evaluate_run(path, CONFIG)
    assert not (path / "evaluations").exists()


def test_counts_must_be_positive():
    with pytest.raises(ValueError, match="num_episodes and num_chains must be positive; got 0 and 3"):
        evaluate(RandomPolicy(1, 0), TASK, 0, 3, seed=0)
