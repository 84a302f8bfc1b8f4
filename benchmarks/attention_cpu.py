"""Blockwise against reference attention on the CPU: time and temporary memory of a training pass.

    JAX_PLATFORMS=cpu python benchmarks/attention_cpu.py

prints one row a length: causal, float32, heads of 64, forward and backward. Times are the best of five runs, the
implementations taking turns, so that other load on the machine meets both alike.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from bpt_rl.nn.attention import dot_product_attention

SHAPES = [(8, 250), (8, 500), (8, 1000), (4, 2000), (1, 4000), (1, 8000)]
"""Rows of the batch, tokens."""
NUM_RUNS = 5


def compile_training_pass(implementation: str, shape: tuple[int, ...]) -> Any:
    attend = functools.partial(dot_product_attention, implementation=implementation)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(attend(query, key, value) ** 2)

    operand = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(operand, operand, operand).compile()


def best_seconds(passes: list[Callable[..., Any]], operands: list[jax.Array]) -> list[float]:
    seconds = [[] for _ in passes]
    for _ in range(NUM_RUNS + 1):  # The first run warms up; it is never the best.
        for run, runs in zip(passes, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            runs.append(time.perf_counter() - start)
    return [min(runs) for runs in seconds]


def main() -> None:
    table = Table(title=f"Attention, forward and backward, on {jax.default_backend()}")
    for heading in (
        "batch",
        "tokens",
        "reference ms",
        "blockwise ms",
        "time ratio",
        "reference MiB",
        "blockwise MiB",
    ):
        table.add_column(heading, justify="right")
    for batch, length in SHAPES:
        shape = (batch, length, 1, 64)
        operands = [jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32) for i in range(3)]
        passes = [
            compile_training_pass(implementation, shape) for implementation in ("reference", "blockwise")
        ]
        reference, blockwise = best_seconds(passes, operands)
        mebibytes = [run.memory_analysis().temp_size_in_bytes / 2**20 for run in passes]
        table.add_row(
            str(batch),
            str(length),
            f"{1000 * reference:.1f}",
            f"{1000 * blockwise:.1f}",
            f"{blockwise / reference:.2f}",
            *(f"{size:.1f}" for size in mebibytes),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
