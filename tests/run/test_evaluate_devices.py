"""`bpt-rl evaluate` with chains and caches that several virtual devices share."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from bpt_rl import config_toml
from bpt_rl.config import EvaluateConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.run import records
from bpt_rl.run.devices import Device
from bpt_rl.run.evaluate import evaluate_run
from bpt_rl.run.evaluated_run import EvaluatedRun
from bpt_rl.run.train import train


@pytest.fixture(scope="module")
def run_path(trained, tmp_path_factory):
    """A copy of the trained run that evaluations may be written to."""
    return shutil.copytree(trained.path, tmp_path_factory.mktemp("devices") / "at")


def test_shared_chains_have_the_returns_that_they_have_on_one_device(
    run_path, environments, cli, monkeypatch
):
    settings = {
        "num_context_trajectories": 2,
        "context_order": "ascending",
        "memoryless": False,
        "random": False,
    }
    config = EvaluateConfig(num_chains=3, num_episodes=2, seed=11, **settings)
    alone = evaluate_run(run_path, config, environments=environments)
    # Films take most of the time of an evaluation as short as this.
    monkeypatch.setattr("bpt_rl.run.film_sources.film_evaluation", lambda path: "No film.")
    cli.succeed(
        f"evaluate {run_path} --num-chains 3 --num-episodes 2 --seed 11 --num-context-trajectories 2 "
        "--context-order ascending --no-memoryless --no-random --max-environments 3 --mesh.data 3 --mesh.context 2"
    )
    # Another mesh is no other evaluation: it takes the place of the record.
    [path] = (run_path / "evaluations").glob("*.json")
    shared = json.loads(path.read_text())
    assert "--mesh.data 3" in shared["command"]
    assert alone["command"] == ""
    returns = [records.log_from_json(record["logs"]["chain"]).returns for record in (alone, shared)]
    # Sums in another order differ in the last bits, which chaos lets grow.
    np.testing.assert_allclose(*returns, rtol=1e-3)
    # What the tolerance is to tell apart: chains differ.
    assert np.abs(returns[0][0] / returns[0][1] - 1).max() > 0.01


def test_where_a_run_was_trained_does_not_say_where_it_is_evaluated(run_path):
    folder = records.RunFolder(run_path)
    trained_on = MeshConfig(context=2, fsdp=2, coordinator="host:1", num_processes=2)
    config = dataclasses.replace(folder.config(), mesh=trained_on)
    (run_path / "config.toml").write_text(config_toml.to_toml(config))
    keys = []
    for mesh, num_devices, num_parts in ((MeshConfig(), 1, 2), (MeshConfig(data=3), 3, 1)):
        subject = EvaluatedRun.open(folder, EvaluateConfig(num_chains=3, mesh=mesh))
        carry = subject.policy().start(3)
        assert len(carry.cache.keys[0].devices()) == num_devices
        assert subject.plan("chain", 1.0, 2).num_parts == num_parts
        keys.append(subject.journal_key())
    # What one has begun the other does not go on with: its actions are rounded otherwise.
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"mesh"}


def test_caches_that_cannot_fit_are_refused_by_the_share_of_a_device(run_path, cli, monkeypatch):
    # Keys and values of 16 numbers in float32, 2 episodes of 50 steps: 12,800 bytes a chain.
    refused = cli.refuse(f"evaluate {run_path} --num-chains 1_000_000_000 --num-episodes 2")
    assert "contexts of 2 trajectories, whose keys and values take 11920.9 GiB of each device" in refused
    card = Device(name="card", memory=10 * 12_800)
    monkeypatch.setattr("bpt_rl.run.evaluated_run.this_device", lambda: card)
    folder = records.RunFolder(run_path)

    def opened(num_chains, **mesh):
        config = EvaluateConfig(num_chains=num_chains, num_episodes=2, mesh=MeshConfig(**mesh))
        return EvaluatedRun.open(folder, config)

    opened(10)
    opened(40, data=2, context=2)
    with pytest.raises(
        ValueError, match=r"got num_chains 11 .* take 0\.1 MiB .* at most 10; or share each cache"
    ):
        opened(11)
    with pytest.raises(ValueError, match=r"got num_chains 42 .* at most 40;"):
        opened(42, data=2, context=2)


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        ("at", "--num-chains 3 --mesh.data 2", r"a multiple of mesh\.data; got 3 chains and mesh\.data 2"),
        ("at", "--mesh.fsdp 2", r"mesh\.fsdp must be 1; got 2\. Use mesh\.data"),
        ("at", "--mesh.context 16", "must not have more devices than there are"),
        ("bc", "--mesh.context 2", "caches of agents with a transformer.* got agent 'bc'"),
    ],
)
def test_devices_that_cannot_share_chains_are_refused_in_one_sentence(
    tiny, run_path, tmp_path, cli, agent, options, message
):
    path = run_path if agent == "at" else train(tiny(tmp_path / agent, agent=agent, num_trajectories=1)).path
    before = sorted(path.rglob("*"))
    sentence = cli.refuse(f"evaluate {path} {options}")
    assert re.search(message, sentence), sentence
    assert sorted(path.rglob("*")) == before
