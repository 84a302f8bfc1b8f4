"""A trained run as an evaluation sees it: its newest checkpoint, and what it is asked and shown."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bpt_rl.agents.base import Agent, OfflineLearner, Params, Policy
from bpt_rl.agents.random import RandomPolicy
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import CHAIN_AGENTS, CONDITIONED_AGENTS, EvaluateConfig, TrainConfig
from bpt_rl.datasets.chains import Chain
from bpt_rl.datasets.store import Store
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn.chain_cache import CacheDevices
from bpt_rl.nn.device_mesh import make_mesh
from bpt_rl.run import conditioning, records
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.devices import this_device
from bpt_rl.run.episode_log import LogPlan
from bpt_rl.run.evaluation_record import SCHEMA
from bpt_rl.run.plan import size
from bpt_rl.run.rollout import Start
from bpt_rl.run.simulated_source import check_simulated
from bpt_rl.run.step import init_state, make_optimizer
from bpt_rl.run.train_td import restore_learner
from bpt_rl.td_config import TD_AGENTS
from bpt_rl.types import DataStatistics

FIRST_SEED = 1_000_000
"""Of the environments of a run that was trained with seed 0."""


def load_params(folder: records.RunFolder, mesh: MeshConfig | None = None) -> tuple[Agent, Params, int]:
    """Returns the agent of a run, its newest parameters and their gradient step.

    Args:
      folder: Of the run.
      mesh: Devices that the agent is to act with, whatever it was trained with; one if None.

    Raises:
      FileNotFoundError: If the folder is no run folder or holds no complete checkpoint.
      ValueError: If the checkpoint belongs to another architecture than the folder's configuration.
    """
    config = folder.config()
    config = dataclasses.replace(
        config,
        mesh=mesh or MeshConfig(),
        optimizer=dataclasses.replace(config.optimizer, place="device"),
    )
    agent = make_agent(config, folder.statistics())
    optimizer = make_optimizer(config.optimizer)
    template = jax.eval_shape(lambda: init_state(agent, optimizer, config.seed))
    # Nobody acts with moments: a device need not have room for them.
    unread = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), template.optimizer_state
    )
    with Checkpoints(folder.checkpoints_path, config.keep_checkpoints) as saved:
        if saved.latest_step is None:
            raise FileNotFoundError(
                f"A run must have a complete checkpoint to be evaluated; {folder.path} has none. "
                "Run the same `bpt-rl train` command again: it goes on from where it was."
            )
        state = saved.restore(saved.latest_step, template._replace(optimizer_state=unread))
        return agent, state.params, saved.latest_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """A run's newest checkpoint, and how it is to be asked."""

    config: EvaluateConfig
    trained: TrainConfig
    statistics: DataStatistics
    agent: Agent | OfflineLearner
    params: Params
    """Of an agent; all that a learner has learnt."""
    step: int
    expected_return: Path | None = None
    """What was to be expected of each step of the data, where the run was relabelled by it."""

    @classmethod
    def open(cls, folder: records.RunFolder, config: EvaluateConfig) -> "EvaluatedRun":
        """Returns the run's newest checkpoint.

        Raises:
          FileNotFoundError: If the folder is no run folder or has no checkpoint.
          ValueError: If the task has no simulator, or the agent cannot be asked so.
        """
        trained, statistics = folder.config(), folder.statistics()
        check_simulated(statistics.source)
        _check_devices(trained, config)
        agent: Agent | OfflineLearner
        if trained.agent in TD_AGENTS:
            agent, params, step = restore_learner(folder)
        else:
            agent, params, step = load_params(folder, config.mesh)
        is_expected = trained.data.relabel == "expected_return"
        subject = cls(
            config=config,
            trained=trained,
            statistics=statistics,
            agent=agent,
            params=params,
            step=step,
            expected_return=folder.expected_return_path if is_expected else None,
        )
        subject.check()
        return subject

    def check(self) -> None:
        """Refuses what would be found out only while chains are rolled out, or never."""
        config, given = self.config, self.config.num_context_trajectories
        if self.trained.agent not in CHAIN_AGENTS and (given or config.context_capacity):
            raise ValueError(
                f"Only contexts of agents {' and '.join(CHAIN_AGENTS)} hold trajectories; got num_context_trajectories "
                f"{given} and context_capacity {config.context_capacity} for agent {self.trained.agent!r}. Leave "
                "them out."
            )
        if not self.is_conditioned and config.target_sweep:
            raise ValueError(
                f"Only an agent that is asked for a return can be swept over targets; got {self.trained.agent!r}. "
                "Leave target_sweep out."
            )
        if self.capacity <= given:
            raise ValueError(
                "A context must have room for the trajectories it begins with and one episode; got "
                f"num_context_trajectories {given} and context_capacity {config.context_capacity}. Raise the capacity."
            )
        num_played = max(self.num_episodes, config.sweep_episodes if config.target_sweep else 0)
        if config.full_context == "refuse" and self.capacity < given + num_played:
            raise ValueError(
                "A context must hold the whole chain, since full_context is refuse; got context_capacity "
                f"{config.context_capacity} for {given} given and {num_played} played trajectories. Raise it, "
                "or set full_context to drop_oldest."
            )
        self._check_memory()

    def _check_memory(self) -> None:
        """Refuses caches that cannot fit their devices once chains are long, hours after the first step."""
        if not _has_cache(self.trained):
            return
        mesh, num_chains, device = self.config.mesh, self.config.num_chains, this_device()
        memory = device.memory // mesh.num_devices if device.is_host else device.memory
        num_trajectories = self.capacity if self.trained.agent in CHAIN_AGENTS else 1
        num_steps = num_trajectories * self.statistics.episode_steps
        needed = CacheDevices(model=self.trained.model, mesh=mesh).cache_bytes(num_chains, num_steps)
        if needed > memory:
            fewer = num_chains * memory // needed // mesh.data * mesh.data
            fewer_chains = f"Set num_chains to at most {fewer}" if fewer else "No single chain fits"
            raise ValueError(
                f"The caches of all chains must fit; got num_chains {num_chains} with contexts of {num_trajectories} "
                f"trajectories, whose keys and values take {size(needed)} of each device, and {size(memory)} of "
                f"{device.name}. {fewer_chains}; or share each cache among more devices, with mesh.context, or set "
                "context_capacity, and full_context to drop_oldest."
            )

    @property
    def is_conditioned(self) -> bool:
        """Whether the agent is asked for a return."""
        return self.trained.agent in CONDITIONED_AGENTS

    @property
    def num_episodes(self) -> int:
        """Episodes of a chain: as asked; else for `at` and `ad` those of training, for the others 4."""
        of_training = self.trained.data.num_trajectories if self.trained.agent in CHAIN_AGENTS else 4
        return self.config.num_episodes or of_training

    @property
    def capacity(self) -> int:
        """Trajectories that a context holds."""
        return self.config.context_capacity or self.config.num_context_trajectories + self.num_episodes

    @property
    def seed(self) -> int:
        """Seed of the environments and of drawn actions."""
        return FIRST_SEED + self.trained.seed if self.config.seed < 0 else self.config.seed

    @property
    def sample_seed(self) -> int | None:
        """Seed of drawn actions; None where the mean is taken."""
        has_head = (
            self.trained.agent not in TD_AGENTS and self.trained.model.action_distribution == "gaussian"
        )
        return self.seed if self.config.sample and has_head else None

    @functools.cached_property
    def target(self) -> tuple[float, str]:
        """The target return, and in words the rule it came from."""
        config, statistics = self.config, self.statistics
        if self.expected_return is not None:
            first = np.load(self.expected_return, mmap_mode="r")[:, 0]
            statistics = dataclasses.replace(statistics, returns=tuple(np.sort(first).tolist()))
        target, rule = conditioning.target_return(
            config.target_value if config.target == "explicit" else config.target,
            statistics,
            quantile=config.target_quantile,
            multiple=config.target_multiple,
        )
        # Nothing that training asked for was larger.
        return target, rule if self.expected_return is None else rule.replace("return", "expected return")

    def policy(self, *, clear_context: bool = False) -> Policy:
        """Returns the agent's policy; the memoryless control if its context is to be cleared."""
        if isinstance(self.agent, OfflineLearner):
            return self.agent.policy(self.params)
        return self.agent.policy(
            self.params,
            num_episodes=self.capacity - self.config.num_context_trajectories,
            clear_context=clear_context,
            full_context=self.config.full_context,
            sample_seed=self.sample_seed,
        )

    def contexts(self, target: float) -> Sequence[Chain] | None:
        """Returns what each chain's context begins with, asked for a target.

        Raises:
          FileNotFoundError: If the training data are not where they were.
          ValueError: If other data lie there, or too few episodes.
        """
        config, data = self.config, self.trained.data
        if config.context_order == "none":
            return None
        with Store.open(data.store) as store:
            if store.digest != self.statistics.digest:
                raise ValueError(
                    f"A context's trajectories must be of the training data, digest {self.statistics.digest[:8]}; "
                    f"{data.store} has {store.digest[:8]}. Build the store again as it was."
                )
            return conditioning.context_chains(
                store,
                data,
                num_trajectories=config.num_context_trajectories,
                order=config.context_order,
                target_return=target,
                num_chains=config.num_chains,
                seed=self.seed,
                expected_return=self.expected_return,
            )

    def plan(self, name: str, target: float, num_episodes: int) -> LogPlan:
        """Returns what to roll out; of a policy that is asked for nothing the target is NaN."""
        is_random, num_chains = name == "random", self.config.num_chains
        start = Start(
            seed=self.seed,
            target_return=target if self.is_conditioned and not is_random else math.nan,
            contexts=None if is_random else self.contexts(target),
            num_episodes=num_episodes,
        )
        # What draws its actions draws for all chains at once, and devices that share chains share all of them. On an
        # accelerator two calls for half of the chains take so much longer than one for all that no turns make up
        # for it.
        is_shared = jax.default_backend() != "cpu" or self.config.mesh.num_devices > 1
        is_whole = is_random or self.sample_seed is not None or is_shared
        return LogPlan(
            task=self.statistics.task,
            num_episodes=num_episodes,
            num_chains=num_chains,
            action_repeat=self.statistics.action_repeat,
            context=name,
            start=start,
            num_parts=1 if is_whole else min(2, num_chains),
        )

    def forgets(self, name: str) -> bool:
        """Returns whether the policy of that log knows nothing of the episodes before, and of no given context."""
        knows = self.trained.agent in CHAIN_AGENTS and name not in ("memoryless", "random")
        return not knows and self.config.context_order == "none"

    def policies(self) -> dict[str, Policy]:
        """Returns what is rolled out over whole chains, by the name of its log."""
        policies: dict[str, Policy] = {"chain": self.policy()}
        if self.config.memoryless and self.trained.agent in CHAIN_AGENTS and self.num_episodes > 1:
            policies["memoryless"] = self.policy(clear_context=True)
        if self.config.random:
            policies["random"] = RandomPolicy(self.statistics.action_dim, self.seed)
        return policies

    def journal_key(self) -> dict[str, Any]:
        """Returns all that the numbers depend on; in how many processes they come about does not count."""
        weights = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            weights.update(np.asarray(leaf).tobytes())
        statistics = self.statistics
        return {
            "parameters": weights.hexdigest(),
            "evaluate": repr(dataclasses.replace(self.config, num_workers=0)),
            "mesh": repr(self.config.mesh),
            "train": repr(self.trained),
            "num_episodes": self.num_episodes,
            "data": [statistics.task, statistics.action_repeat, statistics.digest, statistics.subset_digest],
            "versions": records.versions(),
            "device": jax.devices()[0].device_kind,
            "schema": SCHEMA,
        }


def _check_devices(trained: TrainConfig, config: EvaluateConfig) -> None:
    """Refuses devices that cannot share the chains of a run's agent, or are not there."""
    if config.mesh.num_devices == 1:
        return
    if not _has_cache(trained):
        raise ValueError(
            "Devices share the caches of agents with a transformer that see whole episodes; got "
            f"agent {trained.agent!r} and data.window {trained.data.window} for mesh {config.mesh}. Leave mesh.* out."
        )
    CacheDevices(model=trained.model, mesh=config.mesh).check_rows(config.num_chains)
    make_mesh(config.mesh)


def _has_cache(trained: TrainConfig) -> bool:
    return trained.agent in (*CHAIN_AGENTS, *CONDITIONED_AGENTS) and not trained.data.window
