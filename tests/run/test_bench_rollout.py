"""`bpt-rl bench rollout`, in sizes that a CPU measures in seconds."""

import json
import re
import time

import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.agents.random import RandomPolicy
from bpt_rl.config import DataConfig, ModelConfig, TrainConfig
from bpt_rl.run.bench_rollout import rollout_seconds

MODEL = ModelConfig(embed_dim=8, num_layers=1, num_heads=1, dropout=0.0, implementation="blockwise")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, cli):
    """The record of a chain of two short episodes, in one part and in two, and what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    train = TrainConfig(data=DataConfig(task="cartpole_swingup"), model=MODEL)
    (folder / "tiny.toml").write_text(config_toml.to_toml(train))
    out = folder / "rollout.json"
    printed = cli.succeed(
        f"bench rollout {folder}/tiny.toml --num-episodes 2 --num-chains 2 --num-parts 1 2 --num-positions 2 "
        f"--num-steps 3 --num-workers 1 --uncached-chains 1 --out {out}"
    )
    return json.loads(out.read_text()), printed


def test_rates_are_those_of_the_times_integrated_over_the_chain(measured):
    record, printed = measured
    assert record["bench"] == "rollout"
    assert [row["num_parts"] for row in record["rows"]] == [1, 2]
    # Gauss and Legendre's three places in [0, 1] and their weights.
    offset = 0.5 * np.sqrt(3 / 5)
    places, weights = np.array([0.5 - offset, 0.5, 0.5 + offset]), np.array([5, 8, 5]) / 18
    for row in record["rows"]:
        assert row["failure"] == ""
        assert row["tokens"] == 2 * 1000 * 4
        # Midpoints of the two halves; the cache has grown in between.
        assert row["positions"] == [500, 1500]
        # Keys and values, 8 numbers of float32 a token.
        assert row["cache_bytes"] == 2 * 2 * 8000 * 8 * 4
        assert row["cached_rate"] == pytest.approx(2 / np.mean(row["cached_seconds"]))
        assert row["decode_rate"] == pytest.approx(2 / np.mean(row["decode_seconds"]))
        assert row["uncached_positions"] == np.round(2000 * places).tolist()
        assert row["uncached_rate"] == pytest.approx(2 / (weights @ row["uncached_seconds"]))
        assert row["speedup"] == pytest.approx(row["cached_rate"] / row["uncached_rate"])
        floor = min(row["physics_rate"], row["decode_rate"])
        assert row["floor_share"] == pytest.approx(row["cached_rate"] / floor)
    assert "% of floor" in printed


def test_physics_bounds_what_is_simulated(measured):
    """No rollout of a policy that must be asked is much faster than its simulators, however busy the machine is."""
    for row in measured[0]["rows"]:
        assert row["cached_rate"] < 2 * row["physics_rate"]
        # A core simulates some 5,000 steps a second.
        assert row["physics_rate"] < 50_000


class SlowPolicy(RandomPolicy):
    def act(self, carry, observation, return_to_go):
        time.sleep(0.1)
        return super().act(carry, observation, return_to_go)


def test_a_step_takes_as_long_as_the_calls_of_its_parts(environments):
    # Five steps of 20 ms of physics at most; on a busy machine more.
    for num_parts in (1, 3):
        seconds = rollout_seconds(SlowPolicy(1, 0), environments, num_parts, 5)
        assert 0.1 * num_parts < seconds < 0.1 * num_parts + 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("at_paper --num-parts 3 --num-chains 2", "needs a chain; got 3 parts and num_chains 2"),
        ("at_paper --num-episodes 0", "num_episodes must be positive"),
        ("at_paper --num-workers -1", "num_workers must not be negative; got -1"),
        ("bc10", "The agent must have a transformer, as at, dt and ad have; got bc"),
        ("at_paper --train.data.task walker_rnu", "'walker_rnu'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    options, message, cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, out, err = cli.run(f"bench rollout {options}")
    assert (status, out, "Traceback" in err) == (2, "", False)
    assert message in " ".join(re.sub("[│╭╮╰╯─|]", " ", err).split())
    assert not (tmp_path / "results" / "bench_rollout.json").exists()
