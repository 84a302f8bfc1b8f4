"""One page that compares runs: what its bytes hold, and what a browser makes of them."""

import base64
import dataclasses
import json
import os
import re

import numpy as np
import pytest

from bpt_rl.run import report_groups, report_page, report_seeds, report_tables, report_verdict, statistics
from bpt_rl.run.report import write_report
from bpt_rl.types import EpisodeFailure

GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
FAILURE = EpisodeFailure(chain=1, episode=0, step=412, reason="the state is not finite")
RUNS = [("dt", 0), ("dt", 1), ("dt", 2), ("at", 0), ("at", 1), ("at", 2), ("bc", 0)]


def write_one(root, write_run, evaluated_log, agent, seed):
    generator = np.random.default_rng([seed, len(agent), ord(agent[0])])
    chain = generator.normal(40 if agent == "at" else 30, 3, (4, 2)) + seed
    random = [[10.0, 11.0], [12.0, 9.0], [10.0, 8.0], [9.0, 11.0]]
    logs = {"chain": chain.tolist(), "random": random}
    if agent == "at":
        logs["memoryless"] = (chain - 5).tolist()
    targets = () if agent == "bc" else (90.0, 30.0, 60.0)
    return write_run(
        root,
        f"{agent}_{seed}",
        agent=agent,
        seed=seed,
        logs=logs,
        failures=[FAILURE] if (agent, seed) == ("at", 1) else (),
        context={
            "num_trajectories": 2 * (agent == "at"),
            "order": "ascending",
            "capacity": 4,
            "overflow": "refuse",
        },
        sweep=[
            {
                "target_return": t,
                "target_multiple": t / 60,
                "log": evaluated_log(
                    [[t / 2], [t / 2 + seed]],
                    "chain",
                    failures=[FAILURE] if (agent, t, seed) == ("dt", 60, 2) else (),
                ),
            }
            for t in targets
        ],
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory, write_run, evaluated_log):
    """Three seeds of two agents and one of a third; targets tried, an episode failed, films of two runs."""
    root = tmp_path_factory.mktemp("runs")
    found = [write_one(root, write_run, evaluated_log, agent, seed) for agent, seed in RUNS]
    for name in ("step_last.gif", "step_first.gif"):
        (found[3] / "evaluations" / name).write_bytes(GIF)
    (found[3] / "evaluations" / "earlier_first.gif").write_bytes(GIF)
    for path in (found[1], found[4]):
        (path / "evaluations" / "step_first.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    return found


@pytest.fixture(scope="module")
def page(paths):
    return write_report(paths, paths[0].parent / "report.html")


@pytest.fixture(scope="module")
def text(page):
    return page.read_text()


@pytest.fixture(scope="module")
def groups(paths):
    """By agent."""
    return {group.config.agent: group for group in report_groups.group_runs(report_groups.read_runs(paths))}


def section(text, heading):
    return text.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]


def numbers(html):
    """Protocol, value and label of each number."""
    found = re.findall(r'title="([^"]*)" data-protocol="([^"]*)" data-value="([^"]*)"', html)
    return {protocol: (float(value), label) for label, protocol, value in found}


def test_seeds_are_compared_by_interquartile_mean_and_probability_of_improvement(text, groups):
    found = numbers(section(text, "Seeds against seeds"))
    ours, theirs = report_seeds.scores(groups["at"]), report_seeds.scores(groups["dt"])
    np.testing.assert_allclose(ours[:, 0], [log.returns[:, -1].mean() for log in groups["at"].logs("chain")])
    np.testing.assert_allclose(theirs[:, 0], [log.returns.mean() for log in groups["dt"].logs("chain")])
    middle, label = found["interquartile mean over seeds of last"]
    assert middle == statistics.interquartile_mean(ours)
    assert "3 training seeds; 95% bootstrap interval over seeds; 1 episode ended by the simulator" in label
    above, label = found["probability of improvement, last, over DT n=2 (mean, 3 seeds)"]
    assert above == statistics.probability_of_improvement(ours, theirs)[0]
    assert label.endswith("95% score interval over pairs of seeds; 1 episode ended by the simulator")
    (normalised,) = (
        value
        for name, (value, _) in found.items()
        if name.startswith("interquartile mean over seeds of last, n")
    )
    random = report_verdict.number(groups["at"], "mean", "random").value
    assert normalised == pytest.approx((middle - random) / (60 - random))
    scales = re.findall(r"of (\w+), normalised \((.*?)\)", section(text, "Seeds against seeds"))
    assert {name for name, _ in scales} == {"last", "mean"} and len({scale for _, scale in scales}) == 1
    assert "Behaviour cloning" not in section(text, "Seeds against seeds")


