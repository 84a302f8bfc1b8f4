"""The page and the tables of a grid: made-up returns (`benchmarks/stub_cells.py`), real intervals."""

import csv
import dataclasses
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bpt_rl.ablate_config import GridConfig
from bpt_rl.config import DataConfig, TrainConfig
from bpt_rl.run import protocols, statistics
from bpt_rl.run.ablate import ablate, report
from bpt_rl.run.ablation_contrast import contrast, per_doubling
from bpt_rl.run.ablation_groups import COUNT, axes_of, families, read_groups
from bpt_rl.run.launchers import InlineLauncher

STUBS = Path(__file__).resolve().parents[2] / "benchmarks" / "stub_cells.py"


@pytest.fixture(scope="module")
def stubs():
    spec = importlib.util.spec_from_file_location("stub_cells", STUBS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grid_of(store_path, out, **changes):
    data = DataConfig(store=str(store_path), task="cartpole_balance", batch_size=2)
    axes = {
        "train.data.task": ("cartpole_balance", "cartpole_swingup"),
        "train.data.draw": ("uniform", "return_stratified"),
        "train.data.num_trajectories": (1, 2, 4),
        "train.seed": (0, 1, 2),
    }
    return GridConfig(**({"out": str(out), "axes": axes, "train": TrainConfig(data=data)} | changes))


@pytest.fixture(scope="module")
def result(store_path, tmp_path_factory, stubs):
    config = grid_of(store_path, tmp_path_factory.mktemp("grid"))
    return config, ablate(config, lambda jobs: InlineLauncher(stubs.play), command="bpt-rl ablate it")


@pytest.fixture(scope="module")
def text(result):
    return result[1].folder.page_path.read_text()


@pytest.fixture(scope="module")
def rows(result):
    with result[1].folder.table_path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def groups(result):
    config, found = result
    return read_groups(config, found.cells, found.folder)


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))


def test_the_table_has_every_number_of_every_cell_in_the_order_of_the_grid(result, rows):
    _, found = result
    assert list(dict.fromkeys(row["address"] for row in rows)) == [cell.address for cell in found.cells]
    cell = next(c for c in found.cells if c.train.data.num_trajectories == 4 and c.train.seed == 2)
    record = found.folder.result(cell.address)["record"]
    own = {(r["rolled_out"], r["protocol"], r["episode"]): r for r in rows if r["address"] == cell.address}
    for context, log in record["logs"].items():
        returns = np.array(log["returns"])
        expected = {"first": returns[:, 0], "last": returns[:, -1], "max": returns.max(axis=1)}
        for name, values in expected.items():
            row = own[context, name, ""]
            assert float(row["value"]) == pytest.approx(values.mean())
            assert float(row["low"]) < float(row["value"]) < float(row["high"])
        for episode in range(4):
            row = own[context, "episode", str(episode + 1)]
            assert float(row["value"]) == pytest.approx(returns[:, episode].mean())
    assert ("memoryless", "null_max", "") in own
    assert {row["train.data.draw"] for row in rows} == {"uniform", "return_stratified"}
    assert "second" not in " ".join(rows[0])
    with found.folder.costs_path.open() as file:
        costs = list(csv.DictReader(file))
    assert [cost["address"] for cost in costs] == [cell.address for cell in found.cells]
    assert {cost["training_seconds"] for cost in costs} == {"1.5"}


def test_the_context_accounts_for_the_gain_beyond_that_of_the_controls(groups):
    # Chains gain 10 an episode, their controls nothing: all of the gain comes from the context.
    fewest, some, most = (group.group for group in families(groups)[0])
    found = contrast(most, fewest)
    assert found.protocol == "last"

    def level(group, context):
        return np.array([log.returns[:, -1].mean() for log in group.logs(context)])

    gain = level(most, "chain") - level(fewest, "chain")
    by_context = level(most, "chain") - level(most, "memoryless")
    for number, samples in ((found.gain, gain), (found.by_context, by_context)):
        assert number.value == pytest.approx(samples.mean())
        assert (number.low, number.high) == pytest.approx(statistics.t_interval(statistics.moment(samples)))
    assert found.control.value == pytest.approx((gain - by_context).mean())
    assert found.by_context.low > 25 > abs(found.control.value)
    # Of two that both keep a context, what the base's brings counts too.
    less = level(some, "chain") - level(some, "memoryless")
    assert contrast(most, some).by_context.value == pytest.approx((by_context - less).mean())


