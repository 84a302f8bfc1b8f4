import dataclasses

import numpy as np
import pytest

from bpt_rl.expected_return_config import ExpectedReturnConfig
from bpt_rl.nn.value_function import Steps, fit_value

CONFIG = ExpectedReturnConfig(num_updates=600, batch_size=256, hidden_dim=32, learning_rate=3e-3)


def gamble(num_steps, seed):
    """A safe state that pays 1 and one that pays 5 or -5 by luck, both for each step that is left."""
    generator = np.random.default_rng(seed)
    is_safe = generator.integers(0, 2, num_steps)
    left = generator.integers(1, 11, num_steps)
    paid = np.where(is_safe, 1.0, generator.choice([-5.0, 5.0], num_steps))
    steps = (np.stack([2.0 * is_safe - 1, 0 * left], axis=1), 1 - left / 10, paid * left)
    return Steps(*(np.asarray(values, np.float32) for values in steps))


def test_what_is_expected_is_the_mean_over_luck_at_every_time():
    fit = fit_value(CONFIG, gamble(20_000, 0), gamble(4000, 1))
    time = np.linspace(0, 0.9, 10, dtype=np.float32)
    for is_safe in (0, 1):
        observation = np.tile(np.array([2 * is_safe - 1, 0], np.float32), (10, 1))
        expected = is_safe * 10 * (1 - time)
        # A thousand lucky or unlucky steps of a kind, at most 50 each: five standard errors, 50 / sqrt(1000).
        np.testing.assert_allclose(fit(observation, time), expected, atol=8)
        assert np.abs(np.asarray(fit(observation, time)) - expected).mean() < 2
    # Luck is most of the variance: 25 of every 25 + 1 in the mean square, about.
    assert 0.9 < fit.held_out_error < 1.0


def noise(num_steps, seed):
    """Steps that tell nothing of what follows."""
    generator = np.random.default_rng(seed)
    steps = (
        generator.normal(size=(num_steps, 6)),
        generator.random(num_steps),
        generator.normal(size=num_steps),
    )
    return Steps(*(np.asarray(values, np.float32) for values in steps))


def test_the_best_place_on_held_out_steps_is_kept_and_what_never_is_finite_is_refused():
    # So few steps that a long fit learns them by heart.
    few, many, config = noise(40, 0), noise(4000, 1), dataclasses.replace(CONFIG, num_updates=1000)
    kept, seen = (fit_value(config, few, held_out) for held_out in (many, few))

    def error(fit):
        missed = np.asarray(fit(many.observation, many.time)) - many.return_to_go
        return np.square(missed).mean() / many.return_to_go.var()

    assert seen.held_out_error < 0.2 and error(seen) > 1.5
    np.testing.assert_allclose(kept.held_out_error, error(kept), rtol=1e-3)
    assert error(kept) < 0.9 * error(seen)
    with pytest.raises(FloatingPointError, match=r"must be finite.*Lower expected_return\.learning_rate"):
        fit_value(CONFIG, few._replace(return_to_go=few.return_to_go * np.nan), many)
