"""Stores built from Minari datasets that this package knows nothing of, made here with Minari's own functions."""

import json
import re
import sys
import warnings

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text
from minari.data_collector import EpisodeBuffer

from bpt_rl.config import BuildConfig, DataConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.chains import build_chain
from bpt_rl.datasets.description import describe
from bpt_rl.datasets.minari_source import MinariSource
from bpt_rl.datasets.packing import pack
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.verification import verify_store

ID = "toy/deep/reach-v3"
LOW, HIGH = np.array([[0, -4, 5]], np.float32), np.array([[2, 4, 5]], np.float32)
SPACES = {"observation_space": Box(-np.inf, np.inf, (2, 2), np.float64), "action_space": Box(LOW, HIGH)}
LENGTHS = (6, 9, 5, 8)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def episode_of(num_steps, seed=0, *, terminates=False, **changes):
    """Random arrays of an episode within `SPACES`."""
    generator = np.random.default_rng([seed, num_steps])
    last = np.arange(num_steps) == num_steps - 1
    arrays = {
        "observations": generator.normal(size=(num_steps + 1, 2, 2)),
        "actions": generator.uniform(LOW, HIGH, (num_steps, 1, 3)).astype(np.float32),
        "rewards": generator.normal(size=num_steps),
        "terminations": last & terminates,
        "truncations": last & (not terminates),
        "infos": {"success": last},
    }
    return EpisodeBuffer(**(arrays | changes))


def make_dataset(episodes, dataset_id=ID, **spaces):
    with warnings.catch_warnings():
        # Minari warns of every field of its metadata that is left out.
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(dataset_id, episodes, **(SPACES | spaces))


@pytest.fixture
def buffers():
    return [episode_of(num_steps, terminates=num_steps % 2 == 0) for num_steps in LENGTHS]


def config_of(tmp_path, **changes):
    values = {"source": (f"minari:{ID}",), "out": str(tmp_path / "s.h5"), "num_workers": 1} | changes
    return BuildConfig(**values)


def test_a_store_holds_the_arrays_of_the_dataset_in_exorls_alignment(buffers, tmp_path):
    make_dataset(buffers)
    progress = []
    path = build_store(config_of(tmp_path), lambda *counts: progress.append(counts))
    assert progress == [(i, 4) for i in range(5)]
    with Store.open(path) as built:
        assert (built.domain, built.tasks, built.source) == (ID, (ID,), f"minari/{ID}")
        assert (built.subset, built.action_repeat, built.feature_names) == ("full", 1, ())
        assert built.episode_names == tuple(f"minari/{ID}/episode_{i}" for i in range(4))
        assert built.lengths.tolist() == list(LENGTHS)
        for i, buffer in enumerate(buffers):
            read = built.episode(i)
            assert not read.action[0].any()
            assert read.task_reward[ID][0] == 0
            assert (read.physics.shape, read.features.shape) == ((LENGTHS[i] + 1, 0), (LENGTHS[i] + 1, 0))
            for t in range(LENGTHS[i] + 1):
                expected = np.float32([buffer.observations[t][j][k] for j in (0, 1) for k in (0, 1)])
                np.testing.assert_array_equal(read.observation[t], expected)
            for t in range(1, LENGTHS[i] + 1):
                first, second, _ = (float(a) for a in buffer.actions[t - 1][0])
                # The third cannot move: its bounds are equal.
                np.testing.assert_array_equal(read.action[t], np.float32([first - 1, second / 4, 0]))
                assert read.task_reward[ID][t] == read.reward[t, 0] == np.float32(buffer.rewards[t - 1])
            ended = [0.0] if LENGTHS[i] % 2 == 0 else [1.0]
            assert read.discount[:, 0].tolist() == [1.0] * LENGTHS[i] + ended
            assert built.returns(ID)[i] == np.float32(read.task_reward[ID].sum(dtype=np.float64))


def test_the_store_can_be_verified_described_and_drawn_from(buffers, tmp_path):
    make_dataset(buffers)
    path = build_store(config_of(tmp_path))
    assert verify_store(path, num_workers=1) == 4
    with Store.open(path) as built:
        assert describe(built)["features"] == {}
        sampler = ChainSampler(
            built, DataConfig(task=ID, num_trajectories=4, batch_size=1, place="host"), "fused", seed=0
        )
        batch = sampler.batch(0)
        chain = build_chain([built.episode(i) for i in range(4)], ID)
    expected = pack([chain], context_length=sampler.context_length, layout="fused")
    for name, values in batch._asdict().items():
        np.testing.assert_array_equal(values, getattr(expected, name), err_msg=name)


def test_processes_do_not_change_the_store(buffers, tmp_path):
    make_dataset(buffers)
    one = build_store(config_of(tmp_path)).read_bytes()
    assert build_store(config_of(tmp_path, num_workers=2)).read_bytes() == one


