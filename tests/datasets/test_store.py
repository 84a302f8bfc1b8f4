import dataclasses

import h5py
import numpy as np
import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets import exorl
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.store_writer import SMALLEST_STD
from bpt_rl.envs import features, rewards

TASKS = ("cartpole_swingup", "cartpole_balance")


@pytest.fixture
def path(folder, tmp_path):
    return build_store(
        BuildConfig(source=(str(folder),), out=str(tmp_path / "s.h5"), tasks=TASKS, num_workers=1)
    )


def test_attributes_and_sizes(path):
    with Store.open(str(path)) as store:
        assert store.num_episodes == 3
        assert store.lengths.tolist() == [40, 60, 20]
        assert store.tasks == TASKS
        assert (store.domain, store.source, store.subset) == ("cartpole", "cartpole/random", "full")
        assert (store.action_repeat, store.observation_dim, store.action_dim) == (1, 5, 1)
        assert set(store.versions) == {"numpy", "mujoco", "dm_control", "h5py", "bpt_rl"}
        assert len(store.digest) == 64


def test_shapes_types_and_chunks_are_those_of_the_contract(path):
    with h5py.File(path) as file:
        found = {
            name: (file[name].shape, file[name].dtype.str) for name in ("observation", "action", "physics")
        }
        assert found == {
            "observation": ((3, 61, 5), "<f4"),
            "action": ((3, 61, 1), "<f4"),
            "physics": ((3, 61, 4), "<f8"),
        }
        assert file["observation"].chunks == (1, 61, 5)
        assert file["features"].shape == (3, 61, len(features.FEATURES["cartpole"]))
        assert file["reward/cartpole_swingup"].shape == (3, 61)
        assert file["return/cartpole_swingup"].dtype == np.float32


def test_blocks_hold_what_episodes_hold_padded_with_zeros(path):
    names = ("observation", "action", "physics", "features", "discount", "stored_reward")
    names += tuple(f"reward/{task}" for task in TASKS)
    with Store.open(path) as store:
        whole = store.block(names, 0, 3)
        assert {values.shape[:2] for values in whole.values()} == {(3, 61)}
        for i in range(3):
            episode, one = store.episode(i), store.block(names, i, i + 1)
            columns = [episode.observation, episode.action, episode.physics, episode.features]
            columns += [episode.discount, episode.reward, *(episode.task_reward[task] for task in TASKS)]
            for name, expected in zip(names, columns, strict=True):
                np.testing.assert_array_equal(whole[name][i, : len(expected)], expected)
                assert not whole[name][i, len(expected) :].any()
                np.testing.assert_array_equal(one[name][0], whole[name][i])
        for start, stop in ((-1, 1), (2, 4), (2, 1)):
            with pytest.raises(IndexError, match=f"got {start} to {stop}"):
                store.block(names, start, stop)


@pytest.mark.parametrize("task", ["cartpole_swingup_sparse", "cartpole_position(position=0.5)"])
def test_a_task_that_is_not_stored_is_computed_from_features(path, episodes, task):
    with Store.open(path) as store:
        block = store.block((f"reward/{task}",), 0, 3)[f"reward/{task}"]
        statistics, returns = store.statistics(task), store.returns(task)
    for i, episode in enumerate(episodes):
        reward = rewards.relabel(task, episode.physics, episode.action, episode.observation)
        np.testing.assert_array_equal(block[i, : len(reward)], reward)
        assert not block[i, len(reward) :].any()
        assert returns[i] == np.float32(reward.sum(dtype=np.float64))
    assert statistics.returns == tuple(sorted(returns.tolist()))
    assert statistics.reward_abs_max == np.abs(block).max()


def test_a_users_function_sees_no_padding(path, episodes, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def cartpole_inverse(features, observation, action): return 1 / features['pole_cosine']\n"
    )
    with Store.open(path) as store:
        block = store.block((f"reward/{own}:cartpole_inverse",), 0, 3)[f"reward/{own}:cartpole_inverse"]
    for i, episode in enumerate(episodes):
        expected = 1 / features.physical_features("cartpole", episode.physics)[1:, 2]
        np.testing.assert_array_equal(block[i, 1 : len(expected) + 1], expected.astype(np.float32))
        assert not block[i, len(expected) + 1 :].any()


