import base64
import html.parser
import itertools
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from bpt_rl.run import protocols, records, report_groups, report_page, report_verdict
from bpt_rl.run.report import write_report

CHAIN = [[30.0, 50.0], [34.0, 46.0], [32.0, 54.0]]
MEMORYLESS = [[30.0, 32.0], [34.0, 31.0], [32.0, 33.0]]
RANDOM = [[10.0, 11.0], [12.0, 9.0], [10.0, 8.0]]
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.numbers, self.words, self.ids, self.urls, self.labels, self.tags = (
            [] for _ in range(7)
        )
        self.feed(text)
        self.close()
        assert self.stack == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in VOID:
            self.stack.append(tag)
        self.record(tag, values)

    def handle_startendtag(self, tag, attributes):
        self.record(tag, dict(attributes))

    def record(self, tag, values):
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.urls += [values[name] for name in ("src", "href", "xlink:href", "data") if name in values]
        if "data-protocol" in values:
            self.numbers.append((values["data-protocol"], float(values["data-value"]), values["title"]))
        if tag in ("svg", "img"):
            self.labels.append(values.get("aria-label") or values.get("alt"))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.words.append(data)


def make_page(paths, out):
    return Page(write_report(paths, out).read_text())


@pytest.fixture
def single(tmp_path, write_run):
    return write_run(tmp_path, "at_seed0")


