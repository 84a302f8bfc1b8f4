"""Environment steps a second of an agent in chains of episodes: cached, uncached, and what bounds them.

No chain is played whole. A step's time depends on how much the context holds, so steps are timed in contexts of
several lengths, and integrated over the chain: for the cached way by the midpoint rule, since a cache grows in stages;
for the uncached one by Gauss and Legendre's rule of three lengths, which is exact for what grows with the square of
the length. Contexts that were not played hold zeros, which take as long as other numbers.
"""

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from gymnasium.vector import VectorEnv
from jaxtyping import Bool, Float

from bpt_rl.agents.base import Policy
from bpt_rl.agents.random import RandomPolicy
from bpt_rl.bench_config import RolloutBenchConfig
from bpt_rl.envs.episodes import Part
from bpt_rl.envs.tasks import DOMAINS, Domain, domain_of, make_vector
from bpt_rl.nn.cached_policy import CachedCarry, CachedPolicy
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.run.bench_measurement import FAILURES, failure_of, median_seconds
from bpt_rl.run.bench_record import Column
from bpt_rl.run.bench_subject import synthetic_batch
from bpt_rl.run.rollout import Start, rollout
from bpt_rl.run.synthetic import synthetic_statistics
from bpt_rl.types import LAYOUTS

_NUM_WARMUP = 2
"""Steps that are not timed: the first grows the cache and compiles."""
_GAUSS_LEGENDRE = np.polynomial.legendre.leggauss(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutRow:
    """One measurement. Rates are environment steps a second of all chains together; None: not measured."""

    num_episodes: int
    """n, of a chain."""
    num_chains: int
    num_parts: int
    """Parts that chains act in: while one part's actions are computed, the others' simulators step."""
    tokens: int
    """Of a whole chain."""
    cache_bytes: int | None = None
    """Keys and values of all chains at their end."""
    cached_rate: float | None = None
    """Of rollouts as evaluations make them, over the chain."""
    uncached_rate: float | None = None
    """Of a forward pass over the whole chain so far at every step, over the chain; without physics."""
    speedup: float | None = None
    """`cached_rate` over `uncached_rate`."""
    physics_rate: float | None = None
    """Of the simulators alone, in the same processes and parts, under random actions."""
    decode_rate: float | None = None
    """Of the policy's calls alone, in the same parts, over the chain."""
    floor_share: float | None = None
    """`cached_rate` over the smaller of `physics_rate` and `decode_rate`."""
    positions: tuple[int, ...] = ()
    """Steps in the context where the cached way was timed."""
    cached_seconds: tuple[float, ...] = ()
    """Of a step of all chains, at each of them."""
    decode_seconds: tuple[float, ...] = ()
    uncached_positions: tuple[int, ...] = ()
    uncached_seconds: tuple[float, ...] = ()
    """Of a forward pass for all chains, at each of them; of `uncached_chains`, scaled up."""
    failure: str = ""


ROLLOUT_COLUMNS = (
    Column(heading="episodes", field="num_episodes"),
    Column(heading="chains", field="num_chains"),
    Column(heading="parts", field="num_parts"),
    Column(heading="tokens", field="tokens"),
    Column(heading="cache MiB", field="cache_bytes", divisor=2**20, digits=1),
    Column(heading="steps/s", field="cached_rate", digits=1),
    Column(heading="uncached", field="uncached_rate", digits=3),
    Column(heading="times", field="speedup"),
    Column(heading="physics alone", field="physics_rate", digits=1),
    Column(heading="decode alone", field="decode_rate", digits=1),
    Column(heading="% of floor", field="floor_share", divisor=0.01, digits=1),
    Column(heading="failure", field="failure"),
)


def measure_rollouts(config: RolloutBenchConfig) -> Iterator[RolloutRow]:
    """Yields a row for each number of episodes and of parts, as soon as it is measured."""
    task = config.train.data.task
    subject = _Subject.of(config)
    made = make_vector(task, config.num_chains, config.train.seed, num_workers=config.num_workers)
    with contextlib.closing(made) as environments:
        for num_episodes in config.num_episodes:
            uncached: dict[str, Any] = {}
            for num_parts in config.num_parts:
                row = RolloutRow(
                    num_episodes=num_episodes,
                    num_chains=config.num_chains,
                    num_parts=num_parts,
                    tokens=num_episodes * subject.domain.episode_steps * LAYOUTS[config.train.model.layout],
                )
                try:
                    row = _measure_cached(subject, row, environments)
                    if config.uncached:
                        uncached = uncached or _measure_uncached(subject, num_episodes)
                        row = _beside(row, uncached)
                    yield row
                except FAILURES as error:
                    yield dataclasses.replace(row, failure=failure_of(error))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Subject:
    """A freshly made model, and what is asked of it."""

    config: RolloutBenchConfig
    domain: Domain
    graph: nnx.GraphDef[Any]
    params: Any

    @classmethod
    def of(cls, config: RolloutBenchConfig) -> "_Subject":
        train = config.train
        domain = DOMAINS[domain_of(train.data.task)]
        sizes = (domain.observation_dim, domain.action_dim, domain.episode_steps)
        graph, params = nnx.split(TrajectoryModel(train.model, *sizes, nnx.Rngs(train.seed)))
        return cls(config=config, domain=domain, graph=graph, params=params)

    def policy(self, num_episodes: int) -> CachedPolicy:
        statistics = synthetic_statistics(self.config.train.data.task)
        return CachedPolicy(
            self.graph,
            self.params,
            Normalizer.from_statistics(statistics, self.config.train.return_scale),
            num_episodes=num_episodes,
            clear_context=False,
            completion=self.config.train.data.completion,
            mesh=self.config.train.mesh,
        )


@dataclasses.dataclass(frozen=True)
class _Onwards:
    """A policy whose contexts hold some steps from the start."""

    policy: CachedPolicy
    num_steps: int
    episode: int

    def start(self, num_environments: int, context: Any = None) -> CachedCarry:
        carry = self.policy.start(num_environments)
        end = carry.end
        held, episode = (np.full_like(end.num_steps, value) for value in (self.num_steps, self.episode))
        return carry._replace(end=end._replace(num_steps=held, episode=episode, previous_episode=episode))

    def act(
        self, carry: CachedCarry, observation: Float[np.ndarray, "B O"], return_to_go: Float[np.ndarray, "B"]
    ) -> tuple[CachedCarry, Float[jax.Array, "B A"]]:
        return self.policy.act(carry, observation, return_to_go)

    def observe(
        self, carry: CachedCarry, reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]
    ) -> CachedCarry:
        return self.policy.observe(carry, reward, done)