def test_of_one_seed_chains_are_the_sample(groups):
    fewest, _, most = (dataclasses.replace(g.group, runs=g.group.runs[:1]) for g in families(groups)[0])
    found = contrast(most, fewest)
    kept, cleared = (most.logs(name)[0].returns[:, -1] for name in ("chain", "memoryless"))
    expected = statistics.less(statistics.moment(kept), statistics.moment(cleared))
    assert found.by_context.value == pytest.approx(expected.value)
    assert (found.by_context.low, found.by_context.high) == pytest.approx(statistics.t_interval(expected))
    assert found.gain.interval == "chains"
    assert contrast(fewest, most).by_context.value == pytest.approx(-expected.value)
    assert contrast(fewest, fewest).by_context.value == 0


def test_a_doubling_brings_the_slope_of_a_line_through_all_counts(groups):
    counts = (1, 2, 8)  # Not evenly apart, so that the middle one counts.
    some = [group.group for group in families(groups)[0]]
    found = per_doubling(some, counts)

    def slopes(contexts):
        levels = [
            [log.returns[:, -1].mean() for log in group.logs(context)]
            for group, context in zip(some, contexts, strict=True)
        ]
        return np.polyfit(np.log2(counts), np.array(levels), 1)[0]

    # An episode alone in its context has nothing to forget.
    kept, without = slopes(["chain"] * 3), slopes(["chain", "memoryless", "memoryless"])
    for number, samples in (
        (found.gain, kept),
        (found.control, without),
        (found.by_context, kept - without),
    ):
        assert number.value == pytest.approx(samples.mean())
        assert (number.low, number.high) == pytest.approx(statistics.t_interval(statistics.moment(samples)))
    assert (found.gain.low > 0, found.gain.interval) == (True, "seeds")


def test_of_one_seed_a_doubling_is_told_by_chains(groups):
    counts = (1, 2, 4)
    some = [dataclasses.replace(group.group, runs=group.group.runs[:1]) for group in families(groups)[0]]
    found = per_doubling(some, counts)
    # Of three counts, each twice the one before, the middle one weighs nothing.
    ends = contrast(some[2], some[0])
    for number, whole in ((found.gain, ends.gain), (found.by_context, ends.by_context)):
        assert number.value == pytest.approx(whole.value / 2)
        assert (number.low, number.high) == pytest.approx((whole.low / 2, whole.high / 2))
        assert number.interval == "chains"
    # Where seeds are unequally many, groups are independent samples: the same line, another interval.
    uneven = [some[0], *(group.group for group in families(groups)[0][1:])]
    whole = contrast(uneven[2], uneven[0]).gain
    assert per_doubling(uneven, counts).gain.value == pytest.approx(whole.value / 2)
    assert per_doubling(uneven, counts).gain.high == pytest.approx(whole.high / 2)


def test_the_verdict_is_in_plain_words_and_follows_the_intervals(text, groups):
    verdict = words(text.split('<div class="verdict">')[1].split("</div>")[0])
    assert verdict.count("4 trajectories against 1: last +") == 4
    assert "On cartpole_balance, Agentic Transformer (draw uniform), 4 trajectories against 1" in verdict
    found = contrast(*(group.group for group in families(groups)[0][::-2]))
    assert f"so keeping the context adds {found.by_context.text} more." in verdict
    assert (
        verdict.count("Going by these two, more trajectories help, and having them in context is part of it")
        == 4
    )
    trend = per_doubling([group.group for group in families(groups)[0]], (1, 2, 4))
    assert f"By least squares over all 3 counts, each doubling brings last {trend.gain.text};" in verdict
    assert (
        f"so keeping the context adds {trend.by_context.text} more. Going by all, more trajectories help"
        in verdict
    )
    # Cells that differ in how trajectories are drawn are made up alike.
    assert (
        len(re.findall(r"draw return_stratified against uniform: last \S+ \[\S+ \S+\], no telling", verdict))
        == 2
    )
    bounds = re.findall(r"\[([+−]?[\d.]+), ([+−]?[\d.]+)\]", verdict)  # noqa: RUF001
    # Cells that are made up alike differ by nothing at all.
    intervals = [(low, high) for low, high in bounds if low != high]
    assert (len(bounds), len(intervals)) == (26, 24)
    decided = sum(low[0] == high[0] for low, high in intervals)
    assert 0 < decided < 24
    assert (
        "Each of the 24 intervals above is one of 95%: if nothing differed, 1.2 of them would be" in verdict
    )
    assert f"expected to leave zero out; {decided} do." in verdict


def test_the_page_shows_every_part_for_each_task(text):
    for task in ("cartpole_balance", "cartpole_swingup"):
        for heading in ("Returns", "How many trajectories", "Return within the context", "What it took"):
            assert f"<h2>{heading}: {task}</h2>" in text
        shown = text.split(f"<h2>How the axes act together: {task}</h2>")[1].split("</section>")[0]
        assert re.findall("<h3>(.*?)</h3>", shown) == ["Trajectories and draw"]
    # Two plots over the number of trajectories and one of curves for both ways to draw, an interaction, a cost plot.
    assert text.count("<svg") == 2 * (2 * 3 + 1 + 1)
    assert "Cells that are not finished" not in text
    assert set(re.findall(r'href="#(repeat-\d+)"', text)) == set(re.findall(r'id="(repeat-\d+)"', text))
    assert "<pre>bpt-rl ablate it</pre>" in text


