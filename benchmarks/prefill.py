"""Given trajectories put into a context by one pass, against decoding the same steps one by one.

    JAX_PLATFORMS=cpu python benchmarks/prefill.py --num-trajectories 2

prints one row a layout: a model of 3 layers, 128 wide, one context, trajectories of 1000 steps. Times are the best of
three runs, the two ways taking turns, compilation not counted; decoding includes what `act` does on the host. To
forget the oldest trajectory costs such a pass over the others.
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from bpt_rl.config import ModelConfig
from bpt_rl.datasets.chains import Chain, build_chain
from bpt_rl.nn.cached_policy import CachedPolicy
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.types import LAYOUTS, Trajectory

OBSERVATION_DIM, ACTION_DIM, EPISODE_STEPS = 24, 6, 1000
NUM_RUNS = 3


def drawn_chain(num_trajectories: int) -> Chain:
    generator = np.random.default_rng(0)
    rows = EPISODE_STEPS + 1

    def trajectory() -> Trajectory:
        return Trajectory(
            observation=generator.normal(size=(rows, OBSERVATION_DIM)).astype(np.float32),
            action=generator.uniform(-1, 1, (rows, ACTION_DIM)).astype(np.float32),
            reward=np.zeros((rows, 1), np.float32),
            discount=np.ones((rows, 1), np.float32),
            physics=np.zeros((rows, 2)),
            task_reward={"task": np.append(0, generator.random(EPISODE_STEPS)).astype(np.float32)},
        )

    return build_chain([trajectory() for _ in range(num_trajectories)], "task")


def make_policy(layout: str, **options: object) -> CachedPolicy:
    model = TrajectoryModel(
        ModelConfig(layout=layout), OBSERVATION_DIM, ACTION_DIM, EPISODE_STEPS, nnx.Rngs(0)
    )
    graph, params = nnx.split(model)
    normalizer = Normalizer(
        observation_mean=np.zeros(OBSERVATION_DIM, np.float32),
        observation_std=np.ones(OBSERVATION_DIM, np.float32),
        return_scale=1000.0,
        reward_scale=1.0,
    )
    return CachedPolicy(graph, params, normalizer, clear_context=False, completion="per_episode", **options)


def decode(policy: CachedPolicy, chain: Chain) -> None:
    carry = policy.start(1)
    for t in range(chain.num_steps):
        carry, _ = policy.act(carry, chain.observation[None, t], chain.return_to_go[None, t])
        carry = policy.observe(carry, chain.reward[None, t], chain.step[None, t] == EPISODE_STEPS - 1)
    jax.block_until_ready(carry.cache)


def prefill(policy: CachedPolicy, chain: Chain) -> None:
    jax.block_until_ready(policy.start(1, [chain]).cache)


def best_seconds(ways: list[Callable[[], None]]) -> list[float]:
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(NUM_RUNS + 1):  # The first run compiles; it is never the best.
        for way, runs in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            runs.append(time.perf_counter() - start)
    return [min(runs[1:]) for runs in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-trajectories", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    arguments = parser.parse_args()
    chain = drawn_chain(arguments.num_trajectories)
    table = Table(title=f"Filling a context, on {jax.default_backend()}")
    for heading in ("layout", "tokens", "decoding s", "one pass s", "ratio"):
        table.add_column(heading, justify="right")
    for layout in arguments.layouts:
        decoding = make_policy(layout, num_episodes=arguments.num_trajectories)
        filling = make_policy(layout, num_episodes=1)
        ways = [lambda: decode(decoding, chain), lambda: prefill(filling, chain)]  # noqa: B023 - called here
        seconds = best_seconds(ways)
        tokens = chain.num_steps * LAYOUTS[layout]
        cells = [f"{value:.3f}" for value in seconds]
        table.add_row(layout, f"{tokens:,}", *cells, f"{seconds[0] / seconds[1]:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
