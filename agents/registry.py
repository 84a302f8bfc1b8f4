"""Agents and explorers by name."""

from collections.abc import Callable, Mapping

from bpt_rl.agents.agentic_transformer import AgenticTransformer
from bpt_rl.agents.algorithm_distillation import AlgorithmDistillation
from bpt_rl.agents.aps import Aps
from bpt_rl.agents.base import Agent, Explorer, OfflineLearner
from bpt_rl.agents.behaviour_cloning import BehaviourCloning
from bpt_rl.agents.cql import CQL
from bpt_rl.agents.crr import CRR
from bpt_rl.agents.decision_transformer import DecisionTransformer
from bpt_rl.agents.diayn import Diayn
from bpt_rl.agents.disagreement import Disagreement
from bpt_rl.agents.icm import Icm
from bpt_rl.agents.icm_apt import IcmApt
from bpt_rl.agents.iql import IQL
from bpt_rl.agents.proto import Proto
from bpt_rl.agents.rnd import Rnd
from bpt_rl.agents.smm import Smm
from bpt_rl.agents.td3 import TD3
from bpt_rl.agents.td3_bc import TD3BC
from bpt_rl.collect_config import ExplorationConfig, ExplorerName
from bpt_rl.config import TrainConfig
from bpt_rl.td_config import TDAgentName, TDConfig
from bpt_rl.types import DataStatistics


def make_agent(config: TrainConfig, statistics: DataStatistics) -> Agent:
    """Returns the agent that a configuration names, for data of these statistics.

    Raises:
      ValueError: If it is one of those that learn from single transitions: `make_learner` makes them.
    """
    agents: Mapping[str, Callable[[TrainConfig, DataStatistics], Agent]] = {
        "at": AgenticTransformer,
        "dt": DecisionTransformer,
        "ad": AlgorithmDistillation,
        "bc": BehaviourCloning,
    }
    if config.agent not in agents:
        raise ValueError(
            f"Here an agent must learn from trajectories: {', '.join(agents)}; got {config.agent!r}, which learns "
            "from single transitions. Choose another."
        )
    return agents[config.agent](config, statistics)


def make_learner(
    name: TDAgentName, config: TDConfig, observation_dim: int, action_dim: int
) -> OfflineLearner:
    """Returns the learner of that name, for observations and actions of these lengths."""
    learners: Mapping[TDAgentName, Callable[[TDConfig, int, int], OfflineLearner]] = {
        "td3": TD3,
        "td3_bc": TD3BC,
        "crr": CRR,
        "cql": CQL,
        "iql": IQL,
    }
    return learners[name](config, observation_dim, action_dim)


def make_explorer(
    name: ExplorerName, config: ExplorationConfig, observation_dim: int, action_dim: int
) -> Explorer:
    """Returns the explorer of that name, for observations and actions of these lengths."""
    explorers: Mapping[ExplorerName, Callable[[ExplorationConfig, int, int], Explorer]] = {
        "rnd": Rnd,
        "icm": Icm,
        "disagreement": Disagreement,
        "icm_apt": IcmApt,
        "proto": Proto,
        "diayn": Diayn,
        "aps": Aps,
        "smm": Smm,
    }
    return explorers[name](config, observation_dim, action_dim)