def test_the_link_of_a_group_leads_to_its_runs_in_whatever_order_tasks_come(store_path, tmp_path, stubs):
    tasks = ("cartpole_balance", "cartpole_swingup")
    axes = {"train.data.num_trajectories": (1, 2), "train.data.task": tasks}
    found = ablate(
        grid_of(store_path, tmp_path, axes=axes), lambda jobs: InlineLauncher(stubs.play)
    ).folder.page_path.read_text()
    groups = re.findall(r'<span>(Agentic[^<]*)<small>[^<]*<a href="#(repeat-\d+)"', found)
    own = [re.search(rf'id="{anchor}">([^<]*)<', found)[1] for _, anchor in groups]
    titles = [f"Agentic Transformer, {words}" for words in ("1 trajectory", "2 trajectories")]
    assert own == [f"{task}, {title}" for task in tasks for title in titles]
    assert [title for title, _ in groups] == 2 * titles


def test_interaction_points_are_means_over_seeds(text, groups):
    shown = text.split("<h2>How the axes act together: cartpole_balance</h2>")[1]
    alt = re.search(r'aria-label="(Return against trajectories[^"]*)"', shown)[1]
    group = next(g for g in groups if g.values[COUNT] == 4)
    expected = protocols.estimate("last", group.group.logs("chain"))
    assert f"{expected.value:.1f} [{expected.low:.1f}, {expected.high:.1f}] at 4" in alt


@pytest.mark.parametrize(
    ("longest", "ticks"),
    [(16, ["3", "6", "9", "12", "15"]), (20, ["1", "2", "4", "8", "16"])],
)
def test_contexts_of_many_episodes_are_drawn_over_powers_of_two(store_path, tmp_path, stubs, longest, ticks):
    axes = {"train.data.num_trajectories": (2, longest)}
    found = ablate(grid_of(store_path, tmp_path, axes=axes), lambda jobs: InlineLauncher(stubs.play))
    section = found.folder.page_path.read_text().split("<h2>Return within the context")[1]
    svg = section.split("</svg>")[0]
    groups = re.findall(r'<g id="[^"]*-xtick_\d+">.*?<text[^>]*>([^<]*)</text>', svg, flags=re.DOTALL)
    assert groups == ticks


def test_linked_settings_are_one_axis_named_by_what_counts(store_path):
    linked = ({"evaluate.seed": (1, 2), "train.data.task": ("cartpole_balance", "cartpole_swingup")},)
    config = GridConfig(linked=linked, axes={"train.seed": (0, 1)})
    assert list(axes_of(config)) == ["train.data.task", "train.seed"]


def test_of_a_mixture_the_episodes_played_are_the_number_of_trajectories(store_path, tmp_path, stubs):
    data = DataConfig(store=str(store_path), task="cartpole_balance", batch_size=2, mixture=(1, 2, 4))
    axes = {"evaluate.num_episodes": (1, 2, 4), "train.seed": (0, 1)}
    axes["train.agent"] = ("at", "dt")
    config = GridConfig(out=str(tmp_path), axes=axes, train=TrainConfig(data=data))
    found = ablate(config, lambda jobs: InlineLauncher(stubs.play))
    assert len(found.run_folders) == 4
    # A Decision Transformer has nothing of its earlier episodes.
    [family] = families(read_groups(config, found.cells, found.folder))
    assert [group.group.evaluation["num_episodes"] for group in family] == [1, 2, 4]
    titles = [group.group.title for group in family]
    assert titles[0] == "Agentic Transformer, 4 trajectories, 1 episode"
    shown = words(found.folder.page_path.read_text())
    assert "On cartpole_balance, Agentic Transformer, 4 trajectories against 1: last +" in shown


