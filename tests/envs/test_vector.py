import contextlib
import gc
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from bpt_rl.envs import tasks
from bpt_rl.envs.episodes import Moment, Part, start_seed
from bpt_rl.envs.tasks import make_vector


def play(num_workers, num_steps=6, num_environments=3, action_repeat=250):
    """Returns everything three cartpoles say over an episode of four steps and a bit of the next."""
    actions = np.random.default_rng(0).uniform(-1, 1, (num_steps, num_environments, 1)).astype(np.float32)
    environments = make_vector("cartpole_swingup", num_environments, 7, action_repeat, num_workers)
    try:
        observation, infos = environments.reset()
        assert infos == {}
        return [
            (observation, 0, 0, False, infos),
            *(environments.step(action) for action in actions),
        ], actions
    finally:
        environments.close()


@pytest.fixture(scope="module")
def played():
    return play(num_workers=2)


@pytest.fixture(scope="module")
def balance():
    """Two cartpoles, reset before each use."""
    environments = make_vector("cartpole_balance", 2, 0, num_workers=1)
    yield environments
    environments.close()


def test_results_do_not_depend_on_the_number_of_workers(played):
    other, _ = play(num_workers=1)
    for step, other_step in zip(played[0], other, strict=True):
        for i in range(4):
            np.testing.assert_array_equal(step[i], other_step[i])


def test_each_environment_equals_a_single_one_of_its_seed(played):
    steps, actions = played
    for i in range(3):
        seed = np.random.SeedSequence([7, i]).generate_state(1)[0]
        single = tasks.make("cartpole_swingup", int(seed), action_repeat=250)
        np.testing.assert_array_equal(single.reset().observation, steps[0][0][i])
        for t in range(4):
            expected = single.step(actions[t, i])
            assert expected.reward == steps[t + 1][1][i]
        np.testing.assert_array_equal(steps[4][4]["final_obs"][i], expected.observation)
        single.seed(int(np.random.SeedSequence([7, i, 1]).generate_state(1)[0]))
        np.testing.assert_array_equal(steps[4][0][i], single.reset().observation)


def test_an_episode_ends_by_truncation_and_the_next_begins_in_the_same_step(played):
    steps, _ = played
    assert [bool(step[3].all()) for step in steps[1:]] == [t == 4 for t in range(1, 7)]
    assert not any(step[2].any() for step in steps[1:])
    assert [t for t, step in enumerate(steps) if "final_obs" in step[4]] == [4]
    assert steps[4][4]["_final_obs"].all()


def test_arrays_have_the_types_and_spaces_of_gymnasium(balance):
    balance.reset()
    actions = np.zeros((2, 1), np.float32)
    observation, reward, termination, truncation, _ = balance.step(actions)
    assert balance.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert balance.action_space.contains(actions)
    assert balance.observation_space.contains(observation)
    assert (observation.dtype, reward.dtype) == (np.float32, np.float64)
    assert termination.dtype == truncation.dtype == np.bool_


def test_reset_with_a_seed_starts_anew_and_without_goes_on(balance):
    first, _ = balance.reset(seed=0)
    second, _ = balance.reset()
    again, _ = balance.reset(seed=0)
    assert np.abs(first - second).max() > 0
    np.testing.assert_array_equal(first, again)


def test_a_step_is_told_of_when_its_last_process_has_answered():
    before = set(multiprocessing.active_children())
    with contextlib.closing(make_vector("cartpole_balance", 2, 0, num_workers=2)) as environments:
        environments.reset()
        [stopped, _] = set(multiprocessing.active_children()) - before
        os.kill(stopped.pid, signal.SIGSTOP)
        environments.send(np.zeros((2, 1)))
        time.sleep(0.3)
        assert not environments.has_stepped()
        os.kill(stopped.pid, signal.SIGCONT)
        deadline = time.monotonic() + 20
        while not environments.has_stepped():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        environments.receive()


