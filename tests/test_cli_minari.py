"""From a Minari dataset to a trained agent and back, as users meet it."""

import json
import re
import warnings

import minari
import numpy as np
import pytest
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer

ID = "toy/deep/reach-v3"


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder of one's own, and a Minari dataset of six episodes."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            observations=generator.normal(size=(num_steps + 1, 3)),
            actions=generator.uniform(0, 2, (num_steps, 2)),
            rewards=generator.normal(size=num_steps),
            terminations=np.zeros(num_steps, bool),
            truncations=np.arange(num_steps) == num_steps - 1,
        )
        for num_steps in (6, 9, 5, 8, 7, 6)
    ]
    spaces = {"observation_space": Box(-9, 9, (3,)), "action_space": Box(0, 2, (2,))}
    with warnings.catch_warnings():
        # Minari warns of every field of its metadata that is left out.
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(ID, episodes, **spaces)
    return tmp_path


def test_an_agent_is_trained_on_a_minari_dataset_and_evaluated_only_by_its_owner(cli, project):
    assert (
        cli.succeed(f"data build --source minari:{ID} --out store.h5 --num-workers 1") == "Store: store.h5\n"
    )
    assert (
        cli.succeed("data verify store.h5 --num-workers 1")
        == "store.h5: 6 episodes, every byte matches its digest.\n"
    )
    described = json.loads(cli.succeed("data info store.h5"))
    assert (described["source"], described["num_steps"], described["features"]) == (f"minari/{ID}", 41, {})
    assert (project / "store.png").stat().st_size > 1000
    train = (
        f"--data.store store.h5 --data.task {ID} --data.num-trajectories 2 --data.top-fraction 1 --data.batch-size 2 "
        "--model.embed-dim 8 --model.num-layers 1 --optimizer.num-steps 2 --optimizer.warmup-steps 0 --log-every 1"
    )
    assert cli.succeed(f"train bc10 --run run {train}") == "Run: run\n"
    losses = [
        json.loads(line)["loss"] for line in (project / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert ID in (project / cli.succeed("report run").split()[1]).read_text()
    sentence = f"there is no simulator for the Minari dataset {re.escape(ID)}\\."
    assert re.search(sentence, cli.refuse("evaluate run"))
    grid = re.sub("--(?=data|model|optimizer|log)", "--train.", train)
    assert re.search(sentence, cli.refuse(f"ablate trajectory_count --out grid {grid}"))
    assert not (project / "grid").exists()


def test_a_store_is_exported_once_and_named_by_its_id(cli, project):
    cli.succeed(f"data build --source minari:{ID} --out store.h5 --num-workers 1")
    line = "data export store.h5 --dataset-id own/copy-v1"
    path = project / "minari" / "own" / "copy-v1"
    assert cli.succeed(line) == f"Minari dataset: own/copy-v1, 6 episodes in {path}\n"
    assert minari.load_dataset("own/copy-v1").total_steps == 41
    assert re.search(f"must not replace a dataset; {path} is there already", cli.refuse(line))
    assert re.search("needs one store; got store.h5 other.h5", cli.refuse("data export store.h5 other.h5"))
    assert re.search("none is at other.h5", cli.refuse("data export other.h5"))
    assert re.search("none at .*/gone-v0. Fetch it with", cli.refuse("data build --source minari:gone-v0"))
