"""What a trained run is asked and shown, before anything is rolled out."""

import dataclasses

import pytest

from bpt_rl.config import EvaluateConfig
from bpt_rl.run.evaluated_run import EvaluatedRun


@pytest.fixture(scope="module")
def opened(trained):
    return EvaluatedRun.open(trained, EvaluateConfig(num_chains=3, seed=11))


def test_start_states_are_those_of_the_training_seed_unless_asked_for(opened, trained):
    def of(train_seed, **changes):
        return dataclasses.replace(
            opened,
            config=EvaluateConfig(num_chains=3, sample=True, **changes),
            trained=dataclasses.replace(opened.trained, seed=train_seed),
        )

    assert [of(seed).seed for seed in (0, 1, 2)] == [1_000_000, 1_000_001, 1_000_002]
    assert [of(seed, seed=11).seed for seed in (0, 1)] == [11, 11]
    for subject, seed in ((of(2), 1_000_002), (of(2, seed=0), 0)):
        assert {subject.plan(name, 1.0, 2).start.seed for name in ("chain", "random")} == {seed}


@pytest.mark.parametrize(
    ("agent", "asked", "expected"), [("at", 0, 2), ("at", 5, 5), ("bc", 0, 4), ("bc", 1, 1), ("dt", 0, 4)]
)
def test_episodes_are_those_asked_for_else_those_of_training_else_four(
    opened, tiny, tmp_path, agent, asked, expected
):
    asked_run = dataclasses.replace(
        opened, config=EvaluateConfig(num_episodes=asked), trained=tiny(tmp_path, agent=agent)
    )
    assert asked_run.num_episodes == expected
