"""What a training step shared by N devices holds on each and sends between them, compiled and not run.

One row of walker's sizes; N devices share its tokens, or its rows and matrices (fsdp, N rows). Any machine does: the
devices may be a processor's virtual ones. With --time the step is run too, which says nothing of accelerators.

python benchmarks/mesh.py --out mesh.json
"""

import argparse
import collections
import json
import os
import re
import time
from pathlib import Path

COUNTS = (1, 2, 4, 8)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Before JAX is imported; accelerators, if there are any, are not meant.
    flag = f"--xla_force_host_platform_device_count={max(COUNTS)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import jax  # noqa: E402

from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig  # noqa: E402
from bpt_rl.mesh_config import MeshConfig  # noqa: E402
from bpt_rl.nn.device_mesh import make_mesh  # noqa: E402
from bpt_rl.run.bench_subject import agent_subject  # noqa: E402
from bpt_rl.run.step import compile_step, placed_state  # noqa: E402

COLLECTIVES = ("collective-permute", "all-to-all", "all-gather", "reduce-scatter", "all-reduce")


def measured(options, mesh, num_rows):
    model = ModelConfig(
        layout="fused",
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        implementation="blockwise",
        activations="recompute",
        dropout=0.0,
        query_chunk_size=128,
        key_chunk_size=128,
        feedforward_chunk_size=128,
    )
    optimizer = OptimizerConfig(num_steps=1_000_000)
    config = TrainConfig(data=DataConfig(task="walker_run"), model=model, optimizer=optimizer, mesh=mesh)
    subject = agent_subject(config, options.context, num_rows)
    shared = make_mesh(mesh) if mesh.num_devices > 1 else None
    everywhere = jax.sharding.NamedSharding(shared, jax.sharding.PartitionSpec()) if shared else None
    batch, key = (jax.device_put(tree, everywhere) for tree in (subject.make_batch(), jax.random.key(0)))
    step = compile_step(subject.agent, optimizer, batch, key, mesh=shared)
    [program] = step.programs
    memory, text = program.memory_analysis(), program.as_text()
    names = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    row = {
        "mesh": {"data": mesh.data, "fsdp": mesh.fsdp, "context": mesh.context, "attention": mesh.attention},
        "rows": num_rows,
        "tokens": num_rows * options.context,
        "temporary_mib": round(memory.temp_size_in_bytes / 2**20, 2),
        "arguments_mib": round(memory.argument_size_in_bytes / 2**20, 2),
        "collectives": dict(collections.Counter(names)),
    }
    if options.time:
        state = placed_state(subject.agent, optimizer, 0, shared)
        state, metrics = step(state, batch, key)
        jax.block_until_ready(metrics)
        began = time.perf_counter()
        for _ in range(options.time):
            state, metrics = step(state, batch, key)
        jax.block_until_ready(metrics)
        row["seconds"] = round((time.perf_counter() - began) / options.time, 4)
        row["loss"] = float(metrics["loss"])
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=16_384, help="tokens a row")
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--time", type=int, default=0, help="steps to run and time")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    rows = []
    for axis, attention in (("context", "ring"), ("context", "ulysses"), ("fsdp", "auto")):
        for count in COUNTS:
            mesh = MeshConfig(**{axis: count}, attention=attention)
            row = measured(options, mesh, count if axis == "fsdp" else 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, **vars(options), "steps": rows}
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
