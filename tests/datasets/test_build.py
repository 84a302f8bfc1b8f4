import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets import exorl, store
from bpt_rl.datasets.build import build_store, domain_and_tasks, merge
from bpt_rl.datasets.store import Store
from bpt_rl.envs import rewards, tasks


def config_of(folder, tmp_path, **changes):
    return BuildConfig(
        **({"source": (str(folder),), "out": str(tmp_path / "s.h5"), "num_workers": 1} | changes)
    )


def test_a_store_holds_every_array_and_the_reward_of_every_task(folder, episodes, tmp_path):
    progress = []
    path = build_store(config_of(folder, tmp_path), lambda done, total: progress.append((done, total)))
    assert path == tmp_path / "s.h5"
    assert progress == [(1, 3), (2, 3), (3, 3)]
    with Store.open(path) as built:
        assert built.tasks == tasks.tasks_of("cartpole")
        for i, episode in enumerate(episodes):
            read = built.episode(i)
            for key in exorl.KEYS:
                np.testing.assert_array_equal(getattr(read, key), getattr(episode, key))
            for task in built.tasks:
                reward = rewards.relabel(task, episode.physics, episode.action)
                np.testing.assert_array_equal(read.task_reward[task], reward)
                # float32 of a float64 sum.
                assert built.returns(task)[i] == np.float32(reward.sum(dtype=np.float64))


def test_the_stored_reward_of_the_collected_task_is_met_exactly(folder, tmp_path):
    with Store.open(build_store(config_of(folder, tmp_path, tasks=("cartpole_swingup",)))) as built:
        for i in range(built.num_episodes):
            read = built.episode(i)
            np.testing.assert_allclose(read.task_reward["cartpole_swingup"], read.reward[:, 0], atol=1e-6)


def test_processes_do_not_change_the_store(folder, tmp_path):
    for num_workers in (1, 2):
        build_store(
            config_of(folder, tmp_path, out=str(tmp_path / f"{num_workers}.h5"), num_workers=num_workers)
        )
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()


def test_merged_steps_equal_an_environment_with_that_action_repeat(folder, tmp_path):
    with Store.open(build_store(config_of(folder, tmp_path, action_repeat=4))) as built:
        assert built.action_repeat == 4
        assert built.lengths.tolist() == [10, 15, 5]
        episode = built.episode(0)
    environment_seed, _ = np.random.SeedSequence([0, 0]).generate_state(2)
    environment = tasks.make("cartpole_swingup", int(environment_seed), action_repeat=4)
    np.testing.assert_array_equal(environment.reset().observation, episode.observation[0])
    for t in range(1, 11):
        step = environment.step(episode.action[t])
        np.testing.assert_array_equal(step.observation, episode.observation[t])
        np.testing.assert_array_equal(tasks.physics_state(environment), episode.physics[t])
        # Four rewards in float32, each rounded by 6e-8.
        np.testing.assert_allclose(episode.task_reward["cartpole_swingup"][t], step.reward, atol=1e-6)


def test_merging_small_literal_arrays(episode):
    trajectory = dataclasses.replace(
        episode,
        observation=np.arange(5, dtype=np.float32)[:, None],
        action=np.array([[0], [3], [3], [7], [7]], np.float32),
        reward=np.array([[0], [1], [2], [3], [4]], np.float32),
        discount=np.array([[1], [1], [0.5], [1], [0]], np.float32),
        physics=np.arange(5.0)[:, None],
        task_reward={"x": np.array([0, 1, 10, 100, 1000], np.float32)},
        extras={"skill": np.arange(5), "z": np.arange(2)},
    )
    merged = merge(trajectory, 2)
    assert merged.observation.ravel().tolist() == merged.physics.ravel().tolist() == [0, 2, 4]
    assert merged.action.ravel().tolist() == [0, 3, 7]
    assert merged.reward.ravel().tolist() == [0, 3, 7]
    assert merged.discount.ravel().tolist() == [1, 0.5, 0]
    assert merged.task_reward["x"].tolist() == [0, 11, 1100]
    assert merged.extras["skill"].tolist() == [0, 2, 4]
    assert merged.extras["z"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="action_repeat must divide the steps of an episode; got 3 and 4"):
        merge(trajectory, 3)


def test_a_subset_is_the_first_episodes_in_order(folder, tmp_path):
    config = config_of(folder, tmp_path, max_episodes=2, subset="first two", tasks=("cartpole_balance",))
    with Store.open(build_store(config)) as built:
        assert (built.num_episodes, built.subset, built.source) == (2, "first two", "cartpole/random")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ("walker_run", "walker_stand", "walker_run")}, ("walker", ("walker_run", "walker_stand"))),
        ({"domain": "cheetah", "source": ("walker/rnd",)}, ("cheetah", ("cheetah_run",))),
        ({"source": ("cheetah/of/walker/rnd.zip",)}, ("walker", tasks.tasks_of("walker"))),
        ({"source": ("cheetah.zip",)}, ("cheetah", ("cheetah_run",))),
    ],
)
def test_the_domain_comes_from_tasks_then_the_option_then_the_path(changes, expected):
    assert domain_and_tasks(BuildConfig(**changes)) == expected


