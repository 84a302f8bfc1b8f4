import multiprocessing

import numpy as np
import pytest

from bpt_rl.datasets import exorl
from bpt_rl.envs import rewards, tasks
from bpt_rl.envs.recording import RecordingPlan, recording

N, T, ROUND = 3, 1000, 2


def plan_of(folder, skill_dim=2):
    return RecordingPlan(
        task="cartpole_swingup",
        num_environments=N,
        seed=7,
        skill_dim=skill_dim,
        folder=folder,
        write=exorl.write_episode,
    )


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """One round: its plan, actions, skills, observations received and returns."""
    plan = plan_of(tmp_path_factory.mktemp("recorded"))
    generator = np.random.default_rng(0)
    actions = generator.uniform(-1, 1, (T, N, 1)).astype(np.float32)
    skills = generator.normal(size=(T, N, 2)).astype(np.float32)
    with recording(plan, num_workers=2) as environments:
        observations = [environments.begin(ROUND)]
        for action, skill in zip(actions, skills, strict=True):
            environments.send(action, skill)
            observations.append(environments.receive())
        returns = environments.save()
    return plan, actions, skills, np.stack(observations), returns


def test_every_episode_is_that_of_an_environment_of_its_own(played):
    plan, actions, skills, observations, returns = played
    for i in range(N):
        index = ROUND * N + i
        episode = exorl.read_episode(plan.folder / f"episode_{index:06d}_1000.npz")
        environment = tasks.make(plan.task, int(np.random.SeedSequence([7, index]).generate_state(1)[0]))
        expected, paid = [environment.reset().observation], []
        states = [tasks.physics_state(environment)]
        for action in actions[:, i]:
            time_step = environment.step(action)
            expected.append(time_step.observation)
            paid.append(time_step.reward)
            states.append(tasks.physics_state(environment))
        np.testing.assert_array_equal(episode.observation, expected)
        np.testing.assert_array_equal(observations[:, i], expected)
        np.testing.assert_array_equal(episode.physics, states)
        np.testing.assert_array_equal(episode.reward[1:, 0], np.float32(paid))
        np.testing.assert_array_equal(episode.action[1:], actions[:, i])
        np.testing.assert_array_equal(episode.extras["skill"][1:], skills[:, i])
        np.testing.assert_array_equal(episode.extras["skill"][0], skills[0, i])
        assert not episode.action[0].any()
        assert not episode.reward[0].any()
        # Sums of 1000 float32 rewards.
        np.testing.assert_allclose(returns[i], np.sum(paid), rtol=1e-6)


def test_recorded_rewards_are_those_of_relabelling(played):
    plan, *_ = played
    for _, episode in exorl.iterate_episodes(plan.folder):
        relabelled = rewards.relabel(plan.task, episode.physics, episode.action)
        # The stored reward is float32.
        np.testing.assert_allclose(relabelled, episode.reward[:, 0], atol=1e-6)


def test_a_failure_to_write_reaches_the_caller_and_leaves_no_process(tmp_path):
    before = set(multiprocessing.active_children())
    (tmp_path / "buffer").write_text("in the way")
    with (
        pytest.raises(RuntimeError, match=r"environments 0 to 2\) failed:\nTraceback[\s\S]*Error"),
        recording(plan_of(tmp_path / "buffer", skill_dim=0), num_workers=1) as environments,
    ):
        environments.begin(0)
        environments.save()
    assert set(multiprocessing.active_children()) == before
