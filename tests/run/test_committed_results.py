"""The tables that docs quote are those of the committed cells, which need no data to be read again."""

import csv
import dataclasses
import math
import shutil
from pathlib import Path

import pytest

from bpt_rl import config_toml
from bpt_rl.ablate_config import AblateConfig
from bpt_rl.run.ablation_table import write_tables
from bpt_rl.run.grid import expand
from bpt_rl.run.grid_folder import GridFolder

ROOT = Path(__file__).resolve().parents[2]


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def same(ours, theirs):
    try:
        return math.isclose(float(ours), float(theirs), rel_tol=1e-9, abs_tol=1e-9)
    except ValueError:
        return ours == theirs


@pytest.mark.parametrize(
    ("grid", "tables", "cells"),
    [
        ("trajectory_count/grid.toml", "trajectory_count", ["trajectory_count/cells"]),
        (
            "trajectory_count_seed0/grid.toml",
            "trajectory_count_seed0",
            ["agents/cells", "agents/control_cells"],
        ),
        ("agents/sensitivity.toml", "agents/sensitivity", ["trajectory_count/cells"]),
    ],
)
def test_a_committed_table_is_that_of_its_cells(tmp_path, monkeypatch, grid, tables, cells):
    monkeypatch.chdir(ROOT)
    for folder in cells:
        shutil.copytree(f"results/{folder}", tmp_path / "results", dirs_exist_ok=True)
    config = config_toml.load(AblateConfig, f"results/{grid}")
    folder = GridFolder.of(dataclasses.replace(config, out=str(tmp_path)))
    write_tables(expand(config, folder.stores), folder)
    for path in (folder.table_path, folder.costs_path):
        ours, theirs = rows(path), rows(Path("results", tables, path.name))
        assert len(ours) == len(theirs) > 0
        for own, committed in zip(ours, theirs, strict=True):
            assert own.keys() == committed.keys()
            assert all(same(own[name], committed[name]) for name in own)
