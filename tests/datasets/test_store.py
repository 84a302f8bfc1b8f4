import dataclasses

import h5py
import numpy as np
import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.store import SMALLEST_STD, Store, attributes_digest, describe, fixed_text, verify

TASKS = ("cartpole_swingup", "cartpole_balance")


@pytest.fixture
def path(folder, tmp_path):
    return build_store(
        BuildConfig(source=(str(folder),), out=str(tmp_path / "s.h5"), tasks=TASKS, num_workers=1)
    )


def spoil(path, name, index, value):
    with h5py.File(path, "r+") as file:
        file[name][index] = value


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
        assert file["reward/cartpole_swingup"].shape == (3, 61)
        assert file["return/cartpole_swingup"].dtype == np.float32


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


def test_the_deviation_of_an_entry_that_never_moves_has_a_floor(path):
    spoil(path, "observation", np.s_[:, :, 2], 5.0)
    with Store.open(path) as store:
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


def test_verify_accepts_an_untouched_store_and_names_the_episode_that_was_changed(path):
    assert verify(path) == 3
    content = path.read_bytes()
    for name, index, message in [
        ("observation", (1, 7, 2), "episode 1 of .* does not match its digest"),
        ("physics", (2, 20, 3), "episode 2 of .* does not match its digest"),
        ("reward/cartpole_balance", (0, 1), "episode 0 of .* does not match its digest"),
        ("action", (2, 30, 0), "episode 2 of .* has padding that is not zero"),
        (
            "return/cartpole_swingup",
            0,
            "episode 0 of .* has a return of cartpole_swingup that is not the sum",
        ),
        ("length", 0, "episode 0 of .* does not match its digest"),
        ("digest", 1, "episode 1 of .* does not match its digest"),
    ]:
        spoil(path, name, index, 9)
        with pytest.raises(ValueError, match=message):
            verify(path)
        path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        file.attrs["digest"] = fixed_text("0")
        file.attrs["attributes_digest"] = fixed_text(attributes_digest(file.attrs))
    with pytest.raises(ValueError, match=r"digest must follow from its episodes'; that of .* does not"):
        verify(path)


def test_no_flipped_bit_of_an_array_or_attribute_passes(path):
    content = path.read_bytes()
    with Store.open(path) as store:
        before = describe(store)
        arrays = [store.episode(i) for i in range(3)]
    generator = np.random.default_rng(0)
    refused = 0
    for position in generator.choice(len(content), 150, replace=False):
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(spoilt)
        try:
            verify(path)
        except ValueError:
            refused += 1
            continue
        # The bit lies in free space of the file.
        with Store.open(path) as store:
            assert describe(store) == before
            for i in range(3):
                np.testing.assert_equal(vars(store.episode(i)), vars(arrays[i]))
    assert refused > 50


def test_describe_gives_plain_values_of_a_path_and_of_a_store(path):
    with Store.open(path) as store:
        returns = store.returns("cartpole_balance")
        assert describe(store) == describe(path)
    found = describe(path)
    assert (found["num_episodes"], found["num_steps"], found["episode_steps"]) == (3, 120, [20, 60])
    assert found["returns"]["cartpole_balance"]["max"] == returns.max()
    assert found["bytes"] == path.stat().st_size


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


def test_files_that_are_no_store_are_refused(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none is at .*gone\.h5\. Build it first"):
        Store.open(tmp_path / "gone.h5")
    (tmp_path / "text.h5").write_text("no store")
    with pytest.raises(ValueError, match=r"must be a whole HDF5 file; .*text\.h5 is not: "):
        Store.open(tmp_path / "text.h5")
    (tmp_path / "cut.h5").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"must be a whole HDF5 file; .*cut\.h5 is not: "):
        Store.open(tmp_path / "cut.h5")
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(ValueError, match="has no format version, so that it is no store"):
        Store.open(tmp_path / "other.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["subset"] = fixed_text("other")
    with pytest.raises(
        ValueError, match=r"s\.h5 has attributes that do not match their digest\. Build it again"
    ):
        Store.open(path)
    with h5py.File(path, "r+") as file:
        file.attrs["subset"] = fixed_text("full")
        action = file["action"][:]
        del file["action"]
    with pytest.raises(ValueError, match=r"s\.h5 cannot be read: .*action"):
        Store.open(path)
    with h5py.File(path, "r+") as file:
        file["action"] = action[:2]
    with pytest.raises(ValueError, match=r"has arrays of \[2, 3\] episodes and \[61\] rows"):
        Store.open(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(ValueError, match=r"s\.h5 has format version 99 and not 1\. Build it again"):
        Store.open(path)
