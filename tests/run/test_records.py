"""Tests of the run folder: atomic files, and logs that survive JSON."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from bpt_rl.config import TrainConfig
from bpt_rl.config_toml import to_toml
from bpt_rl.run import records
from bpt_rl.types import DataStatistics, EpisodeFailure, EpisodeLog

STATISTICS = DataStatistics(
    task="walker_run",
    observation_mean=(0.0, -1.5),
    observation_std=(1.0, 1e-8),
    action_dim=6,
    action_repeat=1,
    episode_steps=1000,
    returns=(1.0, 2.0, 6.0),
    reward_abs_max=1.0,
    num_episodes=3,
    source="walker, random",
    subset="full",
    subset_digest="0" * 64,
    digest="0" * 64,
)


def episode_log(target_return: float) -> EpisodeLog:
    return EpisodeLog(
        returns=np.array([[0.1 + 0.2, 1e-300], [-3.0, 1e6]]),
        num_steps=np.array([[1000, 1000], [1000, 17]]),
        context="chain",
        task="walker_run",
        action_repeat=2,
        target_return=target_return,
        seed=1_000_000,
        seconds=1.25,
        failures=(EpisodeFailure(chain=1, episode=1, step=17, reason="diverged"),),
    )


def test_reader_sees_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "folder" / "values.json"
    records.write_atomically(path, "old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_text()))
    records.write_atomically(path, "new")
    assert (seen, path.read_text()) == (["old"], "new")
    assert [entry.name for entry in path.parent.iterdir()] == ["values.json"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "values.json"
    records.write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        records.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["values.json"]


@pytest.mark.parametrize("target_return", [float("nan"), 250.5])
def test_episode_log_survives_json(target_return: float) -> None:
    log = episode_log(target_return)
    # Strict JSON, which has no NaN: other programs read these files.
    text = json.dumps(records.log_to_json(log), allow_nan=False)
    read = records.log_from_json(json.loads(text))
    np.testing.assert_array_equal(read.returns, log.returns)
    np.testing.assert_array_equal(read.num_steps, log.num_steps)
    np.testing.assert_equal(read.target_return, target_return)
    assert read.failures == log.failures
    assert "seconds" not in json.loads(text)
    assert records.log_to_json(read) == records.log_to_json(log)


def test_run_folder_reads_back_what_a_run_writes(tmp_path: Path) -> None:
    folder = records.RunFolder(tmp_path)
    config = TrainConfig(run=str(tmp_path), seed=5)
    records.write_atomically(folder.config_path, to_toml(config))
    records.write_json(tmp_path / "statistics.json", vars(STATISTICS))
    records.write_json(tmp_path / "versions.json", records.versions())
    folder.metrics_path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    assert folder.config() == config
    assert folder.statistics() == STATISTICS
    assert folder.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert set(folder.versions()) == {"packages", "python", "machine", "git_commit"}


def test_statistics_keep_their_shortcuts() -> None:
    assert (STATISTICS.observation_dim, STATISTICS.largest_return, STATISTICS.mean_return) == (2, 6.0, 3.0)
    assert math.isclose(sum(STATISTICS.returns), 9.0)


def test_evaluations_come_oldest_first(tmp_path: Path) -> None:
    folder = records.RunFolder(tmp_path)
    for age, name in enumerate(["b", "c", "a"]):
        path = folder.evaluations_path / f"{name}.json"
        records.write_json(path, {"name": name})
        os.utime(path, ns=(age, age))
    assert [evaluation["name"] for evaluation in folder.evaluations()] == ["b", "c", "a"]


def test_empty_folder_has_no_metrics_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = records.RunFolder(tmp_path)
    assert (folder.metrics(), folder.evaluations()) == ([], [])
    with pytest.raises(FileNotFoundError, match=r"must hold config\.toml; there is none in .*bpt-rl train"):
        folder.config()


def test_versions_name_each_package() -> None:
    packages = records.versions()["packages"]
    assert set(packages) == set(records.PACKAGES)
    assert "not installed" not in packages.values()
