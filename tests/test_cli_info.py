"""`bpt-rl data info` as users meet it, on episodes that it did not make itself."""

import json
import re

import pytest


@pytest.fixture(scope="module")
def exorl(cli, tmp_path_factory):
    """A folder with an episode of random and one of correlated noise, both of cartpole."""
    out = tmp_path_factory.mktemp("data") / "exorl"
    for algorithm in ("random", "ornstein_uhlenbeck"):
        cli.succeed(
            f"data collect --task cartpole_swingup --algorithm {algorithm} --num-steps 1000 --num-workers 1 --out {out}"
        )
    return out / "cartpole"


def test_datasets_are_compared_as_tables_as_json_and_as_a_picture(cli, exorl, tmp_path):
    line = f"data info {exorl}/random {exorl}/ornstein_uhlenbeck/buffer --num-workers 1"
    status, out, err = cli.run(line)
    assert status == 0, err
    assert re.search(r"^ random +full +1 +1,000 +-?\d+\.\d\d$", out, re.M)
    assert re.search(r"^ ornstein_uhlenbeck +full +1 +1,000 +-?\d+\.\d\d \(\+\d+\.\d\d\)$", out, re.M)
    assert f"Plot: {exorl}/comparison.png" in err
    assert (exorl / "comparison.png").stat().st_size > 1000
    compared = json.loads(cli.succeed(f"{line} --json --no-plot --against ornstein_uhlenbeck"))
    assert (compared["against"], list(compared["datasets"])) == (
        "ornstein_uhlenbeck",
        ["random", "ornstein_uhlenbeck"],
    )
    nats = {name: dataset["coverage"]["nats"] for name, dataset in compared["datasets"].items()}
    assert nats["ornstein_uhlenbeck"] > nats["random"]


def test_a_folder_alone_is_described_as_a_store_is(cli, exorl, tmp_path):
    picture = tmp_path / "one.png"
    line = f"data info {exorl}/random --num-workers 1 --plot-out {picture}"
    found = json.loads(cli.succeed(line))
    assert (found["source"], found["num_steps"], len(found["returns"])) == ("cartpole/random", 1000, 4)
    assert picture.stat().st_size > 1000
    store = tmp_path / "s.h5"
    cli.succeed(f"data build --source {exorl}/random --out {store} --num-workers 1")
    told = json.loads(cli.succeed(f"data info {store} --no-plot"))
    assert told["coverage"] == found["coverage"]
    assert told["returns"] == found["returns"]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("nowhere", r"a store, or a folder or zip of episodes; there is none at nowhere\."),
        ("{exorl}", r"must hold files named episode_\{{index\}}.*cartpole holds none\."),
        ("{exorl}/random {exorl}/random/buffer/..", r"named once; got .*random and .*\.\.\."),
        (
            "{exorl}/random {exorl}/ornstein_uhlenbeck --against rnd",
            r"random, ornstein_uhlenbeck; got 'rnd'\.",
        ),
    ],
)
def test_what_cannot_be_described_is_refused_in_one_sentence(
    cli, exorl, tmp_path, monkeypatch, rest, message
):
    monkeypatch.chdir(tmp_path)
    assert re.search(message.format(), cli.refuse(f"data info {rest.format(exorl=exorl)}"))