def test_a_store_of_merged_steps_cannot_compute_rewards(folder, tmp_path):
    config = BuildConfig(
        source=(str(folder),), out=str(tmp_path / "s.h5"), tasks=TASKS, action_repeat=4, num_workers=1
    )
    message = r"Only a store of action_repeat 1 can .* has action_repeat 4"
    with Store.open(build_store(config)) as store, pytest.raises(ValueError, match=message):
        store.returns("cartpole_swingup_sparse")


def test_statistics_equal_those_of_all_rows_at_once(path, episodes):
    with Store.open(path) as store:
        statistics = store.statistics("cartpole_balance")
        rewards = [store.episode(i).task_reward["cartpole_balance"] for i in range(3)]
        assert (statistics.source, statistics.subset) == ("cartpole/random", "full")
        assert statistics.digest == store.digest
    rows = np.concatenate([episode.observation for episode in episodes]).astype(np.float64)
    np.testing.assert_allclose(statistics.observation_mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.observation_std, rows.std(axis=0), rtol=1e-12)
    assert list(statistics.returns) == sorted(np.float32(r.sum(dtype=np.float64)) for r in rewards)
    assert statistics.reward_abs_max == max(r.max() for r in rewards)
    assert (statistics.episode_steps, statistics.num_episodes, statistics.action_dim) == (60, 3, 1)


def test_the_deviation_of_an_entry_that_never_moves_has_a_floor(episodes, tmp_path):
    buffer = tmp_path / "cartpole" / "buffer"
    still = np.array(episodes[0].observation)
    still[:, 2] = 5.0
    episode = dataclasses.replace(episodes[0], observation=still)
    exorl.write_episode(buffer / "episode_0_40.npz", episode)
    config = BuildConfig(source=(str(buffer),), out=str(tmp_path / "s.h5"), tasks=TASKS, num_workers=1)
    with Store.open(build_store(config)) as store:
        statistics = store.statistics("cartpole_balance")
    assert statistics.observation_mean[2] == 5.0
    assert statistics.observation_std[2] == SMALLEST_STD


def test_statistics_are_plain_values_that_json_keeps(path):
    with Store.open(path) as store:
        statistics = dataclasses.asdict(store.statistics("cartpole_balance"))
    kinds = {
        type(v) for value in statistics.values() for v in (value if isinstance(value, tuple) else (value,))
    }
    assert kinds == {str, int, float}


def test_a_task_or_episode_that_is_not_there_is_refused(path):
    with Store.open(path) as store:
        for method in (store.returns, store.statistics):
            with pytest.raises(
                ValueError, match=r"got 'walker_run', and .* holds cartpole_swingup, cartpole_balance"
            ):
                method("walker_run")
        for index in (-1, 3):
            with pytest.raises(IndexError, match=rf"must lie in \[0, 3\); got {index}"):
                store.episode(index)


def test_files_that_are_no_store_are_refused(path, edited, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none is at .*gone\.h5\. Build it first"):
        Store.open(tmp_path / "gone.h5")
    whole = path.read_bytes()
    (tmp_path / "empty.h5").write_bytes(b"")
    (tmp_path / "text.h5").write_text("no store")
    (tmp_path / "cut.h5").write_bytes(whole[:-1])
    (tmp_path / "long.h5").write_bytes(whole + b"\0")
    h5py.File(tmp_path / "other.h5", "w").close()
    for name in ("empty", "text", "cut", "long", "other"):
        with pytest.raises(ValueError, match=rf"{name}\.h5 does not end like a store: .*\. Build it again"):
            Store.open(tmp_path / f"{name}.h5")
    with edited(path) as file:
        file.attrs["format_version"] = 99
    with pytest.raises(ValueError, match=r"must have format version 2; .*s\.h5 has 99\. Build it again"):
        Store.open(path)


@pytest.mark.parametrize("name", ["length", "name", "digest", "return/cartpole_swingup", "observation_mean"])
def test_what_no_episode_holds_is_checked_whenever_a_store_is_opened(path, name):
    """HDF5 has no checksum of these numbers."""
    with h5py.File(path) as file:
        place = file[name].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"s\.h5 is damaged: its structure does not match the digest"):
        Store.open(path)
