"""A point on a line, whose optimum is known, learnt from actions that are uniformly random.

position' = clip(position + 0.2 action, -1, 1), reward = 1 - 2 position'^2, twenty steps. The optimal action is
clip(-5 position, -1, 1): it makes each reward as large as it can be, and no later one smaller. To stand still, which is
the mean of the data's actions, brings about a third of the optimal return. The bar, stated before anything was run:
an agent's mean return on fresh starts is at least 90% of the optimal return; imitation's is below half of it.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from bpt_rl.agents.registry import make_learner
from bpt_rl.datasets.transitions import TransitionDraw, Transitions, index_arrays
from bpt_rl.run.train_td import make_updates
from bpt_rl.td_config import IQLConfig, TD3BCConfig, TDConfig

STEPS, EPISODES = 20, 100
CONFIG = TDConfig(
    batch_size=128, hidden_dim=16, learning_rate=3e-3, discount=0.9, target_rate=0.05, num_updates=1000
)
SETTINGS = {
    "td3": CONFIG,
    # With the paper's 2.5 it reaches 0.87 of the optimum: to imitate noise is to stand still, and weighs too much.
    "td3_bc": dataclasses.replace(CONFIG, td3_bc=TD3BCConfig(alpha=10.0)),
    "crr": CONFIG,
    "cql": CONFIG,
    # Advantages are below 1 here; the paper's 3 goes with returns that span 1000.
    "iql": dataclasses.replace(CONFIG, iql=IQLConfig(temperature=20.0)),
}


def move(position, action):
    following = np.clip(position + 0.2 * action, -1, 1)
    return following, 1 - 2 * following**2


def random_episodes(seed):
    """Rows as ExoRL records them, the dummy row first."""
    generator = np.random.default_rng(seed)
    observation, action = np.zeros((2, EPISODES, STEPS + 1, 1), np.float32)
    reward = np.zeros((EPISODES, STEPS + 1), np.float32)
    observation[:, 0] = generator.uniform(-1, 1, (EPISODES, 1))
    action[:, 1:] = generator.uniform(-1, 1, (EPISODES, STEPS, 1))
    for t in range(1, STEPS + 1):
        observation[:, t], reward[:, t : t + 1] = move(observation[:, t - 1], action[:, t])
    rows = (EPISODES * (STEPS + 1),)
    return Transitions(
        observation.reshape(*rows, 1),
        action.reshape(*rows, 1),
        reward.reshape(rows),
        *index_arrays(np.full(EPISODES, STEPS)),
    )


def learnt(name, transitions, seed):
    """Returns the policy's mean actions as a function."""
    config = SETTINGS[name]
    learner = make_learner(name, config, 1, 1)
    draw = TransitionDraw(batch_size=config.batch_size, discount=config.discount)

    def train(transitions, key):
        updates = functools.partial(make_updates, learner, draw, num_updates=config.num_updates)
        return updates(learner.init(key), transitions, 0, key=jax.random.fold_in(key, 1))[0]

    state = jax.jit(train)(transitions, jax.random.key(seed))
    policy = learner.policy(state)
    return lambda position: policy.act((), position, np.zeros(len(position)))[1]


def mean_return(act, seed=10_000):
    position = np.random.default_rng(seed).uniform(-1, 1, (200, 1)).astype(np.float32)
    total = 0.0
    for _ in range(STEPS):
        position, reward = move(position, act(position))
        total += reward.mean()
    return total


def optimal(position):
    return np.clip(-5 * position, -1, 1)


def share_of_the_optimum(act):
    return mean_return(act) / mean_return(optimal)


@pytest.fixture(scope="module")
def transitions():
    return random_episodes(0)


@pytest.mark.parametrize("name", SETTINGS)
def test_agents_find_nine_tenths_of_the_optimum_in_random_actions(name, transitions):
    assert share_of_the_optimum(learnt(name, transitions, seed=0)) >= 0.9


def test_imitation_of_random_actions_finds_less_than_half_of_it(transitions):
    """By least squares on powers of the position, the best that imitation with squared error can do."""
    rows = transitions.row_index
    powers = np.arange(6)
    fitted, *_ = np.linalg.lstsq(transitions.observation[rows - 1] ** powers, transitions.action[rows])
    assert share_of_the_optimum(lambda position: position**powers @ fitted) < 0.5


def test_actions_beside_the_observation_of_the_wrong_row_do_not_lead_there(transitions):
    """The bar can be missed: what follows an action, in place of what it answered, tells nothing about it."""
    shifted = transitions._replace(observation=np.roll(transitions.observation, -1, axis=0))
    assert share_of_the_optimum(learnt("td3", shifted, seed=0)) < 0.9
