"""Evaluations that are interrupted and go on."""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bpt_rl.agents.random import RandomPolicy
from bpt_rl.config import EvaluateConfig
from bpt_rl.envs import tasks
from bpt_rl.run import records
from bpt_rl.run.episode_log import LogPlan, play
from bpt_rl.run.evaluate import evaluate, evaluate_run
from bpt_rl.run.evaluated_run import EvaluatedRun
from bpt_rl.run.evaluation_journal import EvaluationJournal
from bpt_rl.run.rollout import Start, rollout

CONFIG = EvaluateConfig(num_chains=2, num_episodes=3, seed=11, num_workers=1)


class InterruptionError(Exception):
    """In place of whatever ends a process."""


@pytest.fixture(scope="module")
def environments():
    """Two of the store's task."""
    made = tasks.make_vector("cartpole_swingup", 2, 0, 20, num_workers=1)
    yield made
    made.close()


@pytest.fixture
def own_process():
    """The process of two environments, and these."""
    before = set(multiprocessing.active_children())
    made = tasks.make_vector("cartpole_swingup", 2, 0, 20, num_workers=1)
    [process] = set(multiprocessing.active_children()) - before
    yield process, made
    made.close()


@pytest.fixture
def run_path(trained, tmp_path):
    """A copy of the trained run that evaluations may be written to."""
    return shutil.copytree(trained.path, tmp_path / "at")


@pytest.fixture(scope="module")
def expected(trained, environments, tmp_path_factory):
    """Record and kept episodes of an evaluation without an interruption."""
    path = shutil.copytree(trained.path, tmp_path_factory.mktemp("whole") / "at")
    record = evaluate_run(path, CONFIG, environments=environments, command="evaluate")
    return comparable(record), kept_episodes(path)


def comparable(record):
    return json.loads(json.dumps({name: value for name, value in record.items() if name != "timings"}))


def kept_episodes(path):
    [file] = (path / "evaluations").glob("*_episodes.npz")
    with np.load(file) as arrays:
        return dict(arrays)


def assert_as_if_nothing_had_happened(path, record, expected):
    assert comparable(record) == expected[0]
    assert comparable(json.loads(next((path / "evaluations").glob("*.json")).read_text())) == expected[0]
    np.testing.assert_equal(kept_episodes(path), expected[1])
    assert sorted(p.suffix for p in (path / "evaluations").iterdir()) == [".json", ".npz"]


def interrupted(path, environments, name, num_done, **changes):
    """Evaluates until all chains have finished so many episodes of a log."""

    def interrupt(*progress):
        if progress[:2] == (name, num_done):
            raise InterruptionError

    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InterruptionError):
        evaluate_run(path, config, environments=environments, report_progress=interrupt)