@pytest.fixture(scope="module")
def text(tmp_path_factory, write_run):
    """The report of one run, with a film."""
    path = write_run(tmp_path_factory.mktemp("one"), "at_seed0")
    (path / "evaluations" / "episode.gif").write_bytes(b"GIF89a-not-really")
    return write_report([path], path / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_report_shows_every_number_of_the_table(page):
    found = {protocol: value for protocol, value, _ in page.numbers}
    expected = {
        "mean, context kept": 41.0,
        "first, context kept": 32.0,
        "last, context kept": 50.0,
        "max, context kept": 50.0,
        "improvement, context kept": 18.0,
        "slope, context kept": 18.0,
        "mean, memoryless control": 32.0,
        "max, memoryless control": 33.0,
        "mean, random policy": 10.0,
        "data mean": 24.0,
        "data best": 60.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    luck = [30.0, 31.0, 32.0, 32.0, 33.0, 34.0]
    every = [max(pair) for pair in itertools.combinations(luck, 2)]
    assert found["null max of 2, memoryless control"] == pytest.approx(np.mean(every))


def test_every_number_carries_its_label(page):
    labels = {protocol: label for protocol, _, label in page.numbers}
    assert labels["last, context kept"] == (
        "last, context kept; subset first-5; 2 episodes a chain, 3 chains; 1 training seed; "
        "95% t interval over chains"
    )
    assert labels["data best"] == "data best; subset first-5; 5 episodes; exact for the subset, no interval"
    assert "no training" in labels["mean, random policy"]
    assert labels["null max of 2, memoryless control"].endswith("over episodes")


def test_verdict_says_what_the_intervals_say(page):
    text = page.text
    assert "On walker_run , Agentic Transformer (2 trajectories) returns 50.0" in text
    assert "in the last of 2 episodes of one context, and 41.0 [36.7, 45.3] averaged over them" in text
    assert "It beats the random policy twice over: 50.0" in text
    assert "It beats the mean of the data it learnt from: 50.0" in text
    assert "Earlier episodes in context help:" in text and "a difference of +18.0" in text
    assert "The largest return of a chain is more than luck:" in text


def test_verdict_does_not_claim_what_the_memoryless_control_does_as_well(tmp_path, write_run):
    same = {
        "chain": [[20.0, 40.0], [40.0, 22.0], [30.0, 28.0]],
        "memoryless": [[38.0, 20.0], [22.0, 40.0], [31.0, 29.0]],
    }
    text = make_page([write_run(tmp_path, "at", logs=same)], tmp_path / "report.html").text
    assert "There is no evidence that earlier episodes in context help:" in text
    assert "no more than luck can explain" in text
    assert "It was not compared with random actions" in text
    assert "More than luck" not in text


def test_one_chain_is_reported_without_an_interval(tmp_path, write_run):
    path = write_run(tmp_path, "at", logs={"chain": [[30.0, 50.0]], "memoryless": [[30.0, 31.0]]})
    text = make_page([path], tmp_path / "report.html").text
    assert "40.0 (one sample, no interval)" in text
    assert "nan" not in text.lower()
    assert "It cannot be told from the mean of the data" in text


def test_one_episode_has_no_gain_to_report(tmp_path, write_run):
    logs = {"chain": [[30.0], [34.0]], "random": [[10.0], [12.0]]}
    page = make_page(
        [write_run(tmp_path, "dt", agent="dt", num_trajectories=1, logs=logs)], tmp_path / "report.html"
    )
    assert {protocol for protocol, _, _ in page.numbers} == {
        *(f"{name}, one episode in context" for name in ("mean", "first", "last", "max")),
        *(f"{name}, random policy" for name in ("mean", "first", "last", "max")),
        "null max of 1, memoryless control",
        "null max of 1, random policy",
        "data mean",
        "data best",
    }


def test_agent_without_memory_has_no_context_to_judge(tmp_path, write_run):
    path = write_run(tmp_path, "bc", agent="bc", num_trajectories=1, logs={"chain": CHAIN, "random": RANDOM})
    page = make_page([path], tmp_path / "report.html")
    found = {protocol: value for protocol, value, _ in page.numbers}
    assert found["mean, no context"] == 41.0
    assert found["null max of 2, memoryless control"] > 41.0
    assert "Does not apply" in page.text
    assert "Not measured" not in page.text


def test_seeds_of_one_experiment_are_grouped(tmp_path, write_run):
    higher = [[r + 20 for r in chain] for chain in CHAIN]
    paths = [
        write_run(tmp_path, "a", seed=0),
        write_run(tmp_path, "b", seed=1, logs={"chain": higher, "memoryless": MEMORYLESS, "random": RANDOM}),
    ]
    page = make_page(paths, tmp_path / "report.html")
    found = [(value, label) for protocol, value, label in page.numbers if protocol == "mean, context kept"]
    assert found == [
        (
            51.0,
            "mean, context kept; subset first-5; 2 episodes a chain, 3 chains; 2 training seeds; "
            "95% t interval over the means of seeds",
        )
    ]
    runs = report_groups.read_runs(paths)
    (group,) = report_groups.group_runs(runs)
    assert len(group.logs("chain")) == 2
    # Random actions were the same in both: one sample, not two.
    assert len(group.logs("random")) == 1
    single = protocols.mean(records.log_from_json(runs[0].evaluation["logs"]["random"]))
    random = report_verdict.number(group, "mean", "random")
    assert (random.low, random.high) == (single.low, single.high)


@pytest.mark.parametrize(("changes", "is_said"), [({}, False), ({"environment_seed": 7}, True)])
def test_start_states_that_seeds_share_are_said_to_be_a_smaller_sample(tmp_path, write_run, changes, is_said):
    paths = [write_run(tmp_path, f"seed{seed}", seed=seed, **changes) for seed in (0, 1)]
    for some, said in ((paths, is_said), (paths[:1], False)):
        text = write_report(some, tmp_path / "report.html").read_text()
        assert ("Training seeds were played from the same start states" in text) == said


def test_other_settings_make_another_group_and_are_named(tmp_path, write_run):
    paths = [write_run(tmp_path, "a"), write_run(tmp_path, "b", target_rule="0.9 quantile")]
    groups = report_groups.group_runs(report_groups.read_runs(paths))
    assert [g.note for g in groups] == ["target rule 0.9 quantile", "target rule largest return in the data"]


def test_page_is_well_formed_and_loads_nothing(text, page):
    assert "http://" not in text and "https://" not in text
    assert "@import" not in text and "url(http" not in text
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("script") == 1 and "<script>" in text
    assert "default-src 'none'" in text and "unsafe-eval" not in text
    assert all(url.startswith(("#", "data:")) for url in page.urls)
    assert len(page.ids) == len(set(page.ids))
    encoded = base64.b64encode(b"GIF89a-not-really").decode()
    assert f"data:image/gif;base64,{encoded}" in page.urls
    assert all(page.labels)


def test_plots_are_valid_svg_in_the_colours_of_the_page(text):
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) == 3  # episodes within the context, histogram, loss
    for svg in svgs:
        xml.etree.ElementTree.fromstring(svg.replace("xlink:href", "href"))
        used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert used - {"none"} <= {c for c in used if c.startswith("var(--")} | {"#ffffff"}
        assert all(f"{c[4:-1]}:" in text for c in used if c.startswith("var("))
    labels = Page(text).labels
    assert any("context kept goes from 32.0 [27.0, 37.0] to 50.0 [40.1, 59.9]" in label for label in labels)
    assert any("from 5.00 to 60.0" in label for label in labels)


def test_ablation_appears_only_with_two_trajectory_counts(tmp_path, write_run):
    paths = [write_run(tmp_path, "a"), write_run(tmp_path, "b", agent="dt", num_trajectories=4)]
    assert "How many trajectories" not in make_page(paths, tmp_path / "one.html").text
    paths.append(write_run(tmp_path, "c", num_trajectories=8))
    page = make_page(paths, tmp_path / "two.html")
    assert "How many trajectories" in page.text
    assert any(
        re.search(r"mean, context kept: 41\.0 \[36.* at 2, 41\.0 \[36.* at 8", label) for label in page.labels
    )
    assert any(re.search(r"luck alone: 32\.9 .* at 2, 32\.9 .* at 8", label) for label in page.labels)


def test_run_without_evaluation_shows_its_training_alone(tmp_path, write_run):
    page = make_page([write_run(tmp_path, "at", logs={})], tmp_path / "report.html")
    assert "None of these runs has been evaluated" in page.text
    assert "Not evaluated yet: at." in page.text
    assert page.numbers == []
    assert any(label.startswith("Training loss") for label in page.labels)


def test_reason_for_a_missing_film_is_passed_on(single):
    groups = report_groups.group_runs(report_groups.read_runs([single]))
    assert "libegl1" in report_page.films(groups)
    (single / "evaluations" / "rendering.txt").write_text("No episode was drawn: <reason>.\n")
    assert report_page.films(groups) == "<p>No episode was drawn: &lt;reason&gt;.</p>"


def test_commands_configuration_and_versions_are_shown(page):
    assert "bpt-rl train at.toml --seed 0" in page.text
    assert "bpt-rl evaluate at_seed0" in page.text
    assert 'agent = "at"' in page.text
    assert "0.11.2" in page.text and "git commit" in page.text and "abc123" in page.text


def test_text_from_files_is_escaped(tmp_path, write_run):
    path = write_run(tmp_path, "at", target_rule="<script>alert(1)</script>")
    text = write_report([path], tmp_path / "report.html").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_same_folders_give_the_same_bytes(single, tmp_path):
    paths = [write_report([single, single], tmp_path / name) for name in ("a.html", "b.html")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_folder_as_out_receives_report_html(single, tmp_path):
    assert write_report([single], tmp_path) == tmp_path / "report.html"


def test_errors_say_what_to_do(single, tmp_path, write_run):
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match="needs a run folder; got none"):
        write_report([], out)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        write_report([tmp_path / "nowhere"], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must hold config\.toml"):
        write_report([tmp_path / "empty"], out)
    other = write_run(tmp_path, "other", task="walker_walk")
    with pytest.raises(ValueError, match="must share a task; got walker_run, walker_walk"):
        write_report([single, other], out)
    twin = write_run(tmp_path, "twin")
    with pytest.raises(ValueError, match="must differ in seed; got seed 0"):
        write_report([single, twin], out)
    old = write_run(tmp_path, "old", schema=0)
    with pytest.raises(ValueError, match=r"must have schema 2; .* has 0"):
        write_report([old], out)
    assert not out.exists()
