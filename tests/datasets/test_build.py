import dataclasses
import json
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets import exorl
from bpt_rl.datasets.build import build_store, domain_and_tasks
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.store_layout import Column, Layout
from bpt_rl.datasets.verification import verify_store
from bpt_rl.envs import features, rewards, tasks


def config_of(folder, tmp_path, **changes):
    return BuildConfig(
        **({"source": (str(folder),), "out": str(tmp_path / "s.h5"), "num_workers": 1} | changes)
    )


def test_a_store_holds_every_array_and_the_reward_of_every_task(folder, episodes, tmp_path):
    progress = []
    path = build_store(config_of(folder, tmp_path), lambda done, total: progress.append((done, total)))
    assert path == tmp_path / "s.h5"
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
    with Store.open(path) as built:
        assert built.tasks == tasks.tasks_of("cartpole")
        for i, episode in enumerate(episodes):
            read = built.episode(i)
            for key in exorl.KEYS:
                np.testing.assert_array_equal(getattr(read, key), getattr(episode, key))
            np.testing.assert_array_equal(
                read.features, features.physical_features("cartpole", episode.physics)
            )
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


def test_a_subset_is_named_in_the_store(folder, tmp_path):
    config = config_of(folder, tmp_path, subset="first-2-episodes", tasks=("cartpole_balance",))
    with Store.open(build_store(config)) as built:
        assert (built.num_episodes, built.subset, built.source) == (2, "first-2-episodes", "cartpole/random")
        assert built.episode_names == (
            "cartpole/random/episode_000000_40.npz",
            "cartpole/random/episode_000001_60.npz",
        )


def test_a_stratified_subset_ranks_by_the_first_task(folder, tmp_path):
    with Store.open(build_store(config_of(folder, tmp_path, tasks=("cartpole_swingup",)))) as built:
        best = int(np.argsort(built.returns("cartpole_swingup"))[1])
        expected = built.episode_names[best]
    config = config_of(folder, tmp_path, tasks=("cartpole_swingup",), subset="stratified-1-episodes")
    with Store.open(build_store(config)) as built:
        assert built.episode_names == (expected,)


def test_subsets_of_other_episodes_have_other_digests(folder, tmp_path):
    def digests(subset):
        with Store.open(build_store(config_of(folder, tmp_path, subset=subset))) as built:
            return built.subset_digest, built.digest

    full, first = digests("full"), digests("first-2-episodes")
    assert digests("first-3-episodes") == full
    assert first[0] != full[0]
    assert first[1] != full[1]


def test_a_zip_gives_the_store_that_its_folder_gives(folder, tmp_path):
    archive = tmp_path / "cartpole" / "random.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.iterdir(), reverse=True):
            file.write(path, f"buffer/{path.name}")
    with Store.open(build_store(config_of(folder, tmp_path))) as built:
        expected = (built.digest, built.subset_digest, built.source)
    with Store.open(build_store(config_of(archive, tmp_path, out=str(tmp_path / "zip.h5")))) as built:
        assert (built.digest, built.subset_digest, built.source) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ("walker_run", "walker_stand", "walker_run")}, ("walker", ("walker_run", "walker_stand"))),
        ({"domain": "cheetah", "source": ("walker/rnd",)}, ("cheetah", tasks.tasks_of("cheetah"))),
        ({"source": ("cheetah/of/walker/rnd.zip",)}, ("walker", tasks.tasks_of("walker"))),
        ({"source": ("cheetah.zip",)}, ("cheetah", tasks.tasks_of("cheetah"))),
    ],
)
def test_the_domain_comes_from_tasks_then_the_option_then_the_path(changes, expected):
    assert domain_and_tasks(BuildConfig(**changes)) == expected


