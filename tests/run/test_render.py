import numpy as np
import pytest

from bpt_rl.run import render
from bpt_rl.run.render import render_episode


class Wave:
    """A policy that swings every joint, and remembers what it was asked and told."""

    def __init__(self, action_dim=6):
        self.action_dim = action_dim
        self.asked, self.rewards, self.dones = [], [], []

    def start(self, num_environments):
        assert num_environments == 1
        return 0

    def act(self, carry, observation, return_to_go):
        assert observation.dtype == np.float32 and observation.shape[0] == 1
        self.asked.append(float(return_to_go[0]))
        return carry, np.full((1, self.action_dim), np.sin(carry / 5), np.float32)

    def observe(self, carry, reward, done):
        self.rewards.append(float(reward[0]))
        self.dones.append(bool(done[0]))
        return carry + 1


OPTIONS = {"seed": 3, "action_repeat": 4, "return_to_go": 50.0, "num_steps": 12, "size": (48, 64)}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    path = tmp_path_factory.mktemp("gif") / "new" / "episode.gif"
    policy = Wave()
    return path, policy, render_episode(policy, "walker_run", path=path, **OPTIONS)


def test_episode_is_rendered_or_a_sentence_says_how_to_get_it(rendered):
    path, _, sentence = rendered
    if not path.is_file():
        assert sentence.startswith("No episode was rendered:") and "libegl1" in sentence
        return
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as gif:
        assert gif.size == (64, 48)
        assert gif.n_frames == 13
        frames = []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB"), np.int64))
    assert frames[0].std() > 5
    assert np.abs(frames[-1] - frames[0]).max() > 20
    assert path.name in sentence and "with return" in sentence


def test_return_to_go_falls_by_the_rewards(rendered):
    _, policy, _ = rendered
    assert len(policy.asked) == 12
    collected = np.cumsum([0.0, *policy.rewards[:-1]])
    # float32 return-to-go of about 50.
    np.testing.assert_allclose(policy.asked, 50.0 - collected, atol=1e-4)
    assert not any(policy.dones)


def test_missing_backend_gives_a_sentence_and_no_file(tmp_path):
    path = tmp_path / "episode.gif"
    options = OPTIONS | {"num_steps": 2}
    sentence = render_episode(Wave(), "walker_run", path=path, backends=("no_such_backend",), **options)
    assert sentence == (
        "No episode was rendered: of the OpenGL backends no_such_backend none works here. Install Debian's libegl1 and "
        "libgl1-mesa-dri (apt-get install libegl1 libgl1-mesa-dri), set MUJOCO_GL=egl and evaluate again."
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_pillow_gives_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: None)
    sentence = render_episode(Wave(), "walker_run", path=tmp_path / "episode.gif", **OPTIONS)
    assert "bpt-rl[video]" in sentence


def test_large_gif_is_thinned_below_the_limit(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0).integers(0, 255, size=(40, 32, 32, 3), dtype=np.uint8)
    monkeypatch.setattr(render, "MAX_BYTES", 20_000)
    render._write_gif(list(noise), 50.0, tmp_path / "noise.gif")
    assert (tmp_path / "noise.gif").stat().st_size < 20_000
    with image.open(tmp_path / "noise.gif") as gif:
        # Fewer frames, each shown for longer: the episode lasts as long.
        assert gif.n_frames < 40
        assert gif.n_frames * gif.info["duration"] == pytest.approx(40 * 50, rel=0.1)
