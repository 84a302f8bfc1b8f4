"""What the code that shares a training step among devices costs where there is one: the same step, by turns.

Training on one device takes the plain path, so that a mesh of one costs nothing. Here the others are taken nonetheless:
shared, under shard_map over a mesh of one device; ring and ulysses, with attention over a context axis of one besides.
Programs are compared as compiled, too. Exits with 1 if shared takes 2% more than plain.

python benchmarks/mesh_of_one.py --out mesh_of_one.json
"""

import argparse
import collections
import json
import re
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bpt_rl.agents.registry import make_agent
from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.nn import loss_over_devices as over_devices
from bpt_rl.nn.context_parallel import ContextAxis
from bpt_rl.nn.device_mesh import BATCH_SPEC, CONTEXT, Sharing, make_mesh
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.run.bench_subject import agent_subject
from bpt_rl.run.step import compile_step, placed_state
from bpt_rl.run.synthetic import synthetic_statistics

PATHS = ("plain", "shared", "ring", "ulysses")
MOST = 1.02


class SharedAgent:
    """An Agentic Transformer whose loss is that of a mesh, even of one device."""

    def __init__(self, config, data, method):
        self._agent, self._config, self._method = make_agent(config, data), config, method
        self._normalizer = Normalizer.from_statistics(data, config.return_scale)
        sizes = (data.observation_dim, data.action_dim, data.episode_steps)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: TrajectoryModel(config.model, *sizes, nnx.Rngs(0))))
        self.init = self._agent.init

    def loss(self, params, batch, key):
        axis = None
        if self._method != "shared":
            axis = ContextAxis(name=CONTEXT, num_devices=1, method=self._method)
        forced = Sharing(context=axis, matrix_axes=())
        with mock.patch.object(over_devices, "sharing_of", lambda *args, **kwargs: forced):
            loss = over_devices.loss_over_devices(
                self._graph,
                params,
                self._normalizer(batch),
                key,
                model=self._config.model,
                mesh=self._config.mesh,
            )
        return loss, {"loss": loss}


def prepared(path, options):
    """Returns a function that takes a step and waits for it, and what is known of the program."""
    model = ModelConfig(
        layout="fused",
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        compute_dtype=options.compute_dtype,
        activations=options.activations,
        dropout=options.dropout,
    )
    optimizer = OptimizerConfig(num_steps=1_000_000)
    config = TrainConfig(data=DataConfig(task="walker_run"), model=model, optimizer=optimizer)
    subject = agent_subject(config, options.tokens, 1)
    agent, mesh, place = subject.agent, None, None
    if path != "plain":
        data = synthetic_statistics(config.data.task)
        agent, mesh = SharedAgent(config, data, path), make_mesh(MeshConfig())
        place = NamedSharding(mesh, PartitionSpec(None, *BATCH_SPEC))
    batch = jax.device_put(subject.make_batch(), place)
    key = jax.device_put(jax.random.key(0), NamedSharding(mesh, PartitionSpec()) if mesh else None)
    began = time.perf_counter()
    step = compile_step(agent, optimizer, batch, key, kernel_dtype=options.compute_dtype, mesh=mesh)
    seconds = time.perf_counter() - began
    [program] = step.programs
    names = re.findall(r"= \S+ ([a-z-]+)\(", program.as_text())
    known = {
        "compile_seconds": round(seconds, 1),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "instructions": dict(sorted(collections.Counter(names).items())),
    }
    held = [placed_state(agent, optimizer, 0, mesh)]

    def take():
        held[0], metrics = step(held[0], batch, key)
        return float(metrics["loss"])

    return take, known


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--embed-dim", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--compute-dtype", default="bfloat16")
    parser.add_argument("--activations", default="recompute")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["plain", "shared"])
    parser.add_argument("--rounds", type=int, default=11, help="each a step of every path")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    steps, known, times, losses = {}, {}, {}, {}
    for path in options.paths:
        steps[path], known[path] = prepared(path, options)
        # The first step is slower than all others.
        losses[path], times[path] = [steps[path]()], []
    for number in range(options.rounds):
        for path in options.paths if number % 2 else reversed(options.paths):
            began = time.perf_counter()
            losses[path].append(steps[path]())
            times[path].append(time.perf_counter() - began)
    rows = {}
    for path in options.paths:
        ratios = [own / plain for own, plain in zip(times[path], times[options.paths[0]], strict=True)]
        rows[path] = {
            "step_seconds": round(statistics.median(times[path]), 5),
            "against_first": round(statistics.median(ratios), 4),
            "losses": losses[path][:3],
            **known[path],
        }
        print(path, json.dumps(rows[path]), flush=True)
    record = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, **vars(options), "paths": rows}
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    is_dear = {"plain", "shared"} <= rows.keys() and rows["shared"]["against_first"] > MOST
    sys.exit(int(is_dear))


if __name__ == "__main__":
    main()