def test_subsets_are_those_of_the_same_episodes(buffers, tmp_path):
    make_dataset(buffers)
    (tmp_path / "list.txt").write_text("episode_3\nepisode_1\n")

    def names(subset):
        with Store.open(build_store(config_of(tmp_path, subset=subset))) as built:
            assert built.subset == subset
            return [int(name.rpartition("_")[2]) for name in built.episode_names]

    middle, best = np.argsort([buffer.rewards.sum() for buffer in buffers])[[1, 3]]
    assert names("stratified-2-episodes") == sorted([middle, best])
    assert names("first-15-steps") == [0, 1]
    assert names(f"list:{tmp_path}/list.txt") == [1, 3]


def actions_read(tmp_path, actions, space):
    make_dataset([episode_of(len(actions), actions=actions)], action_space=space)
    with Store.open(build_store(config_of(tmp_path))) as built:
        return built.episode(0).action[1:]


@pytest.mark.parametrize("bound", [1, np.inf])
def test_actions_that_are_in_place_keep_every_bit(bound, tmp_path):
    generator = np.random.default_rng(5)
    actions = generator.uniform(-1, 1, (50, 2)).astype(np.float32)
    actions *= np.float32(10) ** generator.integers(-20, 1, actions.shape)
    actions[:2] = -1, 1
    read = actions_read(tmp_path, actions, Box(-bound, bound, (2,), np.float32))
    np.testing.assert_array_equal(read, actions)


def test_actions_outside_their_bounds_become_the_nearest(tmp_path):
    actions = np.float32([[2.5, -9], [-0.1, 3.9], [1, 0], [0, 5]])
    read = actions_read(tmp_path, actions, Box(np.float32([0, -4]), np.float32([2, 4])))
    np.testing.assert_array_equal(read, np.float32([[1, -1], [-1, 0.975], [0, 0], [-1, 1]]))


@pytest.mark.parametrize("low", [-np.inf, 0])
def test_larger_actions_without_bounds_are_refused(low, tmp_path):
    actions = np.float32([[0.5, 0.5], [0.5, 1.5]])
    with pytest.raises(
        ValueError, match=r"Episode 0 .* without finite bounds must lie in \[-1, 1\].*got 1\.5"
    ):
        actions_read(tmp_path, actions, Box(np.float32([0, low]), np.float32([1, np.inf])))
    assert not list(tmp_path.glob("*s.h5*"))


@pytest.mark.parametrize(
    ("kind", "space", "values", "named"),
    [
        ("observation", Dict(goal=Box(-1, 1, (2,))), {"goal": np.zeros((4, 2))}, "Dict"),
        ("observation", Text(5), ["a", "b", "c", "d"], "Text"),
        ("action", Discrete(3), np.array([0, 1, 2]), "Discrete"),
        ("action", MultiDiscrete([3, 2]), np.zeros((3, 2), np.int64), "MultiDiscrete"),
    ],
)
def test_other_spaces_are_refused(kind, space, values, named, tmp_path):
    make_dataset([episode_of(3, **{f"{kind}s": values})], **{f"{kind}_space": space})
    with pytest.raises(ValueError, match=rf"must have Box spaces .*; {ID} has the {kind} space {named}"):
        build_store(config_of(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": np.array([0, np.nan, 1])}, r"rewards must be finite in float32; got nan"),
        ({"observations": np.full((4, 2, 2), 1e39)}, r"observations must be finite in float32; got 1e\+39"),
        ({"actions": np.full((3, 1, 3), np.nan, np.float32)}, r"actions must be finite in float32; got nan"),
        ({"observations": np.zeros((3, 2, 2))}, r"observations must be numbers of shape \[4, 2, 2\]; got"),
        (
            {"actions": np.zeros((2, 1, 3))},
            r"actions must be numbers of shape \[3, 1, 3\]; got float64 \[2, 1",
        ),
        ({"terminations": np.zeros(2, bool)}, r"terminations must be numbers of shape \[3\]; got bool \[2\]"),
    ],
)
def test_an_episode_that_cannot_be_used_is_named_and_nothing_is_left(changes, message, tmp_path):
    make_dataset([episode_of(5), episode_of(3, **changes)])
    with pytest.raises(ValueError, match=f"Episode 1 of the Minari dataset {ID} cannot be used: {message}"):
        build_store(config_of(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["minari"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("walker_run",)}, f"the reward of {ID} alone, since it has no physics .*; got walker_run"),
        ({"domain": "walker"}, f"says its domain itself; minari:{ID} is of {ID}, and got walker"),
        ({"action_repeat": 2}, "keeps its steps, so action_repeat must be 1; got 2"),
        ({"source": (f"minari:{ID}", "data")}, f"no other source; got minari:{ID}, data"),
        ({"source": ("minari:toy",)}, r"must read NAMESPACE/NAME-vNUMBER.*; got 'toy'"),
        ({"source": ("minari:../toy-v0",)}, r"must read NAMESPACE/NAME-vNUMBER.*; got '\.\./toy-v0'"),
        ({"subset": "first-9-episodes"}, "asks for 9 episodes and there are 4"),
    ],
)
def test_what_does_not_fit_the_dataset_is_refused(changes, message, buffers, tmp_path):
    make_dataset(buffers)
    with pytest.raises(ValueError, match=message):
        build_store(config_of(tmp_path, **changes))


