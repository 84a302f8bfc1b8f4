"""The table of all agents (`benchmarks/agents_table.py`): numbers of literal returns, and what it says is missing."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bpt_rl.run import records
from bpt_rl.types import EpisodeLog

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "agents_table.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("agents_table", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log(returns, context):
    array = np.array(returns, np.float64)
    return records.log_to_json(
        EpisodeLog(
            task="walker_run",
            context=context,
            returns=array,
            num_steps=np.full(array.shape, 1000),
            action_repeat=1,
            target_return=float("nan"),
            seed=1,
            failures=(),
        )
    )


def record(agent, task, seed, chain, memoryless=None, **changes):
    logs = {"chain": log(chain, "chain"), "random": log([[10.0, 30.0]], "random")}
    if memoryless is not None:
        logs["memoryless"] = log(memoryless, "memoryless")
    data = {
        "digest": "d",
        "mean_return": 50.0,
        "largest_return": 120.0,
        "subset": "full",
        "top_fraction": 1.0,
    }
    common = {"agent": agent, "task": task, "train_seed": seed, "logs": logs, "data": data, "step": 7}
    shape = {"num_chains": len(chain), "num_episodes": len(chain[0]), "num_trajectories": len(chain[0])}
    return common | shape | {"target_return": 120.0, "target_rule": "largest"} | changes


@pytest.fixture(scope="module")
def cells(tool):
    """BC of all tasks and seeds, Agentic Transformers of four trajectories with one seed on one task."""
    # Means of 60, 70 and 80: on the scale from 20 to 120 they are 0.4, 0.5 and 0.6.
    made = [
        record("bc", task, seed, [[50.0 + 10 * seed], [70.0 + 10 * seed]])
        for task in tool.TASKS
        for seed in tool.SEEDS
    ]
    chain, cleared = [[10.0, 20, 30, 60], [20.0, 30, 10, 20]], [[0.0, 0, 0, 0], [0, 0, 0, 80.0]]
    return [*made, record("at", "walker_run", 1, chain, cleared)]


def test_of_three_seeds_the_interquartile_mean_is_their_mean_and_student_gives_the_interval(tool):
    found = tool.Number(by_seed={0: 1.0, 1: 2.0, 2: 6.0})
    assert found.middle == pytest.approx(3)
    # 4.3027 deviations of the mean, sqrt(7 / 3).
    assert found.interval == pytest.approx((3 - 6.5724, 3 + 6.5724), abs=1e-3)
    assert found.resampled == (1.0, 6.0)
    assert tool.Number(by_seed={3: 0.0, 0: 100.0, 1: 1.0, 2: 3.0}).middle == 2
    assert tool.cell_text(found) == "3 [-4, 10]<br>(1, 2, 6)"
    assert tool.cell_text(tool.Number(by_seed={2: 5.0})) == "5<br>(5; 1 of 3 seeds)"
    assert tool.cell_text(None) == "missing"


def test_the_protocols_of_a_chain_and_its_two_controls(tool, cells):
    [at] = [agent for agent in tool.AGENTS if agent.title == "AT, n = 4"]
    own = tool.cells_of(at, "walker_run", cells)
    found = {words: tool.number(own, *asked).by_seed for *asked, words in at.readings}
    assert found == {
        "first": {1: 15.0},
        "last": {1: 40.0},
        "mean": {1: 25.0},
        "max": {1: 45.0},
        "memoryless: mean": {1: 10.0},
        # Half of the ways to draw four of the eight episodes have the one that is not 0.
        "null max": {1: pytest.approx(40.0)},
    }


def test_differences_are_paired_by_seed_and_only_of_whole_sets_of_seeds(tool, cells):
    ours = tool.Number(by_seed={0: 11.0, 1: 22.0, 2: 36.0})
    theirs = tool.Number(by_seed={2: 30.0, 0: 10.0, 1: 20.0})
    found = tool.difference(ours, theirs)
    assert found.by_seed == {0: 1.0, 1: 2.0, 2: 6.0}
    assert tool.difference_text(found) == "+3 [-4, +10]"
    assert tool.difference(ours, tool.Number(by_seed={0: 1.0, 1: 2.0})) is None
    assert tool.difference(None, theirs) is None
    better = [
        record("bc", task, seed, [[62.0 + 10 * seed]], data={**cells[0]["data"], "top_fraction": 0.1})
        for task in tool.TASKS
        for seed in tool.SEEDS
    ]
    lines = tool.difference_table([*cells, *better]).splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines)
    assert rows["BC-10% less BC"] == " | ".join(["+2 [+2, +2]"] * 5)
    assert rows["DT less BC"] == rows["AT, n = 4: last less first"] == " | ".join([tool.DASH] * 5)


def test_all_tasks_are_put_on_one_scale_and_only_where_nothing_is_missing(tool, cells):
    scales = [tool.references(task, cells) for task in tool.TASKS]
    assert {(scale.zero, scale.one) for scale in scales} == {(20.0, 120.0)}
    numbers = [
        tool.number(tool.cells_of(tool.AGENTS[0], task, cells), "chain", "mean") for task in tool.TASKS
    ]
    middle, (low, high) = tool.over_tasks(numbers, scales)
    assert middle == pytest.approx(0.5)
    assert 0.4 <= low < 0.5 < high <= 0.6
    assert tool.over_tasks([*numbers[:-1], None], scales) is None
    assert tool.over_tasks([*numbers[:-1], tool.Number(by_seed={0: 70.0, 1: 70.0})], scales) is None


def test_cells_that_do_not_differ_in_their_seed_alone_are_refused(tool, cells):
    bc = tool.AGENTS[0]
    for other in ({"train_seed": 0}, {"train_seed": 3, "step": 8}):
        mixed = [*cells, record("bc", "walker_run", 0, [[1.0], [2.0]], **other)]
        with pytest.raises(ValueError, match="differ in their seed alone; got 4 of BC on walker_run"):
            tool.cells_of(bc, "walker_run", mixed)
    other = record("bc", "walker_run", 3, [[1.0]])
    with pytest.raises(ValueError, match="compared on the same data; got 2 kinds"):
        tool.references("walker_run", [*cells, other | {"data": other["data"] | {"mean_return": 51.0}}])


def test_the_command_writes_what_is_there_and_names_what_is_missing(
    tool, cells, tmp_path, monkeypatch, capsys
):
    (tmp_path / "cells").mkdir()
    for index, cell in enumerate(cells):
        (tmp_path / "cells" / f"{index:02}.json").write_text(json.dumps({"record": cell}))
    arguments = ["agents_table.py", "--cells", str(tmp_path / "cells"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    tool.main()
    shown = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.strip() in shown
    lines = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in shown.splitlines() if "|" in line
    }
    assert lines["BC: mean"][:5] == ["70 [45, 95]<br>(60, 70, 80)"] * 5
    assert lines["BC: mean"][5].startswith("0.50 [0.4")
    assert lines["AT, n = 4: null max"][1:4] == ["missing", "40<br>(40; 1 of 3 seeds)", "missing"]
    assert lines["TD3: mean"][:5] == ["missing"] * 5
    assert lines["random: mean"][0] == "20"
    found = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert len(found) == 5 + 6
    last = next(r for r in found if r["agent"] == "AT, n = 4" and r["protocol"] == "last")
    assert (last["interquartile_mean"], last["seed_0"], last["seed_1"], last["t_low"]) == (
        "40.0",
        "",
        "40.0",
        "",
    )