def test_closing_leaves_no_process_behind():
    before = set(multiprocessing.active_children())
    environments = make_vector("cartpole_balance", 2, 0, num_workers=2)
    started = set(multiprocessing.active_children()) - before
    pids = [process.pid for process in started]
    assert len(pids) == 2
    environments.close()
    environments.close()
    del environments, started
    gc.collect()
    assert set(multiprocessing.active_children()) == before
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    """A task that kills its process, or gives its simulator a velocity beyond reason, as the action asks for it."""
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(
        "import gc, math, os, signal\n"
        "from dm_control.mujoco import Physics\n"
        "def cartpole_fragile(features, observation, action):\n"
        "    asked = round(float(action[0, 0]), 3)\n"
        "    if asked == 0.9:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if asked in (0.7, 0.8):\n"
        "        for physics in (p for p in gc.get_objects() if isinstance(p, Physics)):\n"
        "            if round(float(physics.control()[0]), 3) == asked:\n"
        "                physics.data.qvel[:] = math.nan if asked == 0.7 else 1e12\n"
        "    return action[:, 0]\n"
    )
    return f"{path}:cartpole_fragile"


def kill(name, before):
    """Kills the process of this name that was not there before."""
    [victim] = [p for p in set(multiprocessing.active_children()) - before if p.name == name]
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()


def test_a_process_that_dies_is_named_and_its_episodes_go_on_as_if_it_had_not(played, caplog):
    """Killed while it waits, three times but not in a row, and while it has two steps to take."""
    expected, actions = played
    before = set(multiprocessing.active_children())
    environments = make_vector("cartpole_swingup", 3, 7, 250, num_workers=2)
    try:
        steps = [(environments.reset()[0], 0, 0, False, {})]
        for t, action in enumerate(actions):
            if t in (0, 2, 5):
                kill("simulator-1", before)
            parts = Part(0, 2), Part(1, 2)
            for part in parts:
                environments.send(action[part.first :: 2], part)
            if t == 3:
                kill("simulator-0", before)
            halves = [environments.receive(part) for part in parts]
            whole = [np.zeros_like(values) for values in expected[t + 1][:4]]
            for part, half in zip(parts, halves, strict=True):
                for values, some in zip(whole, half[:4], strict=True):
                    values[part.first :: 2] = some
            steps.append(whole)
    finally:
        environments.close()
    for step, other in zip(expected, steps, strict=True):
        for i in range(4):
            np.testing.assert_array_equal(step[i], other[i])
    told = [record.getMessage() for record in caplog.records if "simulators" in record.name]
    assert [text.split(" ended ")[0] for text in told] == [
        "Simulator process 1 (environments 2 to 2)",
        "Simulator process 1 (environments 2 to 2)",
        "Simulator process 0 (environments 0 to 1)",
        "Simulator process 1 (environments 2 to 2)",
    ]
    assert all("ended by SIGKILL. Another one takes up its episodes." in text for text in told)


def test_a_process_that_dies_three_times_in_a_row_ends_it_with_a_reason(own_task, caplog):
    before = set(multiprocessing.active_children())
    environments = make_vector(own_task, 2, 0, num_workers=1)
    environments.reset()
    for _ in range(3):
        environments.step(np.array([[0.1], [0.2]]))
    with pytest.raises(
        RuntimeError,
        match=r"process 0 \(environments 0 to 1\) must live .* ended by SIGKILL, 3 times in a row\. If memory",
    ):
        environments.step(np.array([[0.1], [0.9]]))
    assert len(caplog.records) == 2
    assert set(multiprocessing.active_children()) == before
    with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="Make a new one"):
        environments.reset()


