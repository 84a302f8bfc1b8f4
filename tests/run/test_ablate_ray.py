"""A grid as tasks of Ray Core, one of whose workers is killed."""

import os
from pathlib import Path

import pytest

from bpt_rl.ablate_config import GridConfig
from bpt_rl.config import DataConfig, TrainConfig
from bpt_rl.run.ablate import ablate
from bpt_rl.run.launcher_ray import RayLauncher, Request

pytest.importorskip("ray", reason="the extra `ray` is not installed")
STUBS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def launcher(monkeypatch):
    """Two cores of a cluster of its own, which its workers leave with the test."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(STUBS), os.environ.get("PYTHONPATH"))))
    )
    # Ray would else write a token of its own below the home folder.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    def make(jobs):
        made = RayLauncher("", Request(num_cpus=1), "stub_cells:die_once")
        with pytest.raises(ValueError, match="got 1000 of CPU, and this machine has"):
            RayLauncher("", Request(num_cpus=1000))
        return made

    return make


# Ray forks to start its services, which exec at once; JAX, if an earlier test has started it, warns of any fork.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_worker_that_dies_loses_its_cell_alone_and_the_cell_is_run_again(launcher, store_path, tmp_path):
    axes = {"train.data.num_trajectories": (1, 2), "train.seed": (0, 1)}
    data = DataConfig(store=str(store_path), task="cartpole_balance", batch_size=2)
    config = GridConfig(out=str(tmp_path / "once"), axes=axes, train=TrainConfig(data=data))
    result = ablate(config, launcher)
    assert result.failures == []
    assert len(list((tmp_path / "once").glob("died_*"))) == 2
    assert len(result.folder.finished()) == 4