def test_a_dataset_that_is_missing_says_how_to_fetch_it(root, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"none at {root}/{ID}\. Fetch it with `minari download {ID}`"
    ):
        build_store(config_of(tmp_path))


@pytest.mark.parametrize(("package", "named"), [("minari", "minari"), ("PIL", "PIL")])
def test_without_the_extra_the_command_that_installs_it_is_named(package, named, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"package {named}.*pip install 'bpt-rl\[minari\]'"):
        build_store(config_of(tmp_path))


@pytest.mark.parametrize("damage", ["metadata.json", "main_data.hdf5", "empty", "no steps"])
def test_a_damaged_or_empty_dataset_is_refused(damage, root, buffers, tmp_path):
    make_dataset([] if damage == "empty" else buffers)
    data = root / ID / "data"
    if damage == "no steps":
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            file["episode_2"].attrs["total_steps"] = 0
    elif damage != "empty":
        (data / damage).write_bytes(b"{}")
    with pytest.raises(
        ValueError, match=rf"must be whole; {data} |must have episodes of at least one step; {ID}"
    ):
        build_store(config_of(tmp_path))


def interrupt_after(done):
    def report(so_far, total):
        if so_far == done:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("change", ["", "one more episode", "one other reward"])
def test_an_interrupted_build_goes_on_unless_the_dataset_has_changed(change, root, buffers, tmp_path):
    dataset = make_dataset(buffers)
    whole = build_store(config_of(tmp_path)).read_bytes()
    out = tmp_path / "interrupted.h5"
    with pytest.raises(KeyboardInterrupt):
        build_store(config_of(tmp_path, out=str(out)), interrupt_after(2))
    if change == "one more episode":
        dataset.update_dataset_from_buffer([episode_of(4)])
    elif change:
        # Neither metadata nor size tell of it.
        with h5py.File(root / ID / "data" / "main_data.hdf5", "r+") as file:
            file["episode_0/rewards"][3] += 1
    progress = []
    build_store(config_of(tmp_path, out=str(out)), lambda *counts: progress.append(counts))
    assert progress[0] == ((0, 5) if "episode" in change else (0, 4) if change else (2, 4))
    assert (out.read_bytes() == whole) == (not change)


def test_what_metadata_claim_is_neither_run_nor_believed(root, buffers, tmp_path):
    make_dataset(buffers)
    script, trace = tmp_path / "rewards.py", tmp_path / "trace"
    script.write_text(f"open({str(trace)!r}, 'w').close()\ndef walker_crouch(*_): return 0\n")
    path = root / ID / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    own = {"action_repeat": 1, "source": "walker/rnd", "subset": "full"}
    for domain, task in [("walker", f"{script}:walker_crouch"), ("worker", "worker_run")]:
        path.write_text(json.dumps(metadata | {"bpt_rl": own | {"domain": domain, "task": task}}))
        with Store.open(build_store(config_of(tmp_path))) as built:
            assert (built.domain, built.tasks) == (ID, (ID,))
        assert not trace.exists()
    path.write_text(json.dumps(metadata | {"bpt_rl": own | {"domain": "walker", "task": "walker_run"}}))
    with pytest.raises(
        ValueError, match=re.escape("infos/physics must be numbers of shape [7, 'any']; got none")
    ):
        build_store(config_of(tmp_path))


def test_an_environments_spaces_do_for_a_dataset_that_names_none(root, tmp_path):
    environment = gymnasium.make("Pendulum-v1")
    spaces = {"observation_space": environment.observation_space, "action_space": environment.action_space}
    actions = np.float32([[-2], [0.5], [2]])
    episode = episode_of(3, observations=np.ones((4, 3), np.float32), actions=actions)
    make_dataset([episode], "pendulum-v0", env="Pendulum-v1", **spaces)
    path = root / "pendulum-v0" / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["observation_space"], metadata["action_space"]
    path.write_text(json.dumps(metadata))
    np.testing.assert_array_equal(MinariSource.open("pendulum-v0").read(0).action, [[0], [-1], [0.25], [1]])
    environment.close()
