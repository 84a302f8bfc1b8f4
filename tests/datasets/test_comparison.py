import dataclasses
import re
import zipfile

import numpy as np
import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets import coverage, exorl
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.comparison import check_comparable, compare, comparison_text, labels
from bpt_rl.datasets.description import describe, describe_survey
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.survey import Dataset, identify, survey
from bpt_rl.envs import rewards, tasks


@pytest.fixture(scope="session")
def store(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "s.h5"
    return build_store(
        BuildConfig(source=(str(folder),), out=str(out), tasks=("cartpole_swingup",), num_workers=1)
    )


@pytest.fixture(scope="session")
def wild(folder, tmp_path_factory):
    """`cartpole/rnd`, a zip of one episode whose states spread widely."""
    path = tmp_path_factory.mktemp("wild") / "cartpole" / "rnd.zip"
    path.parent.mkdir()
    [calm, *_] = (exorl.read_episode(folder / name) for name in exorl.list_episodes(folder))
    physics = np.random.default_rng(0).normal(size=calm.physics.shape) * [1, 3, 3, 9]
    file = path.parent / "episode_000000_40.npz"
    exorl.write_episode(file, dataclasses.replace(calm, physics=physics))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "buffer/episode_000000_40.npz")
    return path


def test_a_folder_and_the_store_built_from_it_are_surveyed_alike(folder, store, episodes):
    of_folder, of_store = (survey(identify(str(path)), num_workers=1) for path in (folder, store))
    assert (of_folder.dataset.source, of_store.dataset.source) == ("cartpole/random", "cartpole/random")
    assert set(of_store.returns) == set(of_folder.returns) == set(tasks.tasks_of("cartpole"))
    for task, returns in of_folder.returns.items():
        expected = [rewards.relabel(task, e.physics, e.action).sum(dtype=np.float64) for e in episodes]
        np.testing.assert_array_equal(returns, np.float32(expected))
        np.testing.assert_array_equal(of_store.returns[task], returns)
    assert of_folder.num_steps.tolist() == of_store.num_steps.tolist() == [40, 60, 20]
    np.testing.assert_array_equal(of_folder.states, of_store.states)
    position = [state for episode in episodes for state in episode.physics[1:, 0].tolist()]
    assert sorted(of_folder.states[:, 0].tolist()) == sorted(position)


def test_processes_and_shares_do_not_change_a_survey(folder, monkeypatch):
    whole = survey(identify(str(folder)), num_workers=1)
    monkeypatch.setattr("bpt_rl.datasets.survey._SHARE_EPISODES", 2)
    done = []
    parts = survey(identify(str(folder)), num_workers=1, report_progress=lambda *counts: done.append(counts))
    assert done == [(2, 3), (3, 3)]
    np.testing.assert_array_equal(parts.states, whole.states)
    for task, returns in whole.returns.items():
        np.testing.assert_array_equal(parts.returns[task], returns)


def test_a_comparison_holds_what_each_dataset_alone_is_said_to_have(store, wild):
    surveys = [survey(identify(str(path)), num_workers=1) for path in (store, wild)]
    compared = compare(surveys)
    assert (compared["domain"], compared["against"], list(compared["datasets"])) == (
        "cartpole",
        "random",
        ["random", "rnd"],
    )
    assert compared["datasets"]["rnd"] == describe_survey(surveys[1])
    told, found = describe(store), compared["datasets"]["random"]
    for key in ("path", "source", "subset", "num_episodes", "num_steps", "episode_steps"):
        assert found[key] == told[key]
    assert found["returns"]["cartpole_swingup"] == told["returns"]["cartpole_swingup"]


def test_coverage_is_measured_with_as_many_states_of_each_dataset(store, wild):
    surveys = [survey(identify(str(path)), num_workers=1) for path in (store, wild)]
    found = {name: dataset["coverage"] for name, dataset in compare(surveys)["datasets"].items()}
    assert {name: of["num_states"] for name, of in found.items()} == {"random": 40, "rnd": 40}
    expected = coverage.coverage(
        "cartpole", surveys[0].states[:40], coverage.draw_states(surveys[0].num_steps)[:40, 0]
    )
    assert {key: found["random"][key] for key in expected._fields} == expected._asdict()
    assert describe(store)["coverage"]["num_states"] == 120
    assert found["rnd"]["nats"] > found["random"]["nats"] + 1


