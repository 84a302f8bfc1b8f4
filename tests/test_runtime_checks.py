"""The tests check every annotation at run time: shows that they really do, in each part of the package."""

import importlib

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from bpt_rl.agents.random import RandomPolicy
from bpt_rl.datasets.chains import returns_to_go
from bpt_rl.types import EpisodeLog


@pytest.mark.parametrize(
    "module",
    ["bpt_rl.types", "bpt_rl.agents.base", "bpt_rl.datasets.exorl", "bpt_rl.nn", "bpt_rl.run.records"],
)
def test_module_is_loaded_with_run_time_checks(module: str) -> None:
    specification = importlib.import_module(module).__spec__
    assert specification is not None
    assert "jaxtyping" in type(specification.loader).__module__


def test_wrong_shape_in_a_structure_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="returns"):
        EpisodeLog(
            returns=np.zeros(3),
            num_steps=np.zeros((1, 3), int),
            context="chain",
            task="walker_run",
            action_repeat=1,
            target_return=1.0,
            seed=0,
            seconds=1.0,
        )


def test_wrong_shape_is_refused_in_the_datasets_folder() -> None:
    with pytest.raises(TypeCheckError, match="reward"):
        returns_to_go(np.zeros((2, 3)))


def test_wrong_shape_is_refused_in_the_agents_folder() -> None:
    policy = RandomPolicy(action_dim=1, seed=0)
    carry = policy.start(num_environments=2)
    with pytest.raises(TypeCheckError, match="return_to_go"):
        policy.act(carry, np.zeros((2, 5)), np.zeros(3))


def test_whole_number_will_do_where_a_float_is_asked_for() -> None:
    np.testing.assert_array_equal(returns_to_go(np.ones(3), target=5), [5.0, 4.0, 3.0])