def test_a_page_of_a_grid_that_is_not_finished_says_what_is_missing_and_compares_what_is_whole(
    store_path, tmp_path, stubs
):
    counts, seeds = (1, 2, 4, 8), (0, 1, 2)
    axes = {"train.data.num_trajectories": counts, "train.seed": seeds}
    config = grid_of(store_path, tmp_path, axes=axes)
    whole = ablate(config, lambda jobs: InlineLauncher(stubs.play))
    cells = {(c.train.data.num_trajectories, c.train.seed): c for c in whole.cells}
    before = whole.folder.page_path.read_text()
    # 2 lacks one seed, 8 lacks two and 4 none: as if someone had stopped it.
    for key in ((2, 0), (8, 1), (8, 2)):
        (tmp_path / "results" / f"{cells[key].address}.json").unlink()
    found = report(config, command="bpt-rl ablate it --report-only")
    assert (found.num_finished, found.failures) == (9, ())
    page = words(found.folder.page_path.read_text())
    assert "9 of 12 cells finished. 2 of 4 settings have all seeds." in page
    assert "3 cells of 12 missing" in page
    table = found.folder.page_path.read_text().split("<h2>Cells that are not finished</h2>")[1]
    rows = re.findall(
        r"<th scope=\"row\">(.*?)</th><td>(.*?)</td><td>(.*?)</td>", table.split("</section>")[0]
    )
    assert rows == [
        ("trajectories 2", "2 of 3", "not run yet"),
        ("trajectories 8", "1 of 3", "not run yet"),
    ]
    # The most against the fewest of those that have all seeds.
    verdict = page.split("Not compared, since seeds are missing:")
    assert "4 trajectories against 1: last +" in verdict[0]
    assert "8 trajectories" not in verdict[0]
    assert "Agentic Transformer, 2 trajectories (2 of 3 seeds)" in verdict[1]
    assert "Agentic Transformer, 8 trajectories (1 of 3 seeds)" in verdict[1]
    lines = found.folder.table_path.read_text().splitlines()
    addresses = {row["address"] for row in csv.DictReader(lines)}
    assert addresses == {cell.address for key, cell in cells.items() if key not in ((2, 0), (8, 1), (8, 2))}
    # The grid goes on, and ends with the page of one that was never interrupted.
    ablate(config, lambda jobs: InlineLauncher(stubs.play))
    assert found.folder.page_path.read_text() == before
    # A finished grid writes its page anew where that of another grid lies.
    report(dataclasses.replace(config, axes={**axes, "train.data.num_trajectories": (1, 8)}))
    assert found.folder.page_path.read_text() != before
    ablate(config, lambda jobs: InlineLauncher(stubs.play))
    assert found.folder.page_path.read_text() == before


def test_a_page_is_made_of_results_alone_but_no_cell_runs_without_its_store(
    store_path, tmp_path, stubs, caplog
):
    store = tmp_path / "store.h5"
    shutil.copy(store_path, store)
    axes = {"train.data.num_trajectories": (1, 2), "train.seed": (0, 1)}
    config = grid_of(store, tmp_path / "grid", axes=axes)
    whole = ablate(config, lambda jobs: InlineLauncher(stubs.play))
    before = {name: getattr(whole.folder, name).read_bytes() for name in ("page_path", "table_path")}
    store.unlink()
    assert report(config).num_finished == 4
    assert re.search(
        r"No store is at .*store\.h5: cells of cartpole_balance are those of the store [0-9a-f]{8}",
        caplog.text,
    )
    assert {name: getattr(whole.folder, name).read_bytes() for name in before} == before
    with pytest.raises(FileNotFoundError, match="A store must be a file"):
        ablate(config, lambda jobs: InlineLauncher(stubs.play))
    # A task of which nothing is finished, and one with cells of two stores.
    swingup = dataclasses.replace(config.train.data, task="cartpole_swingup")
    other = dataclasses.replace(config, train=TrainConfig(data=swingup))
    with pytest.raises(FileNotFoundError, match="A store must be a file"):
        report(other)
    result = whole.folder.result(whole.cells[0].address)
    result["record"]["data"]["digest"] = "0" * 64
    whole.folder.write_result("another", result)
    with pytest.raises(
        ValueError, match=r"must share one; got 00000000, .* for cartpole_balance and none at"
    ):
        report(config)


def test_without_any_whole_setting_nothing_is_compared(store_path, tmp_path, stubs):
    axes = {"train.data.num_trajectories": (1, 2), "train.seed": (0, 1)}
    config = grid_of(store_path, tmp_path, axes=axes)
    with pytest.raises(FileNotFoundError, match="made of finished cells; got none of 4"):
        report(config)
    for cell in ablate(config, lambda jobs: InlineLauncher(stubs.play)).cells:
        if cell.train.seed == 1:
            (tmp_path / "results" / f"{cell.address}.json").unlink()
    page = words(report(config).folder.page_path.read_text())
    assert "No two settings of this grid that could be compared have all their seeds yet" in page
    assert "against" not in page.split("Not compared")[0]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_drawn_without_complaint_or_request(drawn_plots, result, width):
    page = result[1].folder.page_path
    plots = drawn_plots(page, width)
    assert len(plots) == 16
    for box_width, box_height, num_texts, num_lines in plots:
        assert box_width > 250 and box_height > 150 and num_texts > 4 and num_lines >= 2
