import itertools

import gymnasium
import numpy as np
import pytest

from bpt_rl.agents.random import RandomPolicy
from bpt_rl.envs import tasks
from bpt_rl.envs.episodes import start_seed
from bpt_rl.run.evaluated_run import load_params
from bpt_rl.run.rollout import Start, rollout

TARGET = 40.0
START = Start(seed=5, target_return=TARGET)


class Watcher(RandomPolicy):
    """Random actions; keeps what the loop tells a policy."""

    def __init__(self):
        super().__init__(action_dim=1, seed=3)
        self.told = []

    def act(self, carry, observation, return_to_go):
        self.told.append(("act", observation.copy(), return_to_go.copy()))
        return super().act(carry, observation, return_to_go)

    def observe(self, carry, reward, done):
        self.told.append(("observe", reward.copy(), done.copy()))
        return super().observe(carry, reward, done)


@pytest.fixture(scope="module")
def watched(environments):
    """A policy and 120 transitions: two episodes of 50 steps and a part of the third."""
    policy = Watcher()
    return policy, list(itertools.islice(rollout(policy, environments, START), 120))


def test_return_to_go_starts_at_the_target_falls_by_each_reward_and_starts_again(watched):
    _, transitions = watched
    assert [t for t, transition in enumerate(transitions) if transition.done.any()] == [49, 99]
    assert transitions[49].done.all()
    assert transitions[99].done.all()
    for begin in (0, 50, 100):
        episode = transitions[begin : begin + 50]
        rewards = np.cumsum([transition.reward for transition in episode], axis=0)
        assert rewards[-1].min() > 0
        np.testing.assert_array_equal(episode[0].return_to_go, [TARGET] * 3)
        for t in range(1, len(episode)):
            np.testing.assert_allclose(episode[t].return_to_go, TARGET - rewards[t - 1], rtol=1e-12)


def test_the_policy_is_told_what_the_transitions_hold_in_time_order(watched):
    policy, transitions = watched
    for t, transition in enumerate(transitions[:-1]):
        act, observe = policy.told[2 * t], policy.told[2 * t + 1]
        assert (act[0], observe[0]) == ("act", "observe")
        np.testing.assert_array_equal(act[1], transition.observation)
        np.testing.assert_array_equal(act[2], transition.return_to_go)
        np.testing.assert_array_equal(observe[1], transition.reward)
        np.testing.assert_array_equal(observe[2], transition.done)


def test_transitions_are_those_of_single_environments_under_the_same_actions(watched):
    _, transitions = watched
    for i in range(3):
        environment = tasks.make("cartpole_swingup", start_seed(5, i, 0), action_repeat=20)
        episode = 0
        observation = environment.reset().observation
        for transition in transitions:
            np.testing.assert_array_equal(transition.observation[i], observation)
            step = environment.step(transition.action[i])
            assert (transition.reward[i], transition.done[i]) == (step.reward, step.last())
            # An episode's last observation is no state to act in: the next episode has begun.
            if step.last():
                episode += 1
                environment.seed(start_seed(5, i, episode))
            observation = environment.reset().observation if step.last() else step.observation


def test_no_target_asks_for_nothing(environments):
    for transition in itertools.islice(rollout(Watcher(), environments, Start(seed=5)), 60):
        assert np.isnan(transition.return_to_go).all()


def test_chains_in_parts_act_as_they_do_in_one(trained, environments):
    agent, params, _ = load_params(trained)
    start = Start(seed=3, target_return=TARGET, num_episodes=2)

    def played(num_parts):
        rows = {name: [[] for _ in range(3)] for name in ("observation", "action", "reward", "return_to_go")}
        policy = agent.policy(params, num_episodes=2)
        for transition in rollout(policy, environments, start, num_parts=num_parts):
            for name, chains in rows.items():
                for i, value in zip(transition.environment, getattr(transition, name), strict=True):
                    chains[i].append(value)
        return {name: np.array(chains) for name, chains in rows.items()}

    whole, halves, alone = (played(num_parts) for num_parts in (1, 2, 3))
    for name, expected in whole.items():
        assert expected.shape[:2] == (3, 100)
        for parts in (halves, alone):
            # Float32 sums of batches of other sizes, carried on by the simulator over 50 steps.
            np.testing.assert_allclose(parts[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_parts", "has_stepped"), [(1, False), (1, True), (2, False), (2, True)])
def test_a_part_acts_while_another_steps(environments, monkeypatch, num_parts, has_stepped):
    events = []

    def told(name):
        call = getattr(environments, name)

        def tell(*arguments):
            events.append(name)
            return call(*arguments)

        monkeypatch.setattr(environments, name, tell)

    class Lazy:
        def __init__(self, numbers):
            self._numbers, self.shape, self.dtype = numbers, numbers.shape, numbers.dtype

        def __array__(self, dtype=None, copy=None):
            events.append("wait")
            return self._numbers

    class Telling(RandomPolicy):
        def act(self, carry, observation, return_to_go):
            events.append("act")
            carry, action = super().act(carry, observation, return_to_go)
            return carry, Lazy(action)

    environments.reset()  # Takes what another test has left under way.
    told("send")
    told("receive")
    monkeypatch.setattr(environments, "has_stepped", lambda part: has_stepped)
    list(itertools.islice(rollout(Telling(1, 0), environments, START, num_parts=num_parts), 6))
    choice, turn = ["wait", "send"], ["receive", "act"]
    if num_parts == 1 or not has_stepped:
        # Of two parts, the other one's step is under way while this one's actions are waited for.
        expected = ["act"] * num_parts + choice * num_parts + [*turn, *choice] * 5 + ["receive"]
    else:
        # Those that have stepped come first, while a device is at work on the others' actions.
        expected = ["act"] * 2 + choice + [*turn, *choice] * 5 + ["receive"]
    assert events == expected


class Foreign(gymnasium.vector.VectorWrapper):
    """Environments of another maker."""


def test_environments_of_another_maker_are_played_too_but_not_in_parts(watched, environments):
    _, transitions = watched
    foreign = Foreign(environments)
    for one, other in zip(rollout(Watcher(), foreign, START), transitions[:60], strict=False):
        np.testing.assert_array_equal(one.observation, other.observation)
        np.testing.assert_array_equal(one.done, other.done)
    with pytest.raises(ValueError, match="go on where others were or share a chain; got Foreign"):
        next(rollout(Watcher(), foreign, START, num_parts=2))
