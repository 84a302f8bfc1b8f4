"""Controls of a grid: their cells, and what its page says of them; made-up returns (`benchmarks/stub_cells.py`)."""

import csv
import dataclasses
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from bpt_rl.ablate_config import GridConfig
from bpt_rl.config import DataConfig, TrainConfig
from bpt_rl.run import records
from bpt_rl.run.ablate import ablate, report
from bpt_rl.run.ablation_groups import axes_of, read_groups
from bpt_rl.run.ablation_verdict import verdict
from bpt_rl.run.grid import expand
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.launchers import InlineLauncher

STUBS = Path(__file__).resolve().parents[2] / "benchmarks" / "stub_cells.py"
COUNT, SEED, TASK = "train.data.num_trajectories", "train.seed", "train.data.task"
ORDER, RELABEL = "train.data.order", "train.data.relabel"


@pytest.fixture(scope="module")
def stubs():
    spec = importlib.util.spec_from_file_location("stub_cells", STUBS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grid_of(store_path, out, **changes):
    data = DataConfig(store=str(store_path), task="cartpole_balance", batch_size=2)
    linked = ({TASK: ("cartpole_balance", "cartpole_swingup"), "train.data.store": 2 * (str(store_path),)},)
    values = {
        "axes": {COUNT: (1, 4, 2), SEED: (0, 1, 2)},
        "linked": linked,
        "controls": ({COUNT: (4,), ORDER: ("shuffled",)}, {COUNT: (2, 4), RELABEL: ("own_return",)}),
        "train": TrainConfig(data=data),
    }
    return GridConfig(**({"out": str(out)} | values | changes))


@pytest.fixture(scope="module")
def result(store_path, tmp_path_factory, stubs):
    config = grid_of(store_path, tmp_path_factory.mktemp("grid"))
    return config, ablate(config, lambda jobs: InlineLauncher(stubs.play))


@pytest.fixture(scope="module")
def text(result):
    return result[1].folder.page_path.read_text()


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))


def verdict_of(text):
    return words(text.split('<div class="verdict">')[1].split("</div>")[0])


def section(text, heading):
    return text.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]


def test_a_control_is_a_cell_of_the_grid_but_for_its_change_and_stands_behind_the_grid(store_path, tmp_path):
    config = grid_of(store_path, tmp_path)
    cells = expand(config)
    plain = expand(dataclasses.replace(config, controls=()))
    assert [cell.address for cell in cells[:18]] == [cell.address for cell in plain]
    assert not any(cell.change for cell in cells[:18])
    alike = {(c.train.data.task, c.train.data.num_trajectories, c.train.seed): c.train for c in plain}
    found = []
    for cell in cells[18:]:
        data = cell.train.data
        base = alike[data.task, data.num_trajectories, cell.train.seed]
        # Trajectories a batch are the grid's too.
        expected = dataclasses.replace(base.data, order=data.order, relabel=data.relabel)
        assert dataclasses.replace(base, data=expected, run=cell.train.run) == cell.train
        assert cell.change == {ORDER: "shuffled"} or cell.change == {RELABEL: "own_return"}
        found.append((data.order, data.relabel, data.num_trajectories))
    orders = [
        ("shuffled", "chain_maximum", 4),
        ("ascending", "own_return", 4),
        ("ascending", "own_return", 2),
    ]
    assert found == 6 * orders[:1] + 2 * (3 * orders[1:2] + 3 * orders[2:])
    # The same cells as of a grid that has nothing else.
    axes = {COUNT: (4,), "train.data.batch_size": (2,), ORDER: ("shuffled",), SEED: (0, 1, 2)}
    alone = grid_of(store_path, tmp_path, axes=axes, controls=(), equal="gradient_steps")
    assert [cell.address for cell in expand(alone)] == [cell.address for cell in cells[18:24]]


def test_what_changes_nothing_is_no_control(store_path, tmp_path):
    # The grid's own order; and an agent that reads none.
    axes, orders = {"train.agent": ("at", "td3"), SEED: (0, 1)}, ("ascending", "shuffled")
    config = grid_of(store_path, tmp_path, axes=axes, linked=(), controls=({ORDER: orders},))
    cells = expand(config)
    assert [(c.train.agent, bool(c.change)) for c in cells] == [
        *2 * [("at", False)],
        *2 * [("td3", False)],
        *2 * [("at", True)],
    ]


