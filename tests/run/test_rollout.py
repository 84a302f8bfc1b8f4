import itertools

import numpy as np
import pytest

from bpt_rl.agents.random import RandomPolicy
from bpt_rl.envs import tasks
from bpt_rl.run.rollout import rollout

TARGET = 40.0


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
    return policy, list(itertools.islice(rollout(policy, environments, 5, TARGET), 120))


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
        seed = int(np.random.SeedSequence([5, i]).generate_state(1)[0])
        environment = tasks.make("cartpole_swingup", seed, action_repeat=20)
        observation = environment.reset().observation
        for transition in transitions:
            np.testing.assert_array_equal(transition.observation[i], observation)
            step = environment.step(transition.action[i])
            assert (transition.reward[i], transition.done[i]) == (step.reward, step.last())
            # An episode's last observation is no state to act in: the next episode has begun.
            observation = environment.reset().observation if step.last() else step.observation


def test_no_target_asks_for_nothing(environments):
    for transition in itertools.islice(rollout(Watcher(), environments, 5, float("nan")), 60):
        assert np.isnan(transition.return_to_go).all()