def killed(path, block):
    """Kills the real command soon after it has written a block, at a moment that differs between test runs."""
    command = [sys.executable, "-m", "bpt_rl", "evaluate", str(path), "--num-chains", "2", "--seed", "11"]
    command += ["--num-episodes", "3", "--num-workers", "1", "--max-environments", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((path / "evaluations").glob(f"unfinished_*/{block}")):
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(np.random.default_rng().uniform(0, 0.1))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_an_evaluation_goes_on_to_the_same_record_however_it_is_interrupted(
    run_path, environments, expected, caplog
):
    interrupted(run_path, environments, "chain", 2)
    interrupted(run_path, environments, "chain", 3)
    # It went on, and did not begin again.
    assert not caplog.records
    [journal] = (run_path / "evaluations").iterdir()
    # A block is written once the next episode has begun.
    assert sorted(p.name for p in journal.iterdir()) == ["chain_000000.npz", "chain_000001.npz"]
    killed(run_path, "memoryless_000000.npz")
    killed(run_path, "random_000000.npz")
    assert {p.name for p in journal.glob("*.json")} == {"chain.json", "memoryless.json"}
    reported = []
    record = evaluate_run(
        run_path,
        CONFIG,
        environments=environments,
        command="evaluate",
        report_progress=lambda *progress: reported.append(progress),
    )
    assert reported == [("random", done, 3) for done in (1, 2, 3)]
    assert_as_if_nothing_had_happened(run_path, record, expected)


def test_another_setting_is_another_evaluation_and_more_processes_are_not(run_path, environments):
    names = []
    for changes in ({}, {"seed": 12}, {"num_workers": 2}):
        interrupted(run_path, environments, "chain", 2, **changes)
        names.append({p.name for p in (run_path / "evaluations").iterdir()})
    assert [len(found) for found in names] == [1, 2, 2]
    assert names[0] < names[1]


def test_other_parameters_are_another_evaluation(trained):
    run = EvaluatedRun.open(trained, CONFIG)
    nudged = jax.tree.map(lambda leaf: leaf + 1e-6, run.params)
    assert run.journal_key() == EvaluatedRun.open(trained, CONFIG).journal_key()
    assert run.journal_key() != dataclasses.replace(run, params=nudged).journal_key()


def test_recorded_actions_that_the_policy_would_not_choose_are_played_again(
    run_path, environments, expected, caplog
):
    alone = {"memoryless": False, "random": False}
    interrupted(run_path, environments, "chain", 3, **alone)
    [block] = (run_path / "evaluations").glob("unfinished_*/chain_000001.npz")
    with np.load(block) as file:
        arrays = dict(file)
    arrays["action"][20, 1] += 0.01
    np.savez(block, **arrays)
    record = evaluate_run(run_path, dataclasses.replace(CONFIG, **alone), environments=environments)
    assert record["logs"]["chain"] == expected[0]["logs"]["chain"]
    [told] = [r.getMessage() for r in caplog.records if r.name == "bpt_rl.run.episode_log"]
    assert told.startswith("The chain episodes begin again: A rollout goes on only where its policy chooses")
    assert "at step 70 they differ by 0.01." in told


def test_a_process_that_dies_changes_no_number(own_process, caplog):
    process, environments = own_process

    def kill(name, done, total):
        if done == 1:
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    whole, broken = (
        evaluate(
            RandomPolicy(1, 4),
            "cartpole_swingup",
            2,
            2,
            seed=5,
            action_repeat=20,
            environments=environments,
            report_progress=report,
        )
        for report in (None, kill)
    )
    assert records.log_to_json(broken) == records.log_to_json(whole)
    assert "Simulator process 0 (environments 0 to 1) ended by SIGKILL." in caplog.text


def test_kept_episodes_simulate_to_the_returns_of_the_record(expected):
    record, kept = expected
    assert (str(kept["task"]), int(kept["chain"])) == ("cartpole_swingup", 0)
    returns = record["logs"]["chain"]["returns"][0]
    for which, episode in (("first", 0), ("last", 2)):
        environment = tasks.make("cartpole_swingup", int(kept[f"{which}_seed"]), int(kept["action_repeat"]))
        environment.reset()
        rewards = [environment.step(action).reward for action in kept[f"{which}_action"]]
        np.testing.assert_array_equal(rewards, kept[f"{which}_reward"])
        assert int(kept[f"{which}_episode"]) == episode
        assert math.isclose(sum(rewards), returns[episode], rel_tol=1e-12)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    """Cartpoles whose simulator breaks where the pole turns fast."""
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(
        "import gc\n"
        "from dm_control.mujoco import Physics\n"
        "def cartpole_breaking(features, observation, action):\n"
        "    if abs(observation[0, 4]) > 10:\n"
        "        for physics in (p for p in gc.get_objects() if isinstance(p, Physics)):\n"
        "            if abs(physics.data.qvel[1]) > 10:\n"
        "                physics.data.qvel[:] = 1e12\n"
        "    return 1 + observation[:, 0]\n"
    )
    environments = tasks.make_vector(f"{path}:cartpole_breaking", 3, 0, 20, num_workers=1)
    yield f"{path}:cartpole_breaking", environments
    environments.close()


def test_a_simulator_that_diverges_is_counted_and_its_chain_goes_on(fragile):
    task, environments = fragile
    log = evaluate(RandomPolicy(1, 3), task, 3, 3, seed=2, action_repeat=20, environments=environments)
    steps = [[] for _ in range(3)]
    for transition in rollout(RandomPolicy(1, 3), environments, Start(seed=2, num_episodes=3)):
        for i, row in enumerate(zip(transition.reward, transition.done, strict=True)):
            steps[i].append((*row, transition.failures.get(i)))
    found = []
    for chain, rows in enumerate(steps):
        ends = [t + 1 for t, (_, done, _) in enumerate(rows) if done][:3]
        for episode, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            assert log.num_steps[chain, episode] == end - begin
            np.testing.assert_allclose(log.returns[chain, episode], sum(row[0] for row in rows[begin:end]))
            reward, _, reason = rows[end - 1]
            assert (end - begin < 50) == (reason is not None) == (reward == 0)
            if reason:
                found.append((chain, episode, end - begin - 1))
    assert 0 < len(found) < 9
    # One more came after its chain had been finished, while another one still played.
    assert len([row for rows in steps for row in rows if row[2]]) > len(found)
    assert [(f.chain, f.episode, f.step) for f in log.failures] == found
    assert all("mjWARN_BADQ" in failure.reason for failure in log.failures)


def test_chains_that_are_out_of_step_go_on_where_they_were(fragile, tmp_path):
    """After failures each chain is at another step of another episode: the simulators play up to there."""
    task, environments = fragile
    plan = LogPlan(
        task=task,
        num_episodes=3,
        num_chains=3,
        action_repeat=20,
        context="chain",
        start=Start(seed=2, num_episodes=3),
        num_parts=2,
    )

    def log_of(journal=None, report=None):
        log, episodes = play(RandomPolicy(1, 0), environments, plan, journal=journal, report_progress=report)
        return records.log_to_json(log), [vars(episode) for episode in episodes]

    def interrupt(name, done, total):
        if done == 2:
            raise InterruptionError

    expected = log_of()
    journal = EvaluationJournal(tmp_path, {"of": "this test"})
    with pytest.raises(InterruptionError):
        log_of(journal, interrupt)
    played = journal.played("chain")
    assert played.failures
    assert len({tuple(column) for column in played.done.T}) > 1
    np.testing.assert_equal(log_of(journal), expected)
