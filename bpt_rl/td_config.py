"""Configurations of the agents that learn from single transitions: TD3, TD3+BC, CRR, CQL and IQL."""

import dataclasses
import typing
from typing import Literal

from bpt_rl.config_checks import not_negative, positive

TDAgentName = Literal["td3", "td3_bc", "crr", "cql", "iql"]
TD_AGENTS: tuple[TDAgentName, ...] = typing.get_args(TDAgentName)
READ_FIELDS = ("data.store", "data.task", "data.place")
"""Of the fields of data, model and optimizer those that these agents read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TD3BCConfig:
    """What TD3+BC adds to TD3."""

    alpha: float = 2.5
    """Weight of the critic against imitation, after values are divided by their mean size. Source: the paper."""

    def __post_init__(self) -> None:
        positive(self, "alpha")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CRRConfig:
    """Critic-regularised regression."""

    weight: Literal["indicator", "exp", "identity"] = "indicator"
    """What an action's likelihood is weighted by: whether its advantage is positive, the exponential of the
    advantage up to 20, or the advantage itself."""
    num_value_samples: int = 10
    """Actions whose mean value the advantage is measured against."""

    def __post_init__(self) -> None:
        positive(self, "num_value_samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CQLConfig:
    """Conservative Q-learning. Source of the values: ExoRL's settings."""

    alpha: float = 0.01
    """Weight of the penalty; not used with is_lagrangian."""
    num_samples: int = 3
    """Actions of each of three kinds in the penalty: uniform, of the policy there, and of the policy one step on."""
    is_lagrangian: bool = False
    """Learn the penalty's weight, so that the penalty comes to target_penalty."""
    target_penalty: float = 5.0
    """Of both critics together; used with is_lagrangian only."""

    def __post_init__(self) -> None:
        positive(self, "num_samples")
        not_negative(self, "alpha")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IQLConfig:
    """Implicit Q-learning. Source of the values: the paper's settings for MuJoCo locomotion."""

    expectile: float = 0.7
    """Of the values of the data's actions, in (0, 1); 0.5 is their mean."""
    temperature: float = 3.0
    """Factor on the advantage before its exponential weighs an action's likelihood. Rewards are not scaled, where
    the paper makes the best return 1000 larger than the worst."""
    max_weight: float = 100.0

    def __post_init__(self) -> None:
        positive(self, "temperature", "max_weight")
        if not 0 < self.expectile < 1:
            raise ValueError(f"expectile must lie in (0, 1); got {self.expectile}. 0.7 is usual.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TDConfig:
    """Learning from single transitions. The presets have ExoRL's sizes; these are smaller."""

    num_updates: int = 50_000
    """Gradient steps of every network, in all."""
    batch_size: int = 256
    """Transitions a gradient step."""
    hidden_dim: int = 256
    """Width of every network."""
    learning_rate: float = 1e-4
    """Of Adam."""
    discount: float = 0.99
    """A step; what follows n steps has its n-th power."""
    num_step_return: int = 1
    """n: rewards of a transition that are added up before a critic is asked; fewer where the episode ends."""
    target_rate: float = 0.01
    """Share of the critic that enters its slowly moving target at each gradient step."""
    noise: float = 0.2
    """Standard deviation of the policies of td3, td3_bc and crr around their mean, in actions of [-1, 1]."""
    noise_clip: float = 0.3
    """Largest noise in the actions that they learn by."""
    td3_bc: TD3BCConfig = dataclasses.field(default_factory=TD3BCConfig)
    crr: CRRConfig = dataclasses.field(default_factory=CRRConfig)
    cql: CQLConfig = dataclasses.field(default_factory=CQLConfig)
    iql: IQLConfig = dataclasses.field(default_factory=IQLConfig)

    def __post_init__(self) -> None:
        positive(self, "num_updates", "batch_size", "hidden_dim", "learning_rate", "num_step_return")
        positive(self, "noise", "noise_clip")
        for name in ("discount", "target_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must lie in (0, 1]; got {getattr(self, name)}. 0.99 and 0.01 are usual for discount "
                    "and target_rate."
                )
