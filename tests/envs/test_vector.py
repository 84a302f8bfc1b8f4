import gc
import multiprocessing
import os
import signal
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from bpt_rl.envs import tasks
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


def test_a_worker_that_dies_is_reported_with_the_reason():
    before = set(multiprocessing.active_children())
    environments = make_vector("cartpole_balance", 3, 0, num_workers=2)
    environments.reset()
    victim = next(p for p in set(multiprocessing.active_children()) - before if p.name == "simulator-1")
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    with pytest.raises(
        RuntimeError, match=r"process 1 \(environments 2 to 2\) must live .* ended by SIGKILL"
    ):
        environments.step(np.zeros((3, 1), np.float32))
    assert set(multiprocessing.active_children()) == before
    with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="Make a new one"):
        environments.reset()


def test_an_error_in_a_worker_carries_its_traceback():
    environments = make_vector("cartpole_balance", 2, 0, num_workers=1)
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"Call reset\(\)"):
        environments.step(np.zeros((2, 1)))
    with pytest.raises(
        RuntimeError,
        match=r"process 0 \(environments 0 to 1\) failed:\nTraceback[\s\S]*An action must have shape",
    ):
        # Actions of another shape, past the check of `step`.
        environments._simulators.send("step", [np.zeros((2, 3))])
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