def test_two_seeds_are_not_compared(groups):
    short = report_groups.Group(groups["at"].runs[:2])
    assert report_seeds.seeds([groups["dt"], short]) == ""


def test_failed_episodes_are_listed_and_stand_beside_the_numbers_that_hold_them(text, groups):
    listed = section(text, "Episodes that the simulator ended")
    assert "2 episodes did not reach the end" in listed
    cells = re.findall(r"<td>(.*?)</td>", listed)
    ended = ["2", "1", "412", "the state is not finite"]
    assert cells == ["chain", *ended, "target 60.0", *ended]
    found = numbers(section(text, "Returns"))
    assert "1 episode ended by the simulator" in found["last, context kept"][1]
    assert "ended" not in found["last, memoryless control"][1]
    assert "1 episode ended by the simulator" in report_verdict.checks(groups["at"])[2].margin.label
    assert groups["dt"].failures("chain") == []


def test_calibration_shows_what_each_target_brought(text):
    shown = section(text, "Return asked for, return obtained")
    # Two chains of t / 2 and t / 2 + seed, in each of the seeds 0, 1, 2: means t / 2 + 0, 0.5 and 1.
    assert (
        shown.count("asked 30.0, got 15.5 [14.3, 16.7]; asked 60.0, got 30.5 [29.3, 31.7]; asked 90.0, got")
        == 2
    )
    assert shown.count("1 episode a chain, 2 chains, 3 seeds, subset first-5") == 2
    assert shown.count("subset first-5; 1 episode ended by the simulator") == 1
    curves = section(text, "Return within the context")
    assert curves.count("4 chains, 3 seeds, subset first-5; 1 episode ended by the simulator") == 1
    assert "returns of the data, 5.00 to 60.0" in shown


def test_context_shown_is_named_and_tells_experiments_apart(text, groups, paths):
    assert text.count("shown 2 trajectories of the data, ascending") == 1
    assert groups["dt"].shown == ""
    one, other = (report_groups.read_run(paths[i]) for i in (3, 4))
    other.evaluation["context"]["order"] = "best"
    notes = [group.note for group in report_groups.group_runs([one, other])]
    assert notes == ["order ascending", "order best"]


def test_only_what_differs_between_runs_is_shown(text, paths):
    shown = section(text, "What differs between the runs")
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', shown)
    values = {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in rows}
    assert values == {
        "agent": ["dt"] * 3 + ["at"] * 3 + ["bc"],
        "evaluation.context.num_trajectories": ["0"] * 3 + ["2"] * 3 + ["0"],
        "seed": ["0", "1", "2", "0", "1", "2", "0"],
    }
    assert "What differs" not in write_report(paths[:1], paths[0].parent / "one.html").read_text()


def test_latest_evaluation_is_the_one_made_last_though_files_are_copied(tmp_path, write_run):
    path = write_run(tmp_path, "at", timings={"created": "2026-01-01T10:00:00+00:00"})
    folder = report_groups.RunFolder(path)
    later = folder.evaluations()[0] | {"step": 700, "timings": {"created": "2026-01-02T09:00:00+00:00"}}
    (path / "evaluations" / "later.json").write_text(json.dumps(later))
    os.utime(path / "evaluations" / "later.json", ns=(1, 1))
    assert report_groups.read_run(path).evaluation["step"] == 700
    for name in ("step_first.gif", "later_first.gif"):
        (path / "evaluations" / name).write_bytes(GIF)
    groups = report_groups.group_runs(report_groups.read_runs([path]))
    assert re.findall(r"\((\w+_first\.gif)\)", report_page.films(groups)) == ["later_first.gif"]


def test_versions_have_a_column_for_each_set_of_them(text, paths):
    assert re.findall(r'<th scope="col">(.*?)</th>', section(text, "Versions")) == [
        "Package",
        "trained: all runs; evaluated: all runs",
    ]
    runs = report_groups.read_runs(paths[:3])
    other = dataclasses.replace(
        runs[0], versions={**runs[0].versions, "python": "3.13.0", "data": {"bytes": 5}}
    )
    table = report_tables.versions([other, *runs[1:]])
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == [
        "Package",
        "trained: dt_0",
        "evaluated: all runs; trained: dt_1, dt_2",
    ]
    assert '<th scope="row">python</th><td>3.13.0</td><td>3.11.7</td>' in table
    assert "bytes" not in table


def test_films_of_one_run_of_each_agent_stand_side_by_side(text):
    shown = section(text, "Episodes on film")
    pairs = re.findall(r'<div class="pair">(.*?)</div>', shown)
    assert [re.findall(r"\((step_\w+\.\w+)\)", pair) for pair in pairs] == [
        ["step_first.gif", "step_last.gif"],
        ["step_first.mp4"],
    ]
    assert f"data:image/gif;base64,{base64.b64encode(GIF).decode()}" in pairs[0]
    assert (
        '<video aria-label="First episode of a chain, played by dt_1" src="data:video/mp4;base64,' in pairs[1]
    )