def test_a_simulator_that_diverges_ends_its_episode_alone(own_task):
    """Its velocity explodes in the second step, so that the third has no result; then an observation is no number."""
    environments = make_vector(own_task, 3, 5, num_workers=1)
    try:
        environments.reset()
        before = [environments.step(np.array([[0.1], [asked], [0.3]]))[0] for asked in (0.2, 0.8)][-1]
        observation, reward, terminated, truncated, infos = environments.step(np.full((3, 1), 0.1))
        assert infos["_failure"].tolist() == truncated.tolist() == [False, True, False]
        assert re.search(r"mjWARN_BAD(QPOS|QVEL|QACC)", infos["failure"][1])
        assert not terminated.any()
        np.testing.assert_allclose(reward, [0.1, 0, 0.1], rtol=1e-6)
        np.testing.assert_array_equal(infos["final_obs"][1], before[1])
        single = tasks.make("cartpole_swingup", start_seed(5, 1, 1))
        np.testing.assert_array_equal(observation[1], single.reset().observation)
        observation, reward, _, truncated, infos = environments.step(np.array([[0.7], [0.1], [0.1]]))
        np.testing.assert_array_equal(observation[1], single.step(np.array([0.1])).observation)
        assert infos["failure"].tolist() == ["The observation is not finite.", "", ""]
        assert truncated.tolist() == [True, False, False]
        np.testing.assert_allclose(reward, [0, 0.1, 0.1], rtol=1e-6)
        assert np.isfinite(observation).all()
    finally:
        environments.close()


def test_any_moment_of_any_episode_can_be_begun_alone(played):
    """Environments 0 and 2 late in the first episode, environment 1 in the second."""
    steps, actions = played
    environments = make_vector("cartpole_swingup", 3, 0, 250, num_workers=2)
    try:
        had = [actions[:3, 0], actions[4:5, 1], actions[:2, 2]]
        observation = environments.begin(7, np.array([0, 1, 0]), had)
        for i, t in enumerate((3, 5, 2)):
            np.testing.assert_array_equal(observation[i], steps[t][0][i])
        after = environments.step(np.stack([actions[3, 0], actions[5, 1], actions[2, 2]]))
        for i, t in enumerate((4, 6, 3)):
            np.testing.assert_array_equal(after[0][i], steps[t][0][i])
            assert (after[1][i], after[3][i]) == (steps[t][1][i], steps[t][3][i])
        # What is still under way is not mistaken for an answer.
        environments.send(actions[0][:2], Part(0, 2))
        np.testing.assert_array_equal(environments.begin(7, np.zeros(3, int)), steps[0][0])
        np.testing.assert_array_equal(environments.step(actions[0])[0], steps[1][0])
    finally:
        environments.close()


def test_start_states_differ_between_seeds_environments_and_episodes():
    seeds = [start_seed(*place) for place in itertools.product((0, 1), (0, 1, 2), (0, 1, 2))]
    assert len(set(seeds)) == len(seeds)


def test_an_error_in_a_worker_carries_its_traceback():
    environments = make_vector("cartpole_balance", 2, 0, num_workers=1)
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"Call reset\(\)"):
        environments.step(np.zeros((2, 1)))
    with pytest.raises(
        RuntimeError,
        match=r"process 0 \(environments 0 to 1\) failed:\nTraceback[\s\S]*An action must have shape",
    ):
        environments.begin(0, np.zeros(2, int), [np.zeros((1, 1)), np.zeros((0, 1))])
        # Actions of another shape, past the check of `step`.
        environments._simulators.send("begin", [[Moment(0, 0, 0, 0, np.zeros((1, 3)))]])
        environments._simulators.receive()


def test_actions_that_do_not_fit_are_refused_and_nothing_is_lost(balance):
    balance.reset()
    with pytest.raises(ValueError, match=r"of shape \(2, 1\); got shape \(3, 1\)"):
        balance.step(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="with 1 not finite"):
        balance.step(np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match="one integer seed and no options"):
        balance.reset(seed=[1, 2])
    assert balance.step(np.zeros((2, 1)))[1].shape == (2,)


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from bpt_rl.envs.tasks import make_vector\nmake_vector('cartpole_balance', 1, 0)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "ended with exit code 1" in last
    assert last.endswith('start a script\'s work below `if __name__ == "__main__":`.')


def test_what_cannot_be_made_is_refused_before_a_process_starts():
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="Nearest valid one: 'cartpole_balance'"):
        make_vector("cartpole_balanc", 2, 0)
    with pytest.raises(
        ValueError, match="num_environments and action_repeat must be at least 1; got 0 and 1"
    ):
        make_vector("cartpole_balance", 0, 0)
    with pytest.raises(ValueError, match="num_workers must not be negative; got -1"):
        make_vector("cartpole_balance", 2, 0, num_workers=-1)
    assert set(multiprocessing.active_children()) == before
