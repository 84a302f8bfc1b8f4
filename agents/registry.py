"""Agents by name."""

from bpt_rl.agents.agentic_transformer import AgenticTransformer
from bpt_rl.agents.base import Agent
from bpt_rl.agents.behaviour_cloning import BehaviourCloning
from bpt_rl.agents.decision_transformer import DecisionTransformer
from bpt_rl.config import TrainConfig
from bpt_rl.types import DataStatistics


def make_agent(config: TrainConfig, statistics: DataStatistics) -> Agent:
    """Returns the agent that a configuration names, for data of these statistics."""
    agents: dict[str, type[AgenticTransformer] | type[DecisionTransformer] | type[BehaviourCloning]] = {
        "at": AgenticTransformer,
        "dt": DecisionTransformer,
        "bc": BehaviourCloning,
    }
    return agents[config.agent](config, statistics)
