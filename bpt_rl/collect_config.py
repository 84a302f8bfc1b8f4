"""Configurations of `bpt-rl data collect`: what explores, and how it learns to."""

import dataclasses
import typing
from typing import Literal

from bpt_rl.config_checks import not_negative, positive

ExplorerName = Literal["rnd", "icm", "disagreement", "icm_apt", "proto", "diayn", "aps", "smm"]
Algorithm = Literal[
    "random", "ornstein_uhlenbeck", "rnd", "icm", "disagreement", "icm_apt", "proto", "diayn", "aps", "smm"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplorationConfig:
    """The learner behind every explorer: DDPG on intrinsic rewards alone. Source of the values: URLB's settings."""

    num_environments: int = 32
    """Environments that act at once, in lockstep; each records one episode a round."""
    steps_per_update: float = 2.0
    """Environment steps a gradient step. Updates follow each step of all environments, or each k-th."""
    first_steps: int = 4000
    """Environment steps of uniform noise before the first gradient step."""
    batch_size: int = 1024
    hidden_dim: int = 1024
    """Width of actor, critic and the explorer's own networks."""
    learning_rate: float = 1e-4
    discount: float = 0.99
    """A step; an n-step transition has its n-th power."""
    num_step_return: int = 3
    """n: steps between the two observations of a transition."""
    target_rate: float = 0.01
    """Share of the critic that enters its slowly moving target at each gradient step."""
    noise: float = 0.2
    """Standard deviation of the Gaussian noise added to actions in [-1, 1]."""
    noise_clip: float = 0.3
    """Largest noise in the actions that targets and actor are computed with."""
    replay_steps: int = 1_000_000
    """Environment steps that can be drawn from, the newest."""

    def __post_init__(self) -> None:
        positive(self, "num_environments", "steps_per_update", "first_steps", "batch_size", "hidden_dim")
        positive(self, "learning_rate", "num_step_return", "noise", "noise_clip", "replay_steps")
        for name in ("discount", "target_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must lie in (0, 1]; got {getattr(self, name)}. 0.99 and 0.01 are usual for discount "
                    "and target_rate."
                )
        ratio = self.num_environments / self.steps_per_update
        if not max(ratio, 1 / ratio).is_integer():
            raise ValueError(
                "num_environments must be a multiple of steps_per_update, or the other way round; got "
                f"{self.num_environments} and {self.steps_per_update}. 32 and 2 are usual."
            )

    @property
    def updates_at_once(self) -> int:
        """Gradient steps between two steps of all environments, in those places that have any."""
        return max(1, round(self.num_environments / self.steps_per_update))

    @property
    def update_every(self) -> int:
        """Steps of all environments from one such place to the next."""
        return max(1, round(self.steps_per_update / self.num_environments))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Recording exploratory episodes in ExoRL's layout."""

    task: str = "walker_run"
    """Task whose environment, start states and stored reward are used."""
    algorithm: Algorithm = "ornstein_uhlenbeck"
    """Uniform noise, noise correlated in time, or an explorer that learns."""
    num_steps: int = 100_000
    """Simulator control steps in all; rounded up to whole episodes, of an explorer to one in each environment."""
    action_repeat: int = 1
    """Control steps an action is held for; 1 for an explorer. Every control step is recorded all the same."""
    noise_decay: float = 0.15
    """Ornstein-Uhlenbeck: share of the noise forgotten at each action, in (0, 1]."""
    noise_scale: float = 1.0
    """Ornstein-Uhlenbeck: standard deviation of the stationary noise, before clipping to [-1, 1]."""
    seed: int = 0
    num_workers: int = 0
    """Simulator processes; 0 means one a core."""
    out: str = "data/exorl"
    """Folder that receives {domain}/{algorithm}/buffer/episode_*.npz."""
    exploration: ExplorationConfig = dataclasses.field(default_factory=ExplorationConfig)

    def __post_init__(self) -> None:
        positive(self, "num_steps", "action_repeat", "noise_scale")
        not_negative(self, "num_workers", "seed")
        if not 0 < self.noise_decay <= 1:
            raise ValueError(f"noise_decay must lie in (0, 1]; got {self.noise_decay}. 1 is white noise.")
        if self.is_learning and self.action_repeat != 1:
            raise ValueError(
                f"An explorer that learns acts at every control step; got action_repeat {self.action_repeat} with "
                f"{self.algorithm}. Leave action_repeat out, or collect with random or ornstein_uhlenbeck."
            )

    @property
    def is_learning(self) -> bool:
        """Whether the algorithm is an explorer that learns, rather than noise."""
        return self.algorithm in typing.get_args(ExplorerName)
