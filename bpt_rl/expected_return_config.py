"""Configuration of the value function behind `data.relabel = "expected_return"`."""

import dataclasses

from bpt_rl.config_checks import not_negative, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedReturnConfig:
    """A perceptron of observation and time that is fitted to the returns-to-go of the data, once, before training."""

    num_updates: int = 5000
    """Gradient steps; of ten places among them, the one of the smallest error on held-out episodes is kept."""
    batch_size: int = 1024
    """Steps of the data an update."""
    learning_rate: float = 1e-3
    """Of Adam, with cosine decay to 0."""
    hidden_dim: int = 256
    """Width of the two hidden layers."""
    held_out: float = 0.1
    """Fraction of the episodes that the fit is measured on and does not see, in (0, 1)."""
    max_episodes: int = 2000
    """Episodes that it is fitted to and measured on, drawn at random if the store has more."""
    seed: int = 0
    """Of the fit. It is apart from the run's, so that runs which differ by their seed alone have the same data."""

    def __post_init__(self) -> None:
        positive(self, "num_updates", "batch_size", "learning_rate", "hidden_dim")
        not_negative(self, "seed")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1); got {self.held_out}. 0.1 is usual.")
        if self.max_episodes < 2:
            raise ValueError(
                f"max_episodes must leave an episode to fit to and one to measure on; got {self.max_episodes}. Use "
                "at least 2."
            )
