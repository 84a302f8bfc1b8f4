import re
import subprocess

import numpy as np
import pytest

from bpt_rl.datasets import exorl
from bpt_rl.envs import tasks
from bpt_rl.run import film
from bpt_rl.run.film import FilmError, write_film
from bpt_rl.run.film_sources import dataset_episode

PIL_IMAGE = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def physics():
    """States of a pole that swings through: the picture must change from first to last."""
    environment = tasks.make("cartpole_swingup", 0, 4)
    environment.reset()
    states = [tasks.physics_state(environment)]
    for t in range(12):
        environment.step(np.array([1.0 if t < 6 else -1.0]))
        states.append(tasks.physics_state(environment))
    return np.stack(states)


@pytest.fixture(scope="module", params=["gif", "mp4"])
def drawn(request, physics, tmp_path_factory):
    """A film on the first backend that works, or a skip with the reason."""
    path = tmp_path_factory.mktemp("film") / "new" / f"swing.{request.param}"
    try:
        write_film(path, "cartpole_swingup", physics, action_repeat=4, size=(48, 64))
    except FilmError as error:
        pytest.skip(str(error))
    return path


def frames_of(path):
    if path.suffix == ".gif":
        with PIL_IMAGE.open(path) as gif:
            frames, milliseconds = [], 0
            for index in range(gif.n_frames):
                gif.seek(index)
                frames.append(np.asarray(gif.convert("RGB"), np.int64))
                milliseconds += gif.info["duration"]
        return np.stack(frames), milliseconds / 1000
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    command = [program, "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True)
    width, height = map(int, re.search(rb" (\d{2,})x(\d{2,})", decoded.stderr).groups())
    frames_per_second = float(re.search(rb"([\d.]+) fps", decoded.stderr).group(1))
    frames = np.frombuffer(decoded.stdout, np.uint8).reshape(-1, height, width, 3)
    return frames.astype(np.int64), len(frames) / frames_per_second


def test_a_film_shows_the_episode_and_lasts_as_long(drawn, physics):
    frames, seconds = frames_of(drawn)
    # 12 steps of 4 control steps of 0.01 s; the 13 frames of a GIF each last whole hundredths.
    assert seconds == pytest.approx(0.48, abs=13 * 0.005)
    assert frames.shape[1:] == (48, 64, 3)
    assert len(frames) == 13
    assert frames[0].std() > 5
    assert np.abs(frames[-1] - frames[0]).max() > 60
    assert [path.name for path in drawn.parent.iterdir()] == [drawn.name]


def test_a_large_gif_is_thinned_below_the_limit_and_lasts_as_long(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, size=(40, 32, 32, 3), dtype=np.uint8)
    monkeypatch.setattr(film, "MAX_BYTES", 20_000)
    film._write_gif(list(noise), 0.05, tmp_path / "noise.gif")
    assert (tmp_path / "noise.gif").stat().st_size < 20_000
    frames, seconds = frames_of(tmp_path / "noise.gif")
    assert len(frames) < 40
    assert seconds == pytest.approx(2, rel=0.1)


def test_without_opengl_a_sentence_says_what_to_install_and_nothing_is_left(physics, tmp_path):
    with pytest.raises(FilmError, match=r"of the backends no_such_backend none works here .*libegl1"):
        write_film(tmp_path / "x.gif", "cartpole_swingup", physics[:2], backends=("no_such_backend",))
    assert list(tmp_path.iterdir()) == []


def test_without_the_writer_a_sentence_names_the_extra(physics, tmp_path, monkeypatch):
    monkeypatch.setattr(film.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FilmError, match=r"the package PIL, which is not installed.*bpt-rl\[video\]"):
        write_film(tmp_path / "x.gif", "cartpole_swingup", physics)


@pytest.mark.parametrize(
    ("name", "task", "size", "words"),
    [
        ("x.avi", "cartpole_swingup", (48, 64), r"ends in \.gif or \.mp4; got x\.avi"),
        ("x.gif", "walker_run", (48, 64), r"states of 18 numbers; got an array of shape \(13, 4\)"),
        ("x.gif", "cartpole_swingup", (47, 64), "even and at least 16; got 47 and 64"),
    ],
)
def test_what_cannot_be_drawn_is_refused(physics, tmp_path, name, task, size, words):
    with pytest.raises(ValueError, match=words):
        write_film(tmp_path / name, task, physics, size=size)


def test_an_episode_is_found_in_a_file_and_in_a_store(store_path, tmp_path):
    buffer = store_path.parent / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    path = buffer / "episode_000001_1000.npz"
    alone, stored = dataset_episode(path), dataset_episode(store_path, index=1)
    np.testing.assert_array_equal(alone.physics, exorl.read_episode(path).physics)
    np.testing.assert_array_equal(stored.physics, alone.physics[:: stored.action_repeat])
    assert (alone.name, stored.name) == ("episode_000001_1000", "store_000001")
    assert alone.task.startswith("cartpole_") and stored.task.startswith("cartpole_")
    elsewhere = tmp_path / "episode.npz"
    elsewhere.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"names no domain\. Set --task"):
        dataset_episode(elsewhere)
    assert dataset_episode(elsewhere, task="cartpole_swingup").task == "cartpole_swingup"
    with pytest.raises(IndexError, match="must lie in"):
        dataset_episode(store_path, index=1000)


def test_the_verb_draws_a_dataset_episode(cli, physics, store_path, tmp_path):
    line = f"render {store_path} --index 2 --format gif --height 32 --width 32 --out {tmp_path / 'films'}"
    status, out, err = cli.run(line)
    if status:
        pytest.skip(err)
    path = tmp_path / "films" / "store_000002.gif"
    assert out == f"Film: {path}\n"
    frames, seconds = frames_of(path)
    # 1000 control steps of 0.01 s, 51 states, of which a GIF holds equal neighbours once.
    assert 40 < len(frames) <= 51
    assert seconds == pytest.approx(10, abs=51 * 0.005)
