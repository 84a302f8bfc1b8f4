"""Stores exported as Minari datasets: what Minari reads of them, and what comes back."""

import shutil
import warnings
from collections import namedtuple

import minari
import numpy as np
import pytest
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer

from bpt_rl.config import BuildConfig, ExportConfig
from bpt_rl.datasets import minari_export
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.minari_export import export_store
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.verification import verify_store
from bpt_rl.envs import tasks

TASK = "cartpole_swingup"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def build(folder, tmp_path):
    """Builds a store of the three cartpole episodes, or of another source."""

    def make(name="s.h5", **changes):
        values = {"source": (str(folder),), "out": str(tmp_path / name), "num_workers": 1} | changes
        return build_store(BuildConfig(**values))

    return make


@pytest.mark.parametrize("block", [64, 2])
def test_minari_reads_what_the_store_holds(block, build, root, monkeypatch):
    monkeypatch.setattr(minari_export, "BLOCK_EPISODES", block)
    path, progress = build(), []
    done = export_store(path, ExportConfig(task=TASK), lambda *counts: progress.append(counts))
    assert progress == ([(3, 3)] if block == 64 else [(2, 3), (3, 3)])
    assert done == ("cartpole/random-cartpole_swingup-v0", root / done.dataset_id, 3)
    assert list(minari.list_local_datasets()) == [done.dataset_id]
    dataset = minari.load_dataset(done.dataset_id)
    assert dataset.observation_space == Box(-np.inf, np.inf, (5,), np.float32)
    assert dataset.action_space == Box(-1, 1, (1,), np.float32)
    assert (dataset.total_episodes, dataset.total_steps) == (3, 120)
    with Store.open(path) as store:
        for i, episode in enumerate(dataset.iterate_episodes()):
            held = store.episode(i)
            pairs = [
                (episode.observations, held.observation),
                (episode.actions, held.action[1:]),
                (episode.rewards, held.task_reward[TASK][1:]),
                (episode.infos["physics"], held.physics),
                (episode.infos["stored_reward"], held.reward),
                (episode.terminations, np.zeros(held.num_steps, bool)),
                (episode.truncations, np.arange(held.num_steps) == held.num_steps - 1),
            ]
            for read, expected in pairs:
                assert read.dtype == expected.dtype
                np.testing.assert_array_equal(read, expected)
        entries = dataset.storage.get_episode_metadata(range(3))
        assert tuple(entry["name"] for entry in entries) == store.episode_names
        own = dataset.storage.metadata["bpt_rl"]
        assert own["digest"] == store.digest
        assert (own["subset"], own["subset_digest"]) == ("full", store.subset_digest)
    assert (own["source"], own["task"], own["action_repeat"]) == ("cartpole/random", TASK, 1)
    for word in ("cartpole/random", "subset full", TASK, "action repeat 1", own["digest"]):
        assert word in dataset.storage.metadata["description"]


def test_a_store_that_went_through_minari_comes_back_to_the_byte(build):
    path = build()
    source = f"minari:{export_store(path, ExportConfig(task=TASK)).dataset_id}"
    back = build("back.h5", source=(source,))
    assert back.read_bytes() == path.read_bytes()
    assert verify_store(back, num_workers=1) == 3
    other = build("one.h5", tasks=("cartpole_balance",))
    assert build("back.h5", source=(source,), tasks=("cartpole_balance",)).read_bytes() == other.read_bytes()


def test_agent_steps_come_back_with_their_own_task_alone(build):
    path = build(action_repeat=4, tasks=(TASK,))
    done = export_store(path, ExportConfig(dataset_id="short-v2"))
    back = build("back.h5", source=("minari:short-v2",))
    assert back.read_bytes() == path.read_bytes()
    with Store.open(back) as store:
        assert store.action_repeat == 4
    with pytest.raises(
        ValueError, match=r"the states between its steps of 4 control .*; got cartpole_balance"
    ):
        build(source=("minari:short-v2",), tasks=("cartpole_balance",))
    assert "action repeat 4" in done.path.joinpath("data", "metadata.json").read_text()


def test_subset_and_names_travel_along(build):
    path = build(subset="first-2-episodes")
    done = export_store(path, ExportConfig(task=TASK))
    assert done.dataset_id == "cartpole/random-first-2-episodes-cartpole_swingup-v0"
    with Store.open(path) as store, Store.open(build("b.h5", source=(f"minari:{done.dataset_id}",))) as back:
        assert back.subset == "first-2-episodes"
        assert (back.subset_digest, back.episode_names) == (store.subset_digest, store.episode_names)
    again = build("c.h5", source=(f"minari:{done.dataset_id}",), subset="first-1-episodes")
    with Store.open(again) as back:
        assert back.subset == "first-1-episodes of first-2-episodes"
        assert back.episode_names == ("cartpole/random/episode_000000_40.npz",)