def test_the_tables_show_differences_to_the_baseline(store, wild):
    surveys = [survey(identify(str(path)), num_workers=1) for path in (store, wild)]
    compared = compare(surveys)
    random, rnd = compared["datasets"].values()
    lines = comparison_text(compared, width=140).splitlines()
    nats, error = (
        [dataset["coverage"][key] for dataset in (random, rnd)] for key in ("nats", "standard_error")
    )
    assert f" random    full            3     120      {nats[0]:.2f} ± {error[0]:.2f}" in lines
    # One episode has no error.
    assert f" rnd       full            1      40     {nats[1]:.2f} ({nats[1] - nats[0]:+.2f})" in lines
    mine, other = (dataset["returns"]["cartpole_swingup"] for dataset in (rnd, random))
    cells = [f"{mine[k]:.1f} ({mine[k] - other[k]:+.1f})" for k in ("mean", "quantile_95", "max")]
    row = lines[lines.index(" cartpole_swingup") + 2]
    assert re.split(r"  +", row.strip()) == ["rnd", *cells]
    assert lines[-1] == "In brackets: less that of random."
    alone = comparison_text(compare(surveys, against="rnd") | {"against": None}, width=140)
    assert "(+" not in alone
    assert "In brackets" not in alone


def test_a_task_that_one_dataset_lacks_has_a_dash(folder, wild, tmp_path):
    config = BuildConfig(
        source=(str(folder),),
        out=str(tmp_path / "s.h5"),
        tasks=("cartpole_balance",),
        action_repeat=4,
        num_workers=1,
    )
    surveys = [survey(identify(str(path)), num_workers=1) for path in (build_store(config), wild)]
    assert list(surveys[0].returns) == ["cartpole_balance"]
    lines = comparison_text(compare(surveys), width=140).splitlines()
    start = lines.index(" cartpole_swingup")
    assert lines[start + 1].split() == ["random", "-", "-", "-"]
    assert "(" not in lines[start + 2]


def dataset(path, source):
    return Dataset(path=path, domain=source.partition("/")[0], source=source)


def test_labels_are_collectors_or_what_paths_do_not_share():
    assert labels([dataset("/a/walker/rnd", "walker/rnd"), dataset("b.h5", "walker/icm + walker/aps")]) == [
        "rnd",
        "icm + aps",
    ]
    pair = [dataset("/a/b/one/rnd.zip", "walker/rnd"), dataset("/a/b/two.h5", "walker/rnd")]
    assert labels([*pair, dataset("/c", "walker/icm")]) == ["one/rnd.zip", "two.h5", "icm"]


@pytest.mark.parametrize(
    ("datasets", "against", "message"),
    [
        (
            [dataset("a", "walker/rnd"), dataset("b", "cheetah/rnd"), dataset("c", "walker/icm")],
            "random",
            r"of one domain to be compared; got walker \(a\), cheetah \(b\)\. Compare",
        ),
        ([dataset("a", "walker/rnd"), dataset("./a", "walker/rnd")], "random", r"once; got a and \./a\."),
        (
            [dataset("a", "walker/rnd"), dataset("b", "walker/icm")],
            "aps",
            r"one of the datasets, rnd, icm; got 'aps'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_is_read(datasets, against, message):
    with pytest.raises(ValueError, match=message):
        check_comparable(datasets, against)


def test_datasets_that_are_none_are_refused(folder, store, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"a store, or a folder or zip of episodes; there is none at .*nowhere"
    ):
        identify(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"must hold files named episode_.*holds none"):
        identify(str(tmp_path))
    unnamed = tmp_path / "unnamed"
    unnamed.symlink_to(folder)
    with pytest.raises(ValueError, match=r"names none\. Set domain to one of cartpole, walker"):
        identify(str(unnamed))
    with pytest.raises(ValueError, match=r"Nearest valid one: 'cartpole'"):
        identify(str(unnamed), "cartpol")
    assert identify(str(unnamed), "cartpole").domain == "cartpole"
    assert identify(str(folder), "walker").domain == "walker"
    with Store.open(store) as opened:
        assert identify(str(store), "walker").domain == opened.domain


def test_an_episode_of_another_body_is_named(folder, tmp_path):
    other = tmp_path / "walker" / "rnd"
    other.parent.mkdir()
    other.symlink_to(folder)
    with pytest.raises(
        ValueError, match=r"walker/rnd/episode_000000_40\.npz: physics of walker must have shape"
    ):
        survey(identify(str(other)), num_workers=1)
