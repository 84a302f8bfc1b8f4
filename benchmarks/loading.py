"""Packing a batch in each place that episodes may be kept: against memcpy, from disk, and on the accelerator.

    python benchmarks/loading.py --out loading.json

makes a store of 1000 episodes of 1000 steps in walker's sizes (numbers drawn, nothing simulated) and prints medians for
batches of 32 trajectories. "memcpy" copies as many bytes as the batch has, in one piece, from an array as large as the
episodes; it and the host's path take turns, so that other load on the machine meets both alike. "cold" drops the file
from the page cache before each batch. On an accelerator the training step of the paper's model on that batch is timed
too (four tokens a step, 128,000 tokens, bfloat16); --step does so on a CPU as well, where it takes minutes.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from bpt_rl import config_toml
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import DataConfig, TrainConfig
from bpt_rl.datasets.places import BatchSource, open_place
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.store_writer import StorePlan, write_store
from bpt_rl.types import Trajectory

TASK = "walker_run"
LAYOUT = "return_state_action_reward"


def synthetic_episode(seed: int, *, num_steps: int) -> Trajectory:
    """Returns an episode in walker's sizes; physics, which no batch holds, is left empty."""
    generator = np.random.default_rng(seed)
    rows = num_steps + 1
    return Trajectory(
        observation=generator.normal(size=(rows, 24)).astype(np.float32),
        action=generator.uniform(-1, 1, (rows, 6)).astype(np.float32),
        reward=np.zeros((rows, 1), np.float32),
        discount=np.ones((rows, 1), np.float32),
        physics=np.zeros((rows, 0)),
        features=np.zeros((rows, 0)),
        task_reward={TASK: np.append(0, generator.random(num_steps)).astype(np.float32)},
    )


def make_store(folder: Path, num_episodes: int, num_steps: int) -> Path:
    plan = StorePlan(
        out=folder / "store.h5",
        domain="walker",
        source="synthetic",
        subset="full",
        tasks=(TASK,),
        action_repeat=1,
        feature_names=(),
        episode_names=[f"synthetic/{i}" for i in range(num_episodes)],
        num_steps=np.full(num_episodes, num_steps),
        fingerprint="",
    )
    prepare = functools.partial(synthetic_episode, num_steps=num_steps)
    return write_store(plan, range(num_episodes), prepare, num_workers=1, report_progress=lambda done: None)


