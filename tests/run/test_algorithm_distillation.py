"""Algorithm distillation from training to evaluation."""

import dataclasses
import math

import numpy as np
import pytest

from bpt_rl.config import EvaluateConfig
from bpt_rl.datasets.store import Store
from bpt_rl.run.evaluate import evaluate_run
from bpt_rl.run.evaluated_run import EvaluatedRun
from bpt_rl.run.train import train

CHANGES = {
    "agent": "ad",
    "layout": "fused_without_return",
    "draw": "consecutive",
    "order": "collected",
    "warmup_steps": 0,
    "num_steps": 2,
}
CONFIG = EvaluateConfig(
    num_chains=3, random=False, context_order="consecutive", num_context_trajectories=1, target_multiple=3.0
)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("ad") / "ad", **CHANGES))


def test_it_is_evaluated_in_chains_that_ask_for_nothing(folder, environments):
    # As many episodes as training had trajectories, beside the memoryless control.
    subject = EvaluatedRun.open(folder, CONFIG)
    assert (subject.num_episodes, list(subject.policies())) == (2, ["chain", "memoryless"])
    record = evaluate_run(folder.path, dataclasses.replace(CONFIG, num_episodes=1), environments=environments)
    assert np.shape(record["logs"]["chain"]["returns"]) == (3, 1)
    assert record["logs"]["chain"]["target_return"] is None
    assert record["context"]["order"] == "consecutive"


def test_what_it_begins_with_are_consecutive_episodes_of_the_data(folder, store_path):
    subject = EvaluatedRun.open(folder, dataclasses.replace(CONFIG, num_context_trajectories=3))
    start = subject.plan("chain", subject.target[0], 2).start
    assert math.isnan(start.target_return)
    with Store.open(store_path) as store:
        returns = store.returns("cartpole_swingup").tolist()
    assert all(chain.returns.tolist() in [returns[i : i + 3] for i in range(4)] for chain in start.contexts)


def test_it_cannot_be_swept_over_targets_and_makes_no_folder_with_another_layout(folder, tiny, tmp_path):
    with pytest.raises(ValueError, match="asked for a return can be swept over targets; got 'ad'"):
        EvaluatedRun.open(folder, EvaluateConfig(target_sweep=(0.5,)))
    with pytest.raises(ValueError, match="asked for no return; got layout 'fused', which carries one"):
        train(tiny(tmp_path / "ad", **(CHANGES | {"layout": "fused"})))
    assert not (tmp_path / "ad").exists()