def test_a_task_that_the_store_only_computes_is_exported_and_kept(build):
    path = build(tasks=("cartpole_balance",))
    with Store.open(path) as store:
        expected = [block["reward/cartpole_swingup"] for block in store.blocks(("reward/cartpole_swingup",))]
    done = export_store(path, ExportConfig(task=TASK))
    # The dataset's own rewards count, whatever a formula would give.
    dataset = minari.load_dataset(done.dataset_id)
    np.testing.assert_array_equal(dataset[1].rewards, expected[0][1, 1:61])
    with Store.open(build("back.h5", source=(f"minari:{done.dataset_id}",))) as back:
        assert back.tasks == tasks.tasks_of("cartpole")
        assert back.returns(TASK)[1] == np.float32(expected[0][1].sum(dtype=np.float64))


def test_the_first_task_is_exported_if_none_is_named(build):
    path = build(tasks=("cartpole_balance", TASK))
    assert export_store(path, ExportConfig()).dataset_id == "cartpole/random-cartpole_balance-v0"


def test_an_export_never_replaces_a_dataset(build, root):
    path = build(tasks=(TASK,))
    done = export_store(path, ExportConfig(dataset_id="one/two-v0"))
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match=rf"not replace a dataset; {done.path} is there already"):
        export_store(path, ExportConfig(dataset_id="one/two-v0"))
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before


def test_an_interrupted_export_leaves_nothing(build, root):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_store(build(tasks=(TASK,)), ExportConfig(), interrupt)
    assert list(root.iterdir()) == []


def test_an_export_without_room_does_not_begin(build, root, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 60_000, 60_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"room for all its episodes; .* takes .* GB, and 6e-05 GB are free\."):
        export_store(build(tasks=(TASK,)), ExportConfig())
    assert list(root.iterdir()) == []


def test_the_room_asked_for_is_enough_and_not_twice_too_much(build, root, monkeypatch):
    path = build(tasks=(TASK,))
    done = export_store(path, ExportConfig(dataset_id="first-v0"))
    size = sum(file.stat().st_size for file in done.path.rglob("*.*"))
    for free, fits in ((2 * size, True), (size, False)):
        usage = namedtuple("usage", "free")(free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        config = ExportConfig(dataset_id=f"other-v{free}")
        if fits:
            export_store(path, config)
        else:
            with pytest.raises(OSError, match="room"):
                export_store(path, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "walker_run"}, "one with a formula for cartpole; got 'walker_run'"),
        ({"dataset_id": "toy"}, "must read NAMESPACE/NAME-vNUMBER.*; got 'toy'"),
        ({"dataset_id": "../toy-v0"}, r"must read NAMESPACE/NAME-vNUMBER.*; got '\.\./toy-v0'"),
    ],
)
def test_what_cannot_be_exported_is_refused(changes, message, build):
    with pytest.raises(ValueError, match=message):
        export_store(build(tasks=(TASK,)), ExportConfig(**changes))


def test_a_dataset_without_a_simulator_is_exported_with_its_terminations(build):
    observations, flags = np.random.default_rng(0).normal(size=(4, 2)), np.array([False, False, True])
    for version, terminates in enumerate((True, False)):
        buffer = EpisodeBuffer(
            observations=observations,
            actions=observations[1:] / 9,
            rewards=observations[1:, 0],
            terminations=flags & terminates,
            truncations=flags & (not terminates),
        )
        with warnings.catch_warnings():
            # Minari warns of every field of its metadata that is left out.
            warnings.simplefilter("ignore")
            spaces = {"observation_space": Box(-9, 9, (2,)), "action_space": Box(-1, 1, (2,))}
            minari.create_dataset_from_buffers(f"toy-v{version}", [buffer], **spaces)
        path = build(f"{version}.h5", source=(f"minari:toy-v{version}",))
        done = export_store(path, ExportConfig())
        assert done.dataset_id == f"minari/toy-v{version}-toy-v{version}-v0"
        [read] = minari.load_dataset(done.dataset_id).iterate_episodes()
        assert read.terminations.tolist() == [False, False, terminates]
        assert read.truncations.tolist() == [False, False, not terminates]
        np.testing.assert_array_equal(read.actions, (observations[1:] / 9).astype(np.float32))
        assert list(read.infos) == ["stored_reward"]
