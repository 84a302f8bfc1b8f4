import dataclasses
import re

import h5py
import numpy as np
import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets import exorl
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.description import describe
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.store_format import COLUMNS, fixed_text
from bpt_rl.datasets.store_writer import StorePlan, write_store
from bpt_rl.datasets.verification import alignment_fault, verify_episodes, verify_store
from bpt_rl.envs import features

TASKS = ("cartpole_swingup", "cartpole_balance")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The bytes of a sound store."""
    out = tmp_path_factory.mktemp("stores") / "s.h5"
    return build_store(
        BuildConfig(source=(str(folder),), out=str(out), tasks=TASKS, num_workers=1)
    ).read_bytes()


@pytest.fixture
def path(whole, tmp_path):
    path = tmp_path / "s.h5"
    path.write_bytes(whole)
    return path


def test_an_untouched_store_is_accepted_by_any_number_of_processes(path):
    for num_workers in (1, 2):
        progress = []
        count = verify_store(
            path,
            num_workers=num_workers,
            report_progress=lambda *done, progress=progress: progress.append(done),
        )
        assert (count, progress) == (3, [(1, 3), (2, 3), (3, 3)])


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("observation", (1, 7, 2), 9, "episode 1 of .* does not match its digest"),
        ("physics", (2, 20, 3), 9, "episode 2 of .* does not match its digest"),
        ("features", (2, 20, 0), 9, "episode 2 of .* does not match its digest"),
        ("reward/cartpole_balance", (0, 1), 9, "episode 0 of .* does not match its digest"),
        ("action", (2, 30, 0), 9, "episode 2 of .* has padding that is not zero"),
        (
            "return/cartpole_swingup",
            0,
            9,
            "episode 0 of .* has a return of cartpole_swingup that is not the sum",
        ),
        ("length", 0, 9, "episode 0 of .* does not match its digest"),
        ("digest", 1, b"9", "episode 1 of .* does not match its digest"),
        ("name", 1, b"9", "has a subset digest that does not follow from the names"),
        ("observation_mean", 1, 9, "has a mean or deviation that is not that of its observations"),
        ("observation_std", 1, 9, "has a mean or deviation that is not that of its observations"),
    ],
)
def test_whatever_was_changed_is_named(path, edited, name, index, value, message):
    with edited(path) as file:
        file[name][index] = value
    with pytest.raises(ValueError, match=message):
        verify_store(path, num_workers=1)


def test_a_digest_that_does_not_follow_from_the_episodes_is_refused(path, edited):
    with edited(path) as file:
        file.attrs["digest"] = fixed_text("0")
    with pytest.raises(ValueError, match="has a digest that does not follow from its episodes'"):
        verify_store(path, num_workers=1)


def test_a_store_of_rows_that_do_not_belong_together_is_refused(episodes, tmp_path):
    """The builder takes what it gets; here each observation is that of the state before."""
    shifted = np.roll(episodes[1].observation, 1, axis=0)
    buffer = tmp_path / "cartpole" / "buffer"
    exorl.write_episode(buffer / "episode_0_40.npz", episodes[0])
    exorl.write_episode(buffer / "episode_1_60.npz", dataclasses.replace(episodes[1], observation=shifted))
    message = r"has in row \d+ an observation that is not that of its state: entry \d is .* and should be"
    with pytest.raises(ValueError, match=rf"cartpole/buffer/episode_1_60\.npz {message}"):
        verify_episodes(buffer, "cartpole", num_workers=1)
    out = build_store(
        BuildConfig(source=(str(buffer),), out=str(tmp_path / "s.h5"), tasks=TASKS, num_workers=1)
    )
    with pytest.raises(ValueError, match=f"episode 1 of .* {message}"):
        verify_store(out, num_workers=1)


def test_features_that_are_not_those_of_the_states_are_refused(episodes, tmp_path):
    measured = features.physical_features("cartpole", episodes[0].physics)
    measured[7, 2] += 1e-6
    plan = StorePlan(
        out=tmp_path / "s.h5",
        domain="cartpole",
        source="cartpole/random",
        subset="full",
        tasks=("cartpole_balance",),
        action_repeat=1,
        feature_names=features.FEATURES["cartpole"],
        episode_names=["cartpole/random/episode_0_40.npz"],
        num_steps=np.array([40]),
        fingerprint="",
    )
    reward = {"cartpole_balance": np.zeros(41, np.float32)}
    episode = dataclasses.replace(episodes[0], features=measured, task_reward=reward)
    out = write_store(plan, [0], lambda _: episode, num_workers=1, report_progress=lambda done: None)
    with pytest.raises(
        ValueError, match=r"episode 0 of .* has in row 7 a pole_cosine that is not that of its"
    ):
        verify_store(out, num_workers=1)


def test_episodes_are_read_to_the_last(folder, episodes, tmp_path):
    assert verify_episodes(folder, "cartpole") == 3
    buffer = tmp_path / "buffer"
    for i, episode in enumerate(episodes):
        exorl.write_episode(buffer / f"episode_{i}_{episode.num_steps}.npz", episode)
    last = buffer / "episode_2_20.npz"
    last.write_bytes(last.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"must be a whole npz file; .*episode_2_20\.npz"):
        verify_episodes(buffer, "cartpole", num_workers=1)
    with pytest.raises(ValueError, match=r"physics of walker must have shape \[T\+1, 18\]"):
        verify_episodes(folder, "walker", num_workers=1)


@pytest.mark.parametrize("name", ["action", "reward"])
def test_a_row_that_is_no_dummy_row_is_a_fault(episode, name):
    getattr(episode, name)[0] = 0.5
    assert alignment_fault("cartpole", episode) == f"has no dummy row 0: its {name} is not zero"


def test_episodes_that_changed_places_are_refused(path):
    """Each of the arrays is whole, and matches the digest of an episode: of another one."""
    with h5py.File(path) as file:
        columns = [file[name] for name in COLUMNS] + list(file["reward"].values())
        chunks = [[column.id.get_chunk_info(i) for i in (0, 1)] for column in columns]
    content = bytearray(path.read_bytes())
    for first, second in chunks:
        a, b = (slice(chunk.byte_offset, chunk.byte_offset + chunk.size) for chunk in (first, second))
        content[a], content[b] = content[b], content[a]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"episode 0 of .* does not match its digest"):
        verify_store(path, num_workers=1)


def test_a_store_spliced_from_two_of_one_layout_is_refused(episodes, whole, path, tmp_path):
    buffer = tmp_path / "cartpole" / "random" / "buffer"
    for i, episode in enumerate(episodes):
        scaled = dataclasses.replace(episode, reward=2 * episode.reward)
        exorl.write_episode(buffer / f"episode_{i:06d}_{episode.num_steps}.npz", scaled)
    config = BuildConfig(source=(str(buffer),), out=str(tmp_path / "other.h5"), tasks=TASKS, num_workers=1)
    other = build_store(config).read_bytes()
    assert len(other) == len(whole)
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 60).tolist():
        spliced = whole[:place] + other[place:]
        path.write_bytes(spliced)
        if spliced not in (whole, other):
            with pytest.raises(ValueError, match=re.escape(str(path))):
                verify_store(path, num_workers=1)
            refused += 1
    assert refused > 30


def mutate(content: bytes, generator: np.random.Generator) -> bytes:
    """Returns a damaged copy: bits, blocks, length, or pieces that changed places."""
    spoilt = bytearray(content)
    kind = generator.integers(6)
    size = int(generator.integers(1, 65))
    a, b = (int(place) for place in generator.integers(0, len(content) - size, 2))
    # The file's own structures lie at both ends of it; most bytes between are numbers.
    near = int(generator.integers(0, 4096))
    a = (a, near, len(content) - size - near)[generator.integers(3)]
    if kind <= 1:
        spoilt[a] ^= 1 << int(generator.integers(8))
    elif kind == 2:
        spoilt[a : a + size] = generator.bytes(size)
    elif kind == 3:
        spoilt[a : a + size] = bytes([255 * int(generator.integers(2))]) * size
    elif kind == 4:
        spoilt[a : a + size], spoilt[b : b + size] = spoilt[b : b + size], spoilt[a : a + size]
    else:
        return bytes(spoilt[:a]) if generator.integers(2) else bytes(spoilt) + generator.bytes(size)
    return bytes(spoilt)


def test_no_damage_passes(whole, path):
    """200 mutations: each is refused with the file's name, or changes nothing that is read."""
    with Store.open(path) as store:
        before = describe(store)
        episodes = [store.episode(i) for i in range(3)]
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        path.write_bytes(mutate(whole, generator))
        try:
            verify_store(path, num_workers=1)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        # The damage lies in free space of the file.
        with Store.open(path) as store:
            assert describe(store) | {"bytes": 0} == before | {"bytes": 0}
            for i in range(3):
                np.testing.assert_equal(vars(store.episode(i)), vars(episodes[i]))
    assert refused > 100
