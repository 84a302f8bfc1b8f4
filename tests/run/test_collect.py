import fcntl
import os
import re

import numpy as np
import pytest

from bpt_rl.collect_config import CollectConfig
from bpt_rl.datasets import exorl
from bpt_rl.envs import rewards, tasks
from bpt_rl.run import collect as collect_lib
from bpt_rl.run.collect import collect, record_episode


def config_of(tmp_path, **changes):
    values = {
        "task": "cartpole_swingup",
        "num_steps": 1500,
        "action_repeat": 4,
        "out": str(tmp_path),
        "num_workers": 1,
    }
    return CollectConfig(**(values | changes))


def contents(buffer):
    return {path.name: path.read_bytes() for path in buffer.iterdir()}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    return collect(config_of(tmp_path_factory.mktemp("collect")))


def test_episodes_have_exorls_layout_and_are_rounded_up_to_whole_ones(collected):
    assert collected.parts[-3:] == ("cartpole", "ornstein_uhlenbeck", "buffer")
    assert exorl.list_episodes(collected) == ("episode_000000_1000.npz", "episode_000001_1000.npz")
    for _, episode in exorl.iterate_episodes(collected):
        assert episode.num_steps == 1000
        assert episode.reward.shape == episode.discount.shape == (1001, 1)
        assert not episode.action[0].any()
        assert not episode.reward[0].any()
        assert (episode.discount == 1).all()


def test_every_control_step_is_recorded_and_relabels_to_its_own_reward(collected):
    for _, episode in exorl.iterate_episodes(collected):
        relabelled = rewards.relabel("cartpole_swingup", episode.physics, episode.action)
        np.testing.assert_allclose(relabelled, episode.reward[:, 0], atol=1e-6)
        held = episode.action[1:].reshape(250, 4)
        assert (held == held[:, :1]).all()
        assert (np.diff(held[:, 0]) != 0).mean() > 0.5


def test_replaying_the_actions_meets_every_observation(collected):
    episode = exorl.read_episode(collected / "episode_000001_1000.npz")
    seed, _ = np.random.SeedSequence([0, 1]).generate_state(2)
    environment = tasks.make("cartpole_swingup", int(seed))
    np.testing.assert_array_equal(environment.reset().observation, episode.observation[0])
    for t in range(1, 1001):
        np.testing.assert_array_equal(environment.step(episode.action[t]).observation, episode.observation[t])


def test_processes_do_not_change_the_episodes(collected, tmp_path):
    assert contents(collect(config_of(tmp_path, num_workers=2))) == contents(collected)


def test_an_interrupted_collection_goes_on_without_writing_what_is_whole(collected, tmp_path, monkeypatch):
    buffer = collect(config_of(tmp_path, num_steps=1000))
    (buffer / "episode_000001_1000.npz").write_bytes(b"PK cut short")
    written = []
    write = exorl.write_episode
    monkeypatch.setattr(
        collect_lib.exorl,
        "write_episode",
        lambda path, episode: (written.append(path.name), write(path, episode)),
    )
    progress = []
    collect(config_of(tmp_path), lambda done, total: progress.append((done, total)))
    assert written == ["episode_000001_1000.npz"]
    assert progress == [(1, 2), (2, 2)]
    assert contents(buffer) == contents(collected)
    collect(config_of(tmp_path))
    assert written == ["episode_000001_1000.npz"]


def test_episodes_differ_by_index_seed_and_algorithm():
    first = record_episode(CollectConfig(task="cartpole_balance"), 0)
    for other in [
        record_episode(CollectConfig(task="cartpole_balance"), 1),
        record_episode(CollectConfig(task="cartpole_balance", seed=1), 0),
    ]:
        assert np.abs(first.observation[0] - other.observation[0]).max() > 0
        assert np.abs(first.action - other.action).max() > 0.1
    uniform = record_episode(CollectConfig(task="cartpole_balance", algorithm="random"), 0)
    np.testing.assert_array_equal(first.observation[0], uniform.observation[0])
    correlation = [np.corrcoef(e.action[1:-1, 0], e.action[2:, 0])[0, 1] for e in (first, uniform)]
    # 1 - decay = 0.85, a little less for clipping; five standard errors around 0.
    assert correlation[0] > 0.7
    assert abs(correlation[1]) < 5 / np.sqrt(1000)


def test_episodes_of_another_configuration_are_never_mixed(collected, tmp_path):
    out = collected.parents[2]
    with pytest.raises(
        ValueError, match=r"was collected with seed = 0, and 3 is asked for\. Choose another `out`"
    ):
        collect(config_of(out, seed=3))
    buffer = tmp_path / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    buffer.mkdir(parents=True)
    (buffer / "episode_000000_1000.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"hold the episodes of one collection; .* holds others"):
        collect(config_of(tmp_path))


def test_two_processes_never_collect_into_one_folder(collected):
    folder, out = collected.parent, collected.parents[2]
    # A lock is the open file's, not the process's: a second opening stands for a second process.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=rf"another one collects into {re.escape(str(folder))}\. Wait"):
            collect(config_of(out))
    finally:
        os.close(descriptor)
    collect(config_of(out))


def test_what_cannot_be_recorded_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        ValueError, match="action_repeat must divide the 1000 control steps of an episode; got 3"
    ):
        collect(config_of(tmp_path, action_repeat=3))
    with pytest.raises(ValueError, match="Nearest valid one: 'cartpole_balance'"):
        collect(config_of(tmp_path, task="cartpole_balanc"))
    assert not list(tmp_path.iterdir())
