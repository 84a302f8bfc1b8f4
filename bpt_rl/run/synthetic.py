"""What stands in for data where only sizes matter: plans and benchmarks need no store."""

from bpt_rl.envs.tasks import DOMAINS, domain_of
from bpt_rl.types import DataStatistics


def synthetic_statistics(task: str) -> DataStatistics:
    """Returns statistics in the sizes of a task's domain, of data that needs no scaling.

    Raises:
      FileNotFoundError: If the task names a file that is not there.
      ValueError: If the task is unknown or malformed.
    """
    domain = DOMAINS[domain_of(task)]
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