def median_ms(count: int, *actions: Callable[[int], Any]) -> list[float]:
    """Returns the median milliseconds of each action, the actions taking turns; the first turn warms up."""
    seconds: list[list[float]] = [[] for _ in actions]
    for i in range(count + 1):
        for action, times in zip(actions, seconds, strict=True):
            began = time.perf_counter()
            result = action(i)
            times.append(time.perf_counter() - began)
            del result  # Freed outside the clock.
    return [1000 * statistics.median(times[1:]) for times in seconds]


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_host(sampler: ChainSampler, source: BatchSource, count: int) -> dict[str, float]:
    host = open_place("host", source)
    plans = [sampler.plan(i) for i in range(count + 1)]
    num_bytes = sum(array.nbytes for array in host.gather(plans[0]))
    generator = np.random.default_rng(0)
    episodes = generator.random(source.num_bytes // 8).view(np.uint8)
    offsets = generator.integers(0, episodes.size - num_bytes, count + 1)
    reused = np.empty(num_bytes, np.uint8)
    into_reused, into_fresh, pack, draw_and_pack = median_ms(
        count,
        lambda i: np.copyto(reused, episodes[offsets[i] : offsets[i] + num_bytes]),
        lambda i: episodes[offsets[i] : offsets[i] + num_bytes].copy(),
        lambda i: host.gather(plans[i]),
        lambda i: host.gather(sampler.plan(i)),
    )
    return {
        "batch MB": num_bytes / 1e6,
        "memcpy into reused memory ms": into_reused,
        "memcpy into fresh memory ms": into_fresh,
        "host: pack ms": pack,
        "host: draw and pack ms": draw_and_pack,
        "host: pack, share of memcpy speed (fresh)": into_fresh / pack,
        "host: draw and pack, share of memcpy speed (fresh)": into_fresh / draw_and_pack,
    }


def measure_stream(sampler: ChainSampler, source: BatchSource, count: int) -> dict[str, float]:
    stream, path = open_place("stream", source), source.store.path
    cold = []
    for i in range(count):
        drop_from_page_cache(path)
        began = time.perf_counter()
        stream.gather(sampler.plan(i))
        cold.append(time.perf_counter() - began)
    [warm] = median_ms(count, lambda i: stream.gather(sampler.plan(i % count)))
    return {
        "stream: cold batches/s": 1 / statistics.median(cold),
        "stream: warm batches/s": 1000 / warm,
    }


def measure_accelerator(sampler: ChainSampler, source: BatchSource, count: int) -> dict[str, float]:
    accelerator = open_place("accelerator", source)
    plans = [sampler.plan(i) for i in range(count + 1)]

    def gather_many(_: int) -> None:
        jax.block_until_ready([accelerator.gather(plan) for plan in plans[:20]][-1])

    blocked, many = median_ms(
        count, lambda i: jax.block_until_ready(accelerator.gather(plans[i])), gather_many
    )
    return {"accelerator: one batch, waited for, ms": blocked, "accelerator: one of 20 batches ms": many / 20}


def measure_step(config: TrainConfig, source: BatchSource, batch: Any, count: int) -> dict[str, float]:
    agent = make_agent(config, source.store.statistics(TASK))
    optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.adamw(1e-4))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any, key: jax.Array) -> Any:
        params, optimizer_state = state
        gradient, _ = jax.grad(agent.loss, has_aux=True)(params, batch, key)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state

    params = agent.init(jax.random.key(0))
    state = [(params, optimizer.init(params))]

    def take(i: int) -> None:
        state[0] = jax.block_until_ready(step(state[0], batch, jax.random.key(i)))

    return {"training step ms": median_ms(count, take)[0]}


def measure(arguments: argparse.Namespace, path: Path) -> dict[str, float]:
    data = DataConfig(task=TASK, num_trajectories=32, batch_size=1, place="stream")
    with Store.open(path) as store:
        sampler = ChainSampler(store, data, LAYOUT, seed=0)
        source = BatchSource(
            store=store,
            task=TASK,
            episodes=np.arange(store.num_episodes),
            num_rows=sampler.num_rows,
            steps_per_row=sampler.context_length // 4,
        )
        numbers = measure_host(sampler, source, arguments.batches)
        numbers |= measure_stream(sampler, source, arguments.batches)
        numbers |= measure_accelerator(sampler, source, arguments.batches)
        if arguments.step or jax.default_backend() != "cpu":
            paper = config_toml.load(TrainConfig, "at_paper")
            model = dataclasses.replace(paper.model, compute_dtype="bfloat16")
            config = dataclasses.replace(paper, data=data, model=model)
            batch = sampler.batch(0)
            if sampler.is_one_chain_a_row:  # As training does.
                batch = batch._replace(segment_ids=None)
            numbers |= measure_step(config, source, batch, 5)
            gather = numbers["accelerator: one batch, waited for, ms"]
            numbers["accelerator: share of the training step"] = gather / numbers["training step ms"]
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000, help="of an episode")
    parser.add_argument("--batches", type=int, default=200, help="that each median is of")
    parser.add_argument("--step", action="store_true", help="time the training step on a CPU as well")
    parser.add_argument(
        "--folder", type=Path, help="where the store is made; a temporary folder if not given"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        numbers = measure(arguments, make_store(Path(folder), arguments.episodes, arguments.steps))
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    table = Table("measured", "median", title=f"32 trajectories of {arguments.steps} steps a batch, {device}")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4g}")
    Console(width=100).print(table)
    if arguments.out:
        record = {"device": device, "cores": os.cpu_count(), "machine": platform.machine(), **numbers}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