def test_the_page_compares_each_control_with_what_it_is_like(result, text):
    _, found = result
    last = {}
    for cell in found.cells:
        logs = found.folder.result(cell.address)["record"]["logs"]
        key = (cell.train.data.task, cell.train.data.order, cell.train.data.relabel)
        if cell.train.data.num_trajectories == 4:
            levels = [np.mean(np.array(logs[name]["returns"])[:, -1]) for name in ("chain", "memoryless")]
            last.setdefault(key, []).append(levels)
    verdict = verdict_of(text)
    sentence = (
        r"On cartpole_{}, control: Agentic Transformer, 4 trajectories, order shuffled against ascending: "
        r"last (\S+) \[\S+ \S+\]; the memoryless control (\S+) \[\S+ \S+\]; so keeping the context adds (\S+) "
    )
    for task in ("balance", "swingup"):
        ascending, shuffled = (
            np.mean(last[f"cartpole_{task}", order, "chain_maximum"], axis=0)
            for order in ("ascending", "shuffled")
        )
        kept, cleared = shuffled - ascending
        shown = re.search(sentence.format(task), verdict)
        numbers = [float(number.replace("−", "-")) for number in shown.groups()]  # noqa: RUF001
        assert numbers == pytest.approx([kept, cleared, kept - cleared], abs=0.06)
        assert kept == pytest.approx(-18)
        assert "The control returns less; its context adds less." in verdict[shown.end() : shown.end() + 90]
    assert verdict.count("There is no telling which returns more; there is no telling whose context") == 4
    # Beside the grid, not in it.
    assert verdict.count("4 trajectories against 1: last +") == 2
    assert verdict.index("On cartpole_balance, control") < verdict.index("On cartpole_swingup, Agentic")


def test_controls_stand_beside_what_they_are_like_in_tables_and_plots(text):
    for task in ("cartpole_balance", "cartpole_swingup"):
        titles = re.findall(
            r'<th scope="row"[^>]*>([^<]*trajector[^<]*)<', section(text, f"What it took: {task}")
        )
        names = [title.removeprefix("Agentic Transformer, ") for title in titles]
        assert names == [
            "1 trajectory",
            *("4 trajectories", "4 trajectories, order shuffled", "4 trajectories, relabel own_return"),
            *("2 trajectories", "2 trajectories, relabel own_return"),
        ]
        shown = section(text, f"Controls: {task}")
        assert len(re.findall(r"<tr><th", shown)) == 1 + 3
        legends = [words(key).strip() for key in re.findall(r"<li>(.*?)</li>", shown, re.DOTALL)]
        names = [legend[1:] for legend in legends]
        assert names.count("order shuffled") == 1 and names.count("relabel own_return") == 2
        [alt] = re.findall(r'aria-label="(Returns of Agentic Transformer, 4 traj[^"]*)"', shown)
        assert re.search(
            r"last, context kept: 70\.\d \[.*\] with 4 traj.*, 52\.\d \[.*\] with order shuffled", alt
        )
        assert "shuffled" not in section(text, f"How many trajectories: {task}")
        assert "shuffled" not in section(text, f"Return within the context: {task}")


def test_what_controls_change_is_a_column_of_the_table_for_all_cells(result):
    with result[1].folder.table_path.open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["num_trajectories"], row[ORDER], row[RELABEL]) for row in rows}
    grid = [(count, "ascending", "chain_maximum") for count in ("1", "2", "4")]
    assert found == {
        *grid,
        ("4", "shuffled", "chain_maximum"),
        *((count, "ascending", "own_return") for count in "24"),
    }


def test_a_control_of_every_cell_leaves_the_other_comparisons_as_they_are(store_path, tmp_path, stubs):
    axes = {"train.data.draw": ("uniform", "return_stratified"), COUNT: (1, 4), SEED: (0, 1)}
    config = grid_of(store_path, tmp_path / "a", axes=axes, linked=(), controls=({ORDER: ("shuffled",)},))
    text = ablate(config, lambda jobs: InlineLauncher(stubs.play)).folder.page_path.read_text()
    plain = dataclasses.replace(config, controls=(), name="plain")
    other = report(plain).folder.page_path.read_text()
    # One over all settings of the grid, none of the controls among them.
    heading = "How the axes act together"
    assert re.sub(r"t0i\d", "", section(text, heading)) == re.sub(r"t0i\d", "", section(other, heading))
    assert section(text, "How many trajectories") == section(other, "How many trajectories")
    ours, plain_ones = (
        verdict_of(page).split("Each of the")[0].split("On cartpole") for page in (text, other)
    )
    assert [sentence for sentence in ours if "control: " not in sentence] == plain_ones
    # A single episode has no context, whatever the order was in training.
    assert verdict_of(text).count("control: Agentic Transformer, 1 trajectory, draw") == 2