def test_every_group_leads_to_the_commands_of_its_numbers(text):
    links = re.findall(r'href="#(repeat-\d)"', text)
    commands = [re.search(rf'<h3 id="{link}">(.*?)</h3><pre>(.*?)</pre>', text, re.DOTALL) for link in links]
    assert [found[1].split(",")[0] for found in commands] == [
        "Agentic Transformer",
        "Decision Transformer",
        "Behaviour cloning",
    ]
    assert [f"bpt-rl evaluate at_{seed}" in commands[0][2] for seed in range(3)] == [True] * 3
    assert "dt_0" not in commands[0][2]


def test_browser_sees_requests_and_errors_where_there_are_some(browser, page):
    bad = page.with_name("bad.html")
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no"); undefined_name</script>')
    browser.open(bad.as_uri(), width=800, height=600)
    assert browser.requests() == [bad.as_uri(), "http://127.0.0.1:9/x.png"]
    assert len(browser.complaints()) >= 2


@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_drawn_without_complaint_or_request(drawn_plots, browser, page, width):
    plots = drawn_plots(page, width)
    # Three curves within the context, two calibrations, histogram and loss.
    assert len(plots) == 7
    for box_width, box_height, num_texts, num_lines in plots:
        assert box_width > 250 and box_height > 150 and num_texts > 5 and num_lines >= 3
    assert browser.run("[...document.querySelectorAll('img')].every((image) => image.naturalWidth > 0)")
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if width == 390 else "rgb(252, 252, 250)")


def order(browser):
    """Names of the table of returns, from above."""
    return browser.run(
        "[...document.querySelectorAll('.results tbody')].map((b) => b.rows[0].innerText.split(/,|\\n/)[0])"
    )


def test_tables_sort_by_mouse_and_by_key(browser, page):
    browser.open(page.as_uri(), width=1280, height=900)
    at, dt, bc, random, data = order(browser)
    assert (at, dt, bc, random, data) == (
        "Agentic Transformer",
        "Decision Transformer",
        "Behaviour cloning",
        "Random policy",
        "Training data",
    )
    rows = browser.run("document.querySelectorAll('.results tbody')[0].rows.length")
    browser.click(".results thead th:nth-child(2) button")
    means = browser.run(
        "[...document.querySelectorAll('.results tbody')].map((b) =>"
        " +[...b.rows].find((r) => r.cells.length > 1).cells[1].querySelector('[data-value]').dataset.value)"
    )
    assert means == sorted(means, reverse=True) and len(set(means)) == 5
    assert order(browser)[0] == at
    # A group's rows stay together.
    assert browser.run("document.querySelectorAll('.results tbody')[0].rows.length") == rows == 3
    heads = "[...document.querySelectorAll('.results th[aria-sort]')].map((h) => h.cellIndex + h.ariaSort)"
    assert browser.run(heads) == ["1descending"]
    browser.press("Enter")
    assert browser.run(heads) == ["1ascending"] and order(browser)[-1] == at
    browser.press("Tab")
    browser.press("Enter")
    assert browser.run(heads) == ["2descending"]
    # What has no first episode comes last, whichever the direction.
    assert order(browser)[-1] == data
    browser.press("Enter")
    assert order(browser)[0] == random and order(browser)[-1] == data


def test_cells_without_a_number_come_last(browser, page):
    browser.open(page.as_uri(), width=1280, height=900)
    names = "[...document.querySelectorAll('.seeds tbody tr')].map((r) => r.cells[0].innerText.split(',')[0])"
    assert browser.run(names) == ["Agentic Transformer", "Decision Transformer"]
    # How often a seed scores above one of the Agentic Transformer, which has no such number itself.
    browser.click(".seeds thead th:nth-child(4) button")
    assert browser.run(names) == ["Decision Transformer", "Agentic Transformer"]
    browser.press("Enter")
    assert browser.run(names) == ["Decision Transformer", "Agentic Transformer"]


def test_rows_of_text_and_of_counts_sort_too(browser, page):
    browser.open(page.as_uri(), width=1280, height=900)
    names = "[...document.querySelectorAll('.differences tbody tr')].map((r) => r.cells[0].innerText)"
    before = browser.run(names)
    browser.click(".differences thead th:nth-child(1) button")
    assert browser.run(names) == sorted(before)
    browser.press("Enter")
    assert browser.run(names) == sorted(before, reverse=True)
