"""What a training step shared by N devices holds on each and sends between them, compiled and not run, and the plan.

One row of walker's sizes; N devices share matrices, and its tokens (context) or N rows (fsdp), or both. Any machine
does: the devices may be a processor's virtual ones. With --time the step is run too, which says nothing of
accelerators. Exits with 1 if a plan of memory is off by more than a tenth.

python benchmarks/mesh.py --out mesh.json
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

NUM_DEVICES = 8
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Before JAX is imported; accelerators, if there are any, are not meant.
    flag = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import jax  # noqa: E402

from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig  # noqa: E402
from bpt_rl.mesh_config import MeshConfig  # noqa: E402
from bpt_rl.run.bench_collectives import read_collectives  # noqa: E402
from bpt_rl.run.bench_execution import compile_program  # noqa: E402
from bpt_rl.run.bench_measurement import compiled_bytes  # noqa: E402
from bpt_rl.run.bench_subject import agent_subject  # noqa: E402
from bpt_rl.run.devices import this_device  # noqa: E402
from bpt_rl.run.plan import Rows, plan_step  # noqa: E402
from bpt_rl.run.synthetic import synthetic_statistics  # noqa: E402

MIB = 2**20
MOST_OFF = 0.1
MESHES = (
    {},
    *({"context": count, "attention": method} for method in ("ring", "ulysses") for count in (2, 4, 8)),
    *({"fsdp": count} for count in (2, 4, 8)),
    {"data": 2, "context": 4, "attention": "ring"},
    {"fsdp": 4, "context": 2, "attention": "ring"},
    {"data": 2, "fsdp": 2, "context": 2, "attention": "ulysses"},
)


def planned(config, num_rows, num_tokens):
    statistics = synthetic_statistics(config.data.task)
    rows = Rows(statistics=statistics, num_rows=num_rows, context_length=num_tokens, is_one_chain_a_row=True)
    return plan_step(config, rows, this_device()).level(config.model.activations)


def measured(options, mesh, activations):
    model = ModelConfig(
        layout="fused",
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        implementation="blockwise",
        activations=activations,
        dropout=0.0,
        query_chunk_size=128,
        key_chunk_size=128,
        feedforward_chunk_size=128,
    )
    optimizer = OptimizerConfig(num_steps=1_000_000)
    config = TrainConfig(data=DataConfig(task="walker_run"), model=model, optimizer=optimizer, mesh=mesh)
    num_rows = mesh.data * mesh.fsdp
    subject = agent_subject(config, options.context, num_rows)
    batch = subject.placed_batch()
    program = compile_program(subject, batch)
    asked, plan = compiled_bytes(*program.compiled), planned(config, num_rows, options.context)
    sent = read_collectives(program.compiled[0].as_text(), unknown_turns=max(0, mesh.context - 2))
    expected = {}
    for transfer in plan.traffic:
        count = expected.get(transfer.collective, 0)
        expected[transfer.collective] = count + transfer.count * transfer.num_bytes
    row = {
        "mesh": {"data": mesh.data, "fsdp": mesh.fsdp, "context": mesh.context, "attention": mesh.attention},
        "activations": activations,
        "rows": num_rows,
        "tokens": num_rows * options.context,
        "temporary_mib": round(asked.temporary / MIB, 2),
        "planned_temporary_mib": round(plan.memory.temporary / MIB, 2),
        "arguments_mib": round(asked.argument / MIB, 2),
        "planned_state_mib": round((plan.memory.parameters + plan.memory.optimizer) / MIB, 2),
        "collectives": {name: found.calls for name, found in sent.items()},
        "collective_mib": {name: round(found.num_bytes / MIB, 3) for name, found in sent.items()},
        "planned_collective_mib": {name: round(num_bytes / MIB, 3) for name, num_bytes in expected.items()},
    }
    if options.time:
        row |= timed(program, batch, options.time)
    return row


def timed(program, batch, num_steps):
    state, loss = program.call(program.make_state(), batch)
    jax.block_until_ready(loss)
    began = time.perf_counter()
    for _ in range(num_steps):
        state, loss = program.call(state, batch)
    jax.block_until_ready(loss)
    return {"seconds": round((time.perf_counter() - began) / num_steps, 4), "loss": float(loss)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=16_384, help="tokens a row")
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--activations", nargs="+", default=["recompute", "save_attention", "keep"])
    parser.add_argument("--time", type=int, default=0, help="steps to run and time")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    rows = []
    for activations in options.activations:
        for mesh in MESHES:
            rows.append(measured(options, MeshConfig(**mesh), activations))
            print(json.dumps(rows[-1]), flush=True)
    record = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, **vars(options), "steps": rows}
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")
    off = max(abs(row["planned_temporary_mib"] / row["temporary_mib"] - 1) for row in rows)
    print(f"Plans of temporary memory are off by at most {off:.1%}.")
    sys.exit(off > MOST_OFF)


if __name__ == "__main__":
    main()