@pytest.mark.parametrize("subset", ["", "die ersten fünf"])
def test_any_text_names_a_subset(folder, tmp_path, subset):
    config = config_of(folder, tmp_path, max_episodes=1, subset=subset, tasks=("cartpole_balance",))
    with Store.open(build_store(config)) as built:
        assert built.subset == subset


def test_names_that_do_not_fit_together_are_refused(folder, tmp_path):
    for changes, message in [
        ({"tasks": ("walker_run", "cheetah_run")}, "of its one domain; got domains cheetah, walker"),
        ({"tasks": ("walker_run",), "domain": "cheetah"}, "of its one domain; got domains cheetah, walker"),
        ({"tasks": ("walker_fly",)}, "Nearest valid one: 'walker_"),
        ({"domain": "worker"}, "Nearest valid one: 'walker'"),
        ({"source": ("episodes",)}, "episodes says none. Set tasks, or domain to one of cartpole"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_store(config_of(folder, tmp_path, **changes))


def test_actions_that_were_not_held_are_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"episode_000000_40\.npz: .* = 10 control steps; it changes within rows 1 to 10"
    ):
        build_store(config_of(folder, tmp_path, action_repeat=10))
    with pytest.raises(ValueError, match=r"got 8 and 60 steps in episode_000001_60\.npz"):
        build_store(config_of(folder, tmp_path, action_repeat=8))


def test_an_episode_of_another_body_is_refused_by_name(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"episode_000000_40\.npz: physics of walker must have shape \[T\+1, 18\]"
    ):
        build_store(config_of(folder, tmp_path, domain="walker"))


def test_an_error_midway_leaves_the_old_store_and_nothing_else(folder, episodes, tmp_path):
    buffer = tmp_path / "cartpole" / "buffer"
    buffer.mkdir(parents=True)
    for i, trajectory in enumerate(episodes):
        exorl.write_episode(buffer / f"episode_{i:06d}_{trajectory.num_steps}.npz", trajectory)
    out = tmp_path / "stores" / "s.h5"
    build_store(config_of(buffer, tmp_path, out=str(out)))
    old = out.read_bytes()
    (buffer / "episode_000002_20.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"must be a whole npz file; .*episode_000002_20\.npz"):
        build_store(config_of(buffer, tmp_path, out=str(out)))
    assert out.read_bytes() == old
    assert list(out.parent.iterdir()) == [out]


def test_episodes_with_other_columns_are_refused(folder, episodes, tmp_path):
    buffer = tmp_path / "cartpole" / "buffer"
    buffer.mkdir(parents=True)
    for i, columns in enumerate((1, 2)):
        reward = np.repeat(episodes[0].reward, columns, axis=1)
        exorl.write_episode(buffer / f"episode_{i}_40.npz", dataclasses.replace(episodes[0], reward=reward))
    with pytest.raises(ValueError, match=r"stored_reward has \(2,\) in episode 1 and \(1,\) before"):
        build_store(config_of(buffer, tmp_path))


def test_a_store_that_cannot_fit_is_refused_before_it_is_begun(folder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"must fit on its disk; .*s\.h5 needs 0\.0 GB and 0\.0 GB are free"):
        build_store(config_of(folder, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [1_000, 9_000])
def test_a_real_write_failure_leaves_the_old_file_and_one_clear_sentence(folder, tmp_path, limit):
    out = tmp_path / "s.h5"
    out.write_bytes(b"old")
    # A quota on the size of files: the system itself refuses to write on.
    script = (
        "import resource; from bpt_rl.config import BuildConfig; from bpt_rl.datasets.build import build_store\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"try: build_store(BuildConfig(source=({str(folder)!r},), out={str(out)!r}, num_workers=1))\n"
        "except OSError as error: print(error.strerror)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    expected = f"A file must be written whole; {out} was not: File too large. Free space or use another.\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_the_digest_depends_on_content_tasks_and_repeat_alone(folder, tmp_path):
    def digest(**changes):
        path = build_store(config_of(folder, tmp_path, **changes))
        return store.describe(path)["digest"]

    first = digest(tasks=("cartpole_balance", "cartpole_swingup"))
    assert digest(tasks=("cartpole_swingup", "cartpole_balance"), subset="other") == first
    assert len({first, digest(), digest(action_repeat=4), digest(max_episodes=2)}) == 4