def test_a_task_of_a_family_is_stored_once_and_found_in_every_spelling(folder, tmp_path):
    spellings = ("cartpole_position( position = 0.50 )", "cartpole_position(position=5e-1)")
    canonical = "cartpole_position(position=0.5)"
    config = config_of(folder, tmp_path, tasks=(*spellings, "cartpole_balance"), action_repeat=4)
    with Store.open(build_store(config)) as built:
        assert built.tasks == (canonical, "cartpole_balance")
        assert built.returns(canonical).any()
        # The store of merged steps cannot compute rewards: these are the stored ones.
        for task in spellings:
            assert built.returns(task).tolist() == built.returns(canonical).tolist()
            block = built.block((f"reward/{task}",), 0, 3)
            np.testing.assert_array_equal(
                block[f"reward/{task}"][1, :16], built.episode(1).task_reward[canonical]
            )
            assert built.statistics(task).returns == built.statistics(canonical).returns


def test_a_function_of_the_users_own_is_served_by_a_store_and_not_built_into_it(folder, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def cartpole_own(features, observation, action): return features['cart_position']")
    task = f"{path}:cartpole_own"
    with pytest.raises(ValueError, match=r"without functions of your own: .* got '.*mine\.py:cartpole_own'"):
        build_store(config_of(folder, tmp_path, tasks=("cartpole_balance", task)))
    with Store.open(build_store(config_of(folder, tmp_path, tasks=("cartpole_balance",)))) as built:
        position = built.episode(1).features[1:, 0]
        assert built.returns(task)[1] == np.float32(position.astype(np.float32).sum(dtype=np.float64))


def test_a_store_never_replaces_the_zip_that_it_is_built_from(folder, tmp_path):
    archive = tmp_path / "cartpole.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, path.name)
    content = archive.read_bytes()
    with pytest.raises(ValueError, match=r"must have a file of its own; got out '.*cartpole\.zip'"):
        build_store(config_of(archive, tmp_path, out=str(archive)))
    assert archive.read_bytes() == content


def test_names_that_do_not_fit_together_are_refused(folder, tmp_path):
    for changes, message in [
        ({"tasks": ("walker_run", "cheetah_run")}, "of its one domain; got domains cheetah, walker"),
        ({"tasks": ("walker_run",), "domain": "cheetah"}, "of its one domain; got domains cheetah, walker"),
        ({"tasks": ("walker_fly",)}, "Nearest valid one: 'walker_"),
        ({"domain": "worker"}, "Nearest valid one: 'walker'"),
        ({"source": (), "domain": "cartpole"}, "at least one source, and each once; got none"),
        ({"source": (str(folder), f"{folder}/../buffer")}, "at least one source, and each once; got /"),
        ({"out": ""}, "must have a file of its own; got out ''"),
        ({"out": str(tmp_path)}, "must have a file of its own; got out '/"),
        ({"source": (str(folder),), "out": str(folder)}, "must have a file of its own; got out '/"),
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
    with pytest.raises(
        ValueError, match=r"stored_reward has float32 \(2,\) here and float32 \(1,\) in the first"
    ):
        build_store(config_of(buffer, tmp_path))


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
        with Store.open(build_store(config_of(folder, tmp_path, **changes))) as built:
            return built.digest

    first = digest(tasks=("cartpole_balance", "cartpole_swingup"))
    same = digest(tasks=("cartpole_swingup", "cartpole_balance"), subset="first-3-episodes")
    assert same == first
    assert len({first, digest(), digest(action_repeat=4), digest(subset="first-2-episodes")}) == 4


KILL = """
import os, signal, sys
from bpt_rl.config import BuildConfig
from bpt_rl.datasets.build import build_store

def die(done, total):
    if done == {done!r}:
        os.kill(os.getpid(), signal.SIGKILL)

build_store(BuildConfig(source=({source!r},), out={out!r}, num_workers=1), die)
"""


def kill_after(done, folder, out, before=""):
    script = before + KILL.format(done=done, source=str(folder), out=str(out))
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert killed.returncode == -9


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(folder, tmp_path):
    whole = build_store(config_of(folder, tmp_path, out=str(tmp_path / "whole.h5"))).read_bytes()
    # No time of writing may be part of it.
    time.sleep(1.1)
    out = tmp_path / "killed" / "s.h5"
    for done in (0, 1, 2):
        kill_after(done, folder, out)
        assert not out.exists()
    progress = []
    build_store(config_of(folder, tmp_path, out=str(out)), lambda *counts: progress.append(counts))
    # Two were kept: the first is not written again.
    assert progress == [(2, 3), (3, 3)]
    assert out.read_bytes() == whole
    assert list(out.parent.iterdir()) == [out]


KILL_AT_RENAMING = """
import os, pathlib, signal
pathlib.Path.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_build_killed_while_it_finishes_goes_on_and_ends_with_the_same_bytes(folder, tmp_path):
    whole = build_store(config_of(folder, tmp_path, out=str(tmp_path / "whole.h5"))).read_bytes()
    out = tmp_path / "killed" / "s.h5"
    for _ in range(2):
        kill_after("never", folder, out, before=KILL_AT_RENAMING)
    progress = []
    build_store(config_of(folder, tmp_path, out=str(out)), lambda *counts: progress.append(counts))
    assert progress == [(3, 3)]
    assert out.read_bytes() == whole
    assert list(out.parent.iterdir()) == [out]


def test_a_worker_that_outlives_its_build_cannot_write_into_the_next_one(folder, episodes, tmp_path):
    out = tmp_path / "s.h5"
    kill_after(1, folder, out)
    layout = json.loads((tmp_path / ".s.h5.journal").read_text().splitlines()[1])["layout"]
    columns = {
        name: Column(**column | {"shape": tuple(column["shape"])})
        for name, column in layout["columns"].items()
    }
    old = Layout(**layout | {"columns": columns})
    with Store.open(build_store(config_of(folder, tmp_path, out=str(tmp_path / "whole.h5")))) as built:
        episode = built.episode(1)
    late = []

    def write_late(done, total):
        with pytest.raises(FileNotFoundError):
            old.write(1, episode)
        late.append(done)

    build_store(config_of(folder, tmp_path, tasks=("cartpole_balance",)), write_late)
    assert late == [0, 1, 2, 3]
    assert verify_store(out, num_workers=1) == 3


def test_a_killed_build_of_the_same_episodes_under_another_name_begins_anew(folder, tmp_path):
    kill_after(2, folder, tmp_path / "s.h5")
    config = config_of(folder, tmp_path, subset="first-3-episodes")
    again = config_of(folder, tmp_path, subset="first-3-episodes", out=str(tmp_path / "whole.h5"))
    assert build_store(config).read_bytes() == build_store(again).read_bytes()


def test_a_killed_build_keeps_nothing_that_is_not_as_it_was_written(folder, tmp_path):
    out = tmp_path / "s.h5"
    kill_after(2, folder, out)
    [part] = tmp_path.glob(".s.h5.*.building")
    content = bytearray(part.read_bytes())
    with Store.open(build_store(config_of(folder, tmp_path, out=str(tmp_path / "whole.h5")))) as built:
        second = built.block(("observation",), 1, 2)["observation"][0, 5].tobytes()
    content[content.index(second)] ^= 1
    part.write_bytes(content)
    progress = []
    build_store(config_of(folder, tmp_path), lambda *counts: progress.append(counts))
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_killed_build_of_other_episodes_or_tasks_begins_anew(folder, tmp_path):
    changed = tmp_path / "cartpole" / "random" / "buffer"
    shutil.copytree(folder, changed)
    for change in ("tasks", "episodes"):
        kill_after(2, changed, tmp_path / "s.h5")
        task_names = ("cartpole_balance",) if change == "tasks" else ()
        if change == "episodes":
            (changed / "episode_000002_20.npz").unlink()
        progress = []
        config = config_of(changed, tmp_path, tasks=task_names)
        build_store(config, lambda *counts, progress=progress: progress.append(counts))
        assert progress[0][0] == 0


def test_two_builds_of_one_store_at_a_time_are_refused(folder, tmp_path):
    def again(done, total):
        with pytest.raises(BlockingIOError, match=r"one process at a time; another one is building .*s\.h5"):
            build_store(config_of(folder, tmp_path))

    build_store(config_of(folder, tmp_path), again)
