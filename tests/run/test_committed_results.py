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


BOTH = ("table.csv", "costs.csv")


@pytest.mark.parametrize(
    ("grid", "tables", "files", "cells"),
    [
        ("trajectory_count/grid.toml", "trajectory_count", BOTH, ["trajectory_count/cells"]),
        (
            "trajectory_count_seed0/grid.toml",
            "trajectory_count_seed0",
            BOTH,
            ["agents/cells", "agents/control_cells"],
        ),
        ("trajectory_count/steps.toml", "trajectory_count/steps", BOTH, ["trajectory_count/cells"]),
        ("agents/sensitivity.toml", "agents/sensitivity", BOTH, ["trajectory_count/cells"]),
        # Cells that ran beside other work tell no times.
        ("agents/layouts.toml", "agents/layouts", BOTH[:1], ["agents/layout_cells"]),
        ("agents/layouts_counts.toml", "agents/layouts_counts", BOTH[:1], ["agents/layout_cells"]),
    ],
)
def test_a_committed_table_is_that_of_its_cells(tmp_path, monkeypatch, grid, tables, files, cells):
    monkeypatch.chdir(ROOT)
    for folder in cells:
        shutil.copytree(f"results/{folder}", tmp_path / "results", dirs_exist_ok=True)
    config = config_toml.load(AblateConfig, f"results/{grid}")
    folder = GridFolder.of(dataclasses.replace(config, out=str(tmp_path)))
    write_tables(expand(config, folder.stores), folder)
    for file in files:
        ours, theirs = rows(folder.table_path.with_name(file)), rows(Path("results", tables, file))
        assert len(ours) == len(theirs) > 0
        for own, committed in zip(ours, theirs, strict=True):
            assert own.keys() == committed.keys()
            assert all(same(own[name], committed[name]) for name in own)
