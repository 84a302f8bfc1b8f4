import io
import os
import shutil
import threading
import zipfile

import numpy as np
import pytest

from bpt_rl.datasets import episode_layout, exorl
from bpt_rl.datasets.episode_source import EpisodeSource

NAMES = ("episode_000000_40.npz", "episode_000001_60.npz", "episode_000002_20.npz")


@pytest.fixture
def buffer(folder, tmp_path):
    """A folder of the three episodes that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "buffer")


def zipped(path, folder, names=NAMES, *, inner="buffer/", more=()):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"{inner}{name}", (folder / name).read_bytes())
        for name, content in more:
            archive.writestr(name, content)
    return path


def assert_same(read, episode):
    for key in exorl.KEYS:
        np.testing.assert_array_equal(getattr(read, key), getattr(episode, key), strict=True)


def test_folder_buffer_and_zip_give_the_same_episodes_in_any_order(buffer, episodes, tmp_path):
    archive = zipped(tmp_path / "a.zip", buffer, NAMES[::-1], more=[("video/0.mp4", b""), ("buffer/", b"")])
    for path, inner in ((buffer, ""), (tmp_path, "buffer/"), (archive, "buffer/")):
        with EpisodeSource.open(path) as source:
            assert source.path == path
            assert source.names == tuple(f"{inner}{name}" for name in NAMES)
            assert source.num_steps == (40, 60, 20)
            for i in (2, 0, 1, 0):
                assert_same(source.read(source.names[i]), episodes[i])


def test_threads_may_read_at_once(buffer, episodes, tmp_path):
    wrong = []

    def read(i):
        try:
            for _ in range(20):
                assert_same(source.read(source.names[i]), episodes[i])
        except Exception as error:
            wrong.append(error)

    with EpisodeSource.open(zipped(tmp_path / "a.zip", buffer)) as source:
        threads = [threading.Thread(target=read, args=(i,)) for i in (0, 1, 2, 0, 1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_closed_zip_and_an_unknown_name_are_named(buffer, tmp_path):
    source = EpisodeSource.open(zipped(tmp_path / "a.zip", buffer))
    with source, pytest.raises(FileNotFoundError, match=r"a\.zip holds no video\.mp4\. Check"):
        source.read("video.mp4")
    with pytest.raises(ValueError, match=r"a\.zip is closed\. Open it again"):
        source.read(source.names[0])


def fingerprint(path):
    with EpisodeSource.open(path) as source:
        return source.fingerprint


def test_the_fingerprint_of_a_zip_changes_with_its_episodes_alone(buffer, tmp_path):
    original = fingerprint(zipped(tmp_path / "a.zip", buffer))
    assert fingerprint(zipped(tmp_path / "b.zip", buffer, NAMES[::-1], more=[("0.mp4", b"x")])) == original
    others = [
        zipped(tmp_path / "c.zip", buffer, NAMES[:2]),
        zipped(tmp_path / "d.zip", buffer, inner="other/"),
    ]
    content = (buffer / NAMES[0]).read_bytes()
    (buffer / NAMES[0]).write_bytes(content[::-1])
    others.append(zipped(tmp_path / "e.zip", buffer))
    assert len({original, *map(fingerprint, others)}) == 4


def test_the_fingerprint_of_a_folder_changes_with_names_sizes_and_times(buffer):
    prints = [fingerprint(buffer)]
    assert fingerprint(buffer) == prints[0]
    status = (buffer / NAMES[0]).stat()
    os.utime(buffer / NAMES[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    prints.append(fingerprint(buffer))
    content = (buffer / NAMES[0]).read_bytes()
    (buffer / NAMES[0]).write_bytes(content + b"\0")
    os.utime(buffer / NAMES[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    prints.append(fingerprint(buffer))
    (buffer / NAMES[0]).rename(buffer / "episode_000007_40.npz")
    prints.append(fingerprint(buffer))
    assert len(set(prints)) == 4


def test_two_episodes_of_one_index_are_both_named(buffer, tmp_path):
    shutil.copy(buffer / NAMES[1], buffer / "20211012T120000_1_60.npz")
    names = (*NAMES, "20211012T120000_1_60.npz")
    for path in (buffer, zipped(tmp_path / "a.zip", buffer, names)):
        with pytest.raises(
            ValueError, match=r"holds .*20211012T120000_1_60\.npz and .*episode_000001_60\.npz"
        ):
            EpisodeSource.open(path)


def test_a_folder_may_hold_links_to_episodes_but_no_dangling_ones(folder, episodes, tmp_path):
    for name in NAMES[:2]:
        (tmp_path / name).symlink_to(folder / name)
    with EpisodeSource.open(tmp_path) as source:
        assert source.names == NAMES[:2]
        assert_same(source.read(NAMES[1]), episodes[1])
    (tmp_path / NAMES[2]).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"must be a plain file; .*{NAMES[2]} is"):
        EpisodeSource.open(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["episode_000003_40.npz", "other.npz"])
def test_pipes_and_folders_named_like_episodes_are_refused_without_waiting(buffer, make, name):
    make(buffer / name)
    with pytest.raises(ValueError, match=rf"must be a plain file; .*{name} is a folder, a pipe"):
        EpisodeSource.open(buffer)


def test_a_pipe_in_place_of_a_source_or_an_episode_is_refused_without_waiting(buffer, tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    with pytest.raises(FileNotFoundError, match=r"there is neither at .*a\.zip"):
        EpisodeSource.open(tmp_path / "a.zip")
    with EpisodeSource.open(buffer) as source:
        (buffer / NAMES[0]).unlink()
        os.mkfifo(buffer / NAMES[0])
        with pytest.raises(FileNotFoundError, match=rf"there is none at .*{NAMES[0]}"):
            source.read(NAMES[0])


@pytest.mark.parametrize(
    "name", ["episode_000003_40x.npz", "episod_000003_40.npz", f"episode_{'9' * 5000}_4.npz"]
)
def test_an_npz_among_a_zips_episodes_must_have_an_episodes_name(buffer, tmp_path, name):
    path = zipped(tmp_path / "a.zip", buffer, more=[(f"buffer/{name}", b"")])
    with pytest.raises(
        ValueError, match=rf"a\.zip .*'buffer/{name}' lies among episodes but has no episode's"
    ):
        EpisodeSource.open(path)
    with EpisodeSource.open(zipped(tmp_path / "b.zip", buffer, more=[(name, b"")])) as source:
        assert len(source.names) == 3


def test_unsafe_zips_are_refused_with_file_member_and_reason(buffer, tmp_path):
    for i, name in enumerate(["../escape.npz", "/tmp/escape.npz"]):
        path = zipped(tmp_path / f"{i}.zip", buffer, more=[(name, b"x")])
        with pytest.raises(ValueError, match=rf"{i}\.zip is a file but no whole zip .*'{name}' leads out"):
            EpisodeSource.open(path)
    assert not (tmp_path / "escape.npz").exists()


def test_an_episode_above_the_largest_size_is_refused_before_it_is_read(
    buffer, episode, tmp_path, monkeypatch
):
    size = (buffer / NAMES[1]).stat().st_size
    path = zipped(tmp_path / "a.zip", buffer)
    monkeypatch.setattr(episode_layout, "LARGEST_EPISODE", size - 1)
    message = rf"at most {size - 1} bytes; .*{NAMES[1]} has {size}"
    with pytest.raises(ValueError, match=message):
        EpisodeSource.open(path)
    with pytest.raises(ValueError, match=message):
        EpisodeSource.open(buffer)
    with pytest.raises(ValueError, match=message):
        exorl.read_episode(buffer / NAMES[1])
    with pytest.raises(ValueError, match=rf"at most {size - 1} bytes; the opened file has {size}"):
        exorl.read_episode(io.BytesIO((buffer / NAMES[1]).read_bytes()))


def test_the_largest_size_holds_for_the_bytes_in_the_zip_too(tmp_path, monkeypatch):
    monkeypatch.setattr(episode_layout, "LARGEST_EPISODE", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(NAMES[0], os.urandom(1000))
    with pytest.raises(ValueError, match=rf"at most 1000 bytes; .*a\.zip/{NAMES[0]} has 1005"):
        EpisodeSource.open(tmp_path / "a.zip")


def test_a_huge_sparse_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / NAMES[0]).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=rf"at most {2**28} bytes; .*{NAMES[0]} has {2**40}"):
        exorl.read_episode(tmp_path / NAMES[0])
    with pytest.raises(ValueError, match=r"no whole zip .*no end record"):
        EpisodeSource.open(tmp_path / NAMES[0])