def test_a_control_without_the_cells_it_is_like_is_compared_with_nothing(store_path, tmp_path, stubs):
    config = grid_of(store_path, tmp_path, linked=())
    found = ablate(config, lambda jobs: InlineLauncher(stubs.play))

    def remove(count, seeds, change):
        for cell in found.cells:
            data = cell.train.data
            if (data.num_trajectories, cell.change) == (count, change) and cell.train.seed in seeds:
                (tmp_path / "results" / f"{cell.address}.json").unlink(missing_ok=True)

    remove(4, {1}, {})
    text = report(config).folder.page_path.read_text()
    assert "5 of 6 settings have all seeds, 3 of 3 controls among them." in words(text)
    assert "4 trajectories, order" not in verdict_of(text).split("Not compared")[0]
    assert "control: Agentic Transformer, 2 trajectories, relabel own_return" in verdict_of(text)
    assert "Agentic Transformer, 4 trajectories (2 of 3 seeds)" in verdict_of(text).split("Not compared")[1]
    # What there is of both is drawn.
    assert "with order shuffled" in section(text, "Controls")
    remove(4, {0, 2}, {})
    remove(2, {1}, {RELABEL: "own_return"})
    text = report(config).folder.page_path.read_text()
    assert "with order shuffled" not in section(text, "Controls")
    assert "<table" not in section(text, "Controls")
    assert "4 of 6 settings have all seeds, 2 of 3 controls among them." in words(text)
    rows = re.findall(
        r'<th scope="row">(.*?)</th><td>(.*?)</td>', section(text, "Cells that are not finished")
    )
    assert rows == [
        ("trajectories 4", "0 of 3"),
        ("trajectories 2, relabel own_return", "2 of 3"),
    ]
    # Still read like any other group.
    assert "Agentic Transformer, 4 trajectories, order shuffled" in section(text, "Returns")
    assert "4 trajectories, order shuffled" in section(text, "Return within the context")


@pytest.mark.parametrize(
    ("kept", "cleared", "claim"),
    [
        (30, 0, "More trajectories help, and having them in context is part of it: cleared contexts gain less."),
        (30, 60, "More trajectories help, although having them in context does harm: cleared contexts gain more."),
        (30, 30, "More trajectories help, and there is no evidence that having them in context is what matters."),
        (-30, -60, "More trajectories do harm, although having them in context helps: cleared contexts lose more."),
        (-30, 0, "More trajectories do harm, and having them in context is part of it: cleared contexts lose less."),
        (-30, -30, "More trajectories do harm, and there is no evidence that having them in context is"),
        (0, -30, "no evidence that the number of trajectories matters, but having them in context helps: cleared"),
        (0, 30, "no evidence that the number of trajectories matters, but having them in context does harm: cl"),
        (0, 0, "no evidence that the number of trajectories matters, and there is no evidence that having"),
    ],
)  # fmt: skip
def test_what_is_said_of_context_goes_with_what_is_said_of_all(
    store_path, tmp_path, stubs, kept, cleared, claim
):
    config = grid_of(store_path, tmp_path, axes={COUNT: (1, 2), SEED: (0, 1, 2)}, linked=(), controls=())
    cells, folder = expand(config), GridFolder.of(config)
    for cell in cells:
        training = dataclasses.asdict(cell.train)
        record = stubs.made_up(training, {"config": dataclasses.asdict(cell.evaluate)})
        for name, shift in (("chain", kept), ("memoryless", cleared)):
            if name in record["logs"]:
                log = records.log_from_json(record["logs"][name])
                # By seed up or down, so that no interval is of no width.
                noise = 0.5 * (-1) ** cell.train.seed * (1 if name == "chain" else -1)
                level = 40.0 + noise + shift * (log.returns.shape[1] > 1)
                log = dataclasses.replace(log, returns=np.full(log.returns.shape, level))
                record["logs"][name] = records.log_to_json(log)
        folder.write_result(cell.address, {"record": record, "costs": stubs.COSTS})
    groups, axes = read_groups(config, cells, folder), axes_of(config)
    assert claim in words(verdict(groups, list(axes.values())))


def test_the_page_with_controls_is_drawn_without_complaint_or_request(drawn_plots, result):
    # Of each task two over the number of trajectories, one of curves and of costs, and two of each of both controlled.
    plots = drawn_plots(result[1].folder.page_path, 390)
    assert len(plots) == 2 * (2 + 1 + 1 + 4)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({COUNT: (8,), ORDER: ("shuffled",)}, r"got train\.data\.num_trajectories 8, whose axis has 1, 4, 2\. Add"),
        ({COUNT: (4,)}, r"must change a setting that is on no axis; got train\.data\.num_trajectories\. Name"),
        ({}, "on no axis; got none at all"),
        ({ORDER: ()}, r"An axis needs a value.*got 0 of train\.data\.order"),
        ({ORDER: ("shuffled", "shuffled")}, r"must not repeat a value; got train\.data\.order"),
        ({"train.data.oder": ("shuffled",)}, r"got 'train\.data\.oder'\. Nearest valid one: 'train\.data\.order'"),
    ],
)  # fmt: skip
def test_what_is_no_control_is_refused(store_path, tmp_path, control, message):
    with pytest.raises(ValueError, match=message):
        expand(grid_of(store_path, tmp_path, controls=(control,)))
