"""What stands in for data where only sizes matter: plans and benchmarks need no store."""

from bpt_rl.envs.tasks import Domain
from bpt_rl.types import DataStatistics


def synthetic_statistics(task: str, domain: Domain) -> DataStatistics:
    """Returns statistics in the sizes of a domain, of data that needs no scaling."""
    return DataStatistics(
        task=task,
        observation_mean=(0.0,) * domain.observation_dim,
        observation_std=(1.0,) * domain.observation_dim,
        action_dim=domain.action_dim,
        action_repeat=1,
        episode_steps=domain.episode_steps,
        returns=(1.0,),
        reward_abs_max=1.0,
        num_episodes=1,
        source="synthetic",
        subset="full",
        subset_digest="",
        digest="",
    )
