import io
import zipfile

import numpy as np
import pytest

from bpt_rl.datasets import exorl

DTYPES = {"observation": "f4", "action": "f4", "reward": "f4", "discount": "f4", "physics": "f8"}


def arrays_of(trajectory):
    return {key: getattr(trajectory, key) for key in exorl.KEYS}


def save(path, trajectory, **changes):
    """Writes an npz without any check; a change to None leaves the key out."""
    arrays = {key: values for key, values in (arrays_of(trajectory) | changes).items() if values is not None}
    np.savez_compressed(path, **arrays)
    return path


def assert_same(trajectory, other):
    for key in exorl.KEYS:
        np.testing.assert_array_equal(getattr(trajectory, key), getattr(other, key))
        assert getattr(trajectory, key).dtype == getattr(other, key).dtype


def test_what_is_written_is_read_bit_for_bit_with_exorls_keys_and_types(tmp_path, episode):
    path = tmp_path / "episode_000000_40.npz"
    exorl.write_episode(path, episode)
    assert_same(exorl.read_episode(path), episode)
    with np.load(path) as file:
        assert {key: file[key].dtype.str[1:] for key in file.files} == DTYPES
        assert file["reward"].shape == file["discount"].shape == (41, 1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_opened_file_is_read_like_its_path(folder, episodes):
    content = (folder / "episode_000000_40.npz").read_bytes()
    assert_same(exorl.read_episode(io.BytesIO(content)), episodes[0])
    with (folder / "episode_000000_40.npz").open("rb") as file:
        assert_same(exorl.read_episode(file), episodes[0])
    with zipfile.ZipFile(io.BytesIO(), "w") as archive:
        archive.writestr("a.npz", content)
        with archive.open("a.npz") as file:
            assert_same(exorl.read_episode(file), episodes[0])


def test_unknown_keys_travel_as_extras(tmp_path, episode):
    skill = np.eye(4, dtype=np.float32)[:1]
    path = save(tmp_path / "a.npz", episode, skill=skill)
    read = exorl.read_episode(path)
    assert list(read.extras) == ["skill"]
    exorl.write_episode(tmp_path / "b.npz", read)
    np.testing.assert_array_equal(exorl.read_episode(tmp_path / "b.npz").extras["skill"], skill)


def test_other_floating_types_become_float32(tmp_path, episode):
    path = save(tmp_path / "a.npz", episode, action=episode.action.astype(np.float64))
    assert_same(exorl.read_episode(path), episode)


def test_episodes_of_folder_buffer_and_zip_come_by_index_in_both_namings(tmp_path, episode):
    names = ["20211012T120000_10_40.npz", "episode_000002_40.npz", "20211012T130000_1_40.npz"]
    (tmp_path / "buffer").mkdir()
    with zipfile.ZipFile(tmp_path / "proto.zip", "w") as archive:
        archive.writestr("video/0.mp4", b"")
        for i, name in enumerate(names):
            path = save(tmp_path / "buffer" / name, episode, reward=np.full((41, 1), i, np.float32))
            archive.write(path, f"buffer/{name}")
    (tmp_path / "buffer" / "notes.npz").write_bytes(b"")
    for source in (tmp_path, tmp_path / "buffer", tmp_path / "proto.zip"):
        found = [
            (name.removeprefix("buffer/"), read.reward[0, 0]) for name, read in exorl.iterate_episodes(source)
        ]
        assert found == [(names[2], 2), (names[1], 1), (names[0], 0)]


def test_missing_files_folders_and_episodes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is none at .*gone\.npz\. Check the path"):
        exorl.read_episode(tmp_path / "gone.npz")
    with pytest.raises(FileNotFoundError, match=r"there is neither at .*gone\. Check the path"):
        exorl.iterate_episodes(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"\{index\}_\{length\}\.npz; .* holds none"):
        exorl.iterate_episodes(tmp_path)


def test_a_file_that_is_no_whole_zip_is_refused(tmp_path, folder):
    content = (folder / "episode_000000_40.npz").read_bytes()
    for i, part in enumerate([b"", b"no zip", content[:30], content[:-30]]):
        (tmp_path / f"{i}.npz").write_bytes(part)
        with pytest.raises(ValueError, match=rf"must be a whole npz file; .*{i}\.npz cannot be read"):
            exorl.read_episode(tmp_path / f"{i}.npz")
        with pytest.raises(ValueError, match=r"is a file but no whole zip \(it has no end record"):
            exorl.iterate_episodes(tmp_path / f"{i}.npz")


def test_a_flipped_byte_is_refused_in_a_file_and_within_a_zip(tmp_path, folder):
    content = bytearray((folder / "episode_000000_40.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "episode_000000_40.npz").write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole npz file"):
        exorl.read_episode(tmp_path / "episode_000000_40.npz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("episode_000000_40.npz", b"x" * 100)
    spoilt = (tmp_path / "a.zip").read_bytes().replace(b"x" * 100, b"x" * 99 + b"y")
    (tmp_path / "a.zip").write_bytes(spoilt)
    with pytest.raises(ValueError, match=r"a\.zip/episode_000000_40\.npz cannot be read \(Bad CRC-32"):
        list(exorl.iterate_episodes(tmp_path / "a.zip"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"physics": None, "reward": None},
            r"must hold observation, .*; .*a\.npz lacks reward, physics\. Leave",
        ),
        (
            {"reward": np.zeros(41, np.float32)},
            r"reward must have two axes .*; got shape \(41,\) beside 41 rows",
        ),
        (
            {"action": np.zeros((40, 1), np.float32)},
            r"action must have .* as many rows .*; got shape \(40, 1\)",
        ),
        (
            {"discount": np.zeros((41, 2), np.float32)},
            r"discount must have .*1 column.*; got shape \(41, 2\)",
        ),
        ({"observation": np.float32(1)}, r"observation must have two axes .*; got shape \(\) beside 0 rows"),
        ({"physics": np.zeros((41, 4), np.float32)}, r"physics must be float64, .*; got float32"),
        ({"action": np.zeros((41, 1), np.int64)}, r"action must be of a floating type; got int64"),
        (
            {"action": np.array([["a"]] * 41, object)},
            r"a\.npz cannot be read \('action.npy': Object arrays cannot be loaded",
        ),
    ],
)
def test_an_array_that_breaks_the_layout_is_named(tmp_path, episode, changes, message):
    path = tmp_path / "a.npz"
    save(path, episode, **changes)
    with pytest.raises(ValueError, match=message):
        exorl.read_episode(path)


@pytest.mark.parametrize(("key", "value"), [("observation", np.nan), ("physics", np.inf), ("action", 1e300)])
def test_a_value_that_is_not_finite_is_named_with_its_row(tmp_path, episode, key, value):
    values = getattr(episode, key).astype(np.float64)
    values[7:9, 0] = value
    path = save(tmp_path / "a.npz", episode, **{key: values})
    shown = "nan" if np.isnan(value) else "inf"
    with pytest.raises(ValueError, match=rf"{key} must be finite; got {shown} in row 7 of .*a\.npz"):
        exorl.read_episode(path)


def test_a_length_in_the_name_that_the_rows_belie_is_refused(tmp_path, episode):
    path = save(tmp_path / "episode_000000_41.npz", episode)
    with pytest.raises(ValueError, match=r"state the episode's number of steps; .*_41\.npz holds 40"):
        exorl.read_episode(path)
    with pytest.raises(ValueError, match=r"state the episode's number of steps; .*_39\.npz holds 40"):
        exorl.write_episode(tmp_path / "20211012T120000_0_39.npz", episode)
    assert [p.name for p in tmp_path.iterdir()] == ["episode_000000_41.npz"]


def test_writing_refuses_what_reading_would(tmp_path, episode):
    episode.physics[3, 1] = np.nan
    with pytest.raises(ValueError, match="physics must be finite; got nan in row 3"):
        exorl.write_episode(tmp_path / "a.npz", episode)
    episode.physics[3, 1] = 0
    episode.extras["skill"] = np.array([None])
    with pytest.raises(ValueError, match="skill holds Python objects"):
        exorl.write_episode(tmp_path / "a.npz", episode)
    assert not list(tmp_path.iterdir())