def _measure_cached(subject: _Subject, row: RolloutRow, environments: VectorEnv) -> RolloutRow:
    config, episode_steps = subject.config, subject.domain.episode_steps
    total = row.num_episodes * episode_steps
    num_timed = config.num_steps
    midpoints = [(2 * k + 1) * total // (2 * config.num_positions) for k in range(config.num_positions)]
    positions = [min(place, total - num_timed - _NUM_WARMUP) for place in midpoints]
    policy = subject.policy(row.num_episodes)
    random = RandomPolicy(subject.domain.action_dim, config.train.seed)
    physics, decode, cached, cache_bytes = [], [], [], 0
    for place in positions:
        onwards = _Onwards(policy, place, place // episode_steps)
        # In turn, so that a machine that others slow down slows all three.
        physics.append(rollout_seconds(random, environments, row.num_parts, num_timed))
        seconds, cache_bytes = _decode_seconds(onwards, subject, row, num_timed)
        decode.append(seconds)
        cached.append(rollout_seconds(onwards, environments, row.num_parts, num_timed))
    cached_rate = row.num_chains / statistics.mean(cached)
    physics_rate = row.num_chains / statistics.median(physics)
    decode_rate = row.num_chains / statistics.mean(decode)
    return dataclasses.replace(
        row,
        cached_rate=cached_rate,
        physics_rate=physics_rate,
        decode_rate=decode_rate,
        floor_share=cached_rate / min(physics_rate, decode_rate),
        cache_bytes=cache_bytes,
        positions=tuple(positions),
        cached_seconds=tuple(cached),
        decode_seconds=tuple(decode),
    )


def rollout_seconds(policy: Policy, environments: VectorEnv, num_parts: int, num_steps: int) -> float:
    """Returns the time of a step of all environments."""
    start = Start(seed=0, target_return=1.0)
    transitions = rollout(policy, environments, start, num_parts=num_parts)
    for _ in itertools.islice(transitions, num_parts * _NUM_WARMUP):
        pass
    began = time.perf_counter()
    for _ in itertools.islice(transitions, num_parts * num_steps):
        pass
    return (time.perf_counter() - began) / num_steps


def _decode_seconds(
    policy: _Onwards, subject: _Subject, row: RolloutRow, num_steps: int
) -> tuple[float, int]:
    """Returns the time of the policy's calls for a step of all chains, and the bytes of their caches."""
    sizes = [len(Part(first, row.num_parts).environments(row.num_chains)) for first in range(row.num_parts)]
    carries = [policy.start(size) for size in sizes]
    began = 0.0
    for t in range(_NUM_WARMUP + num_steps):
        if t == _NUM_WARMUP:
            began = time.perf_counter()
        for k, size in enumerate(sizes):
            observation = np.zeros((size, subject.domain.observation_dim), np.float32)
            carry, action = policy.act(carries[k], observation, np.ones(size))
            np.asarray(action)
            carries[k] = policy.observe(carry, np.zeros(size), np.zeros(size, np.bool_))
    seconds = (time.perf_counter() - began) / num_steps
    cached = [(carry.cache.keys, carry.cache.values) for carry in carries]
    return seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(cached))


def _beside(row: RolloutRow, uncached: dict[str, Any]) -> RolloutRow:
    return dataclasses.replace(row, **uncached, speedup=(row.cached_rate or 0.0) / uncached["uncached_rate"])


def _measure_uncached(subject: _Subject, num_episodes: int) -> dict[str, Any]:
    config = subject.config
    total = num_episodes * subject.domain.episode_steps
    nodes, weights = _GAUSS_LEGENDRE
    positions = [max(1, round(float((node + 1) / 2 * total))) for node in nodes]
    scale = config.num_chains / min(config.uncached_chains, config.num_chains)
    seconds = [scale * _forward_seconds(subject, place) for place in positions]
    mean = float(np.dot(weights, seconds) / 2)
    return {
        "uncached_rate": config.num_chains / mean,
        "uncached_positions": tuple(positions),
        "uncached_seconds": tuple(seconds),
    }


def _forward_seconds(subject: _Subject, num_steps: int) -> float:
    """Returns the time of one forward pass over contexts of so many steps, for the action of the last one."""
    config = subject.config
    num_rows = min(config.uncached_chains, config.num_chains)
    num_tokens = num_steps * LAYOUTS[config.train.model.layout]
    optimizer = dataclasses.replace(config.train.optimizer, accumulation=1)
    train = dataclasses.replace(config.train, optimizer=optimizer)
    batch = jax.tree.map(lambda leaf: leaf[0], synthetic_batch(train, subject.domain, num_tokens, num_rows))
    graph = subject.graph

    @jax.jit
    def last_action(params: Any, batch: Any) -> jax.Array:
        action: jax.Array = nnx.merge(graph, params)(batch).mean[:, -1]
        return action

    return median_seconds(lambda: last_action(subject.params, batch), 3, enough=5.0)
