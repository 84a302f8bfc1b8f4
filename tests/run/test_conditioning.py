import dataclasses

import numpy as np
import pytest

from bpt_rl.config import BuildConfig, DataConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.chains import build_chain
from bpt_rl.datasets.packing import STEP_FIELDS
from bpt_rl.datasets.store import Store
from bpt_rl.run.conditioning import context_chains, target_return
from bpt_rl.run.evaluated_run import load_params

TASK = "cartpole_swingup"
DATA = DataConfig(task=TASK)


@pytest.fixture(scope="module")
def store(store_path):
    """Six episodes of 50 steps."""
    with Store.open(store_path) as opened:
        yield opened


@pytest.fixture
def draw(store):
    """Returns chains of three trajectories for each of four; keywords change that."""
    asked = {"num_trajectories": 3, "order": "random", "target_return": 30.0, "num_chains": 4, "seed": 7}
    return lambda data=DATA, **changes: context_chains(store, data, **(asked | changes))


def returns_of(chains):
    return [chain.returns.tolist() for chain in chains]


def check_equal(one, other):
    for name in (*STEP_FIELDS, "returns"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_targets_follow_their_rule(trained):
    statistics = dataclasses.replace(trained.statistics(), returns=(10.0, 20.0, 30.0, 50.0))
    assert target_return("largest", statistics) == (50.0, "largest return in the data")
    assert target_return("quantile", statistics, quantile=0.5) == (25.0, "0.5 quantile of the data's returns")
    assert target_return(12.5, statistics) == (12.5, "explicit")
    doubled = target_return("largest", statistics, multiple=2.0)
    assert doubled == (100.0, "largest return in the data, times 2.0")
    with pytest.raises(ValueError, match=r"must be finite; got inf times 1\.0"):
        target_return(float("inf"), statistics)


def test_orders_show_what_they_say(store, draw):
    ranking = np.sort(store.returns(TASK)).tolist()
    random, ascending, shuffled = (returns_of(draw(order=o)) for o in ("random", "ascending", "shuffled"))
    assert ascending == [sorted(row) for row in random] == [sorted(row) for row in shuffled]
    # Six different returns, so that three of them are in order by luck in one of six rows.
    assert len(set(ranking)) == 6 and random != ascending != shuffled != random
    assert returns_of(draw(order="best")) == [ranking[3:]] * 4
    assert returns_of(draw(order="worst")) == [ranking[:3]] * 4
    assert draw(order="none", num_trajectories=0) is None


@pytest.mark.parametrize(("stride", "num_starts"), [(1, 4), (2, 2)])
def test_consecutive_trajectories_are_those_collected_one_after_another(store, draw, stride, num_starts):
    returns = store.returns(TASK).tolist()
    data = DataConfig(task=TASK, draw="consecutive", stride=stride)
    found = returns_of(draw(data, order="consecutive", num_chains=30))
    stretches = [returns[first : first + 2 * stride + 1 : stride] for first in range(num_starts)]
    assert all(stretch in found for stretch in stretches)
    assert all(row in stretches for row in found)


@pytest.mark.parametrize("order", ["random", "shuffled", "consecutive"])
def test_a_draw_depends_on_the_seed_and_the_chain_alone(draw, order):
    chains = returns_of(draw(order=order))
    assert returns_of(draw(order=order)) == chains
    assert returns_of(draw(order=order, num_chains=2)) == chains[:2]
    assert len({tuple(row) for row in chains}) > 1
    assert returns_of(draw(order=order, seed=8)) != chains
    assert returns_of(draw(order=order, target_return=1.0)) == chains


def test_every_order_of_every_choice_is_drawn_equally_often(store, draw):
    place = {float(value): i for i, value in enumerate(store.returns(TASK))}
    for order in ("random", "shuffled"):
        drawn = [[place[r] for r in row] for row in returns_of(draw(order=order, num_chains=2000))]
        assert all(len(set(row)) == 3 for row in drawn)
        _, counts = np.unique(drawn, axis=0, return_counts=True)
        # 120 orders of three of six, 16.7 times each; 5 standard deviations of a count are 20.
        assert len(counts) == 120 and counts.max() < 37


def test_a_context_is_the_chain_of_its_episodes_that_is_asked_for_the_target(store, draw):
    place = {float(value): i for i, value in enumerate(store.returns(TASK))}
    for data in (DATA, dataclasses.replace(DATA, completion="per_step")):
        for chain in draw(data, target_return=3.0):
            episodes = [store.episode(place[r]) for r in chain.returns.tolist()]
            expected = build_chain(
                episodes, TASK, completion=data.completion, target_return=3.0, order="given"
            )
            check_equal(chain, expected)
    [own] = draw(dataclasses.replace(DATA, relabel="own_return"), num_chains=1)
    starts = np.flatnonzero(own.step == 0)
    # A float32 sum of 50 rewards and the store's.
    np.testing.assert_allclose(own.return_to_go[starts], own.returns, rtol=1e-6)


def test_rewards_that_the_store_computes_will_do(store_path, draw):
    buffer = next(store_path.parent.rglob("buffer"))
    path = build_store(
        BuildConfig(
            source=(str(buffer),),
            out=str(store_path.parent / "whole.h5"),
            tasks=("cartpole_balance",),
            subset="first-2-episodes",
            num_workers=1,
        )
    )
    with Store.open(path) as store:
        [chain] = context_chains(
            store, DATA, num_trajectories=2, order="ascending", target_return=9.0, num_chains=1, seed=0
        )
        episodes = [store.episode(i) for i in np.argsort(store.returns(TASK)).tolist()]
        np.testing.assert_array_equal(chain.returns, np.sort(store.returns(TASK)))
        np.testing.assert_array_equal(chain.action, np.concatenate([e.action[1:] for e in episodes]))
        sums = [chain.reward[chain.episode == i].sum(dtype=np.float64) for i in range(2)]
        np.testing.assert_allclose(sums, chain.returns, rtol=1e-6)


def test_a_trained_policy_takes_them(trained, draw):
    agent, params, _ = load_params(trained)
    contexts = draw(num_chains=2)
    policy = agent.policy(params, num_episodes=1)
    carry = policy.start(2, contexts)
    np.testing.assert_array_equal(carry.end.num_steps, [150, 150])
    np.testing.assert_array_equal(carry.end.episode, [3, 3])
    observation = np.zeros((2, 5), np.float32)
    told = policy.act(carry, observation, np.full(2, 30.0))[1]
    alone = policy.act(policy.start(2), observation, np.full(2, 30.0))[1]
    assert np.abs(told - alone).max() > 1e-4


def test_contexts_that_cannot_be_are_refused(store, draw):
    with pytest.raises(
        ValueError, match=r"must be as many in the store; got 7 for 6 in .*store\.h5\. Use fewer"
    ):
        draw(num_trajectories=7)
    for num, order in ((0, "best"), (2, "none"), (-1, "random")):
        with pytest.raises(ValueError, match=f"got num_trajectories {num} and order '{order}'"):
            draw(num_trajectories=num, order=order)
    with pytest.raises(ValueError, match="got 'walker_run'"):
        draw(dataclasses.replace(DATA, task="walker_run"))
