import subprocess
import sys

import numpy as np
import pytest

from bpt_rl.agents.ornstein_uhlenbeck import OrnsteinUhlenbeckPolicy
from bpt_rl.agents.random import RandomPolicy

POLICIES = {
    "random": lambda seed: RandomPolicy(3, seed),
    "ornstein_uhlenbeck": lambda seed: OrnsteinUhlenbeckPolicy(3, seed, decay=0.2, scale=0.5),
}


def play(policy, num_environments, num_steps, done_at=()):
    """Returns actions [T, B, A]; every episode ends after the steps in `done_at`."""
    carry = policy.start(num_environments)
    actions = []
    for t in range(num_steps):
        carry, action = policy.act(
            carry, np.zeros((num_environments, 4), np.float32), np.zeros(num_environments)
        )
        carry = policy.observe(carry, np.zeros(num_environments), np.full(num_environments, t in done_at))
        actions.append(action)
    return np.stack(actions)


@pytest.mark.parametrize("name", POLICIES)
def test_equal_seeds_give_equal_float32_actions_in_range(name):
    actions = play(POLICIES[name](1), 5, 20)
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    np.testing.assert_array_equal(actions, play(POLICIES[name](1), 5, 20))
    assert np.abs(actions - play(POLICIES[name](2), 5, 20)).max() > 0.1


@pytest.mark.parametrize("name", POLICIES)
def test_a_carry_is_never_changed_so_that_it_can_be_used_again(name):
    policy, zeros = POLICIES[name](0), np.zeros(2)
    carry, _ = policy.act(policy.start(2), np.zeros((2, 4)), zeros)
    first, after = (
        policy.act(carry, np.zeros((2, 4)), zeros),
        policy.observe(carry, zeros, np.array([True, False])),
    )
    second = policy.act(carry, np.zeros((2, 4)), zeros)
    np.testing.assert_array_equal(first[1], second[1])
    assert first[0].counter == second[0].counter == after.counter + 1


def test_random_actions_are_uniform_and_independent():
    actions = play(RandomPolicy(1, 0), 4000, 2).astype(np.float64)[:, :, 0]
    # Standard errors: of a decile's share 0.3 / sqrt(8000), of a correlation 1 / sqrt(4000); five of each.
    shares = np.histogram(actions, bins=10, range=(-1, 1))[0] / actions.size
    np.testing.assert_allclose(shares, 0.1, atol=5 * 0.3 / np.sqrt(8000))
    assert abs(np.corrcoef(actions)[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize("decay", [0.1, 0.5, 1.0])
def test_noise_is_stationary_with_the_correlation_its_decay_says(decay):
    # Small enough a scale that nothing is clipped.
    noise = play(OrnsteinUhlenbeckPolicy(1, 0, decay=decay, scale=0.1), 20_000, 6).astype(np.float64)[:, :, 0]
    # Standard error of a deviation: scale / sqrt(2 * 20,000); of a correlation at most 1 / sqrt(20,000).
    np.testing.assert_allclose(noise.std(axis=1), 0.1, atol=5 * 0.1 / np.sqrt(40_000))
    correlation = np.corrcoef(noise)
    for lag in range(1, 6):
        np.testing.assert_allclose(correlation[0, lag], (1 - decay) ** lag, atol=5 / np.sqrt(20_000))


def test_noise_starts_anew_after_the_end_of_an_episode():
    policy = OrnsteinUhlenbeckPolicy(1, 0, decay=0.01, scale=0.1)
    noise = play(policy, 20_000, 3, done_at=(1,)).astype(np.float64)[:, :, 0]
    correlation = np.corrcoef(noise)
    assert correlation[0, 1] > 0.98
    # Five standard errors of a correlation.
    assert abs(correlation[1, 2]) < 5 / np.sqrt(20_000)
    np.testing.assert_allclose(noise[2].std(), 0.1, atol=5 * 0.1 / np.sqrt(40_000))


def test_clipping_does_not_reach_the_process_itself():
    wide = play(OrnsteinUhlenbeckPolicy(1, 0, decay=0.3, scale=4.0), 100, 10)
    narrow = play(OrnsteinUhlenbeckPolicy(1, 0, decay=0.3, scale=0.04), 100, 10)
    np.testing.assert_allclose(wide, np.clip(100 * narrow.astype(np.float64), -1, 1), rtol=1e-5)
    assert (np.abs(wide) == 1).mean() > 0.5


def test_numbers_out_of_range_are_refused():
    for decay, scale in [(0.0, 1.0), (1.1, 1.0), (0.1, 0.0)]:
        with pytest.raises(
            ValueError, match=rf"decay must lie in \(0, 1\] .*; got {decay} and {scale}\. 0\.15"
        ):
            OrnsteinUhlenbeckPolicy(1, 0, decay=decay, scale=scale)


def test_exploring_and_recording_need_no_jax():
    script = (
        "import sys; from bpt_rl.agents import ornstein_uhlenbeck, random; from bpt_rl.run import collect; "
        "from bpt_rl.datasets import build; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
