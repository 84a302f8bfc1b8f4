"""Attention alone, forward and with its backward pass, each implementation beside the others."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jaxtyping import Float

from bpt_rl.bench_config import AttentionBenchConfig
from bpt_rl.config import Implementation
from bpt_rl.nn.attention import dot_product_attention
from bpt_rl.run.bench_measurement import FAILURES, compiled_bytes, failure_of, median_seconds
from bpt_rl.run.bench_record import Column

Tensor = Float[jax.Array, "B S _ K"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One measurement. None: not measured, for the reason in `failure`."""

    tokens: int
    implementation: Implementation
    forward_seconds: float | None = None
    forward_flops_per_second: float | None = None
    both_seconds: float | None = None
    """Forward and backward pass: the gradients of query, key and value."""
    both_flops_per_second: float | None = None
    """Counts three times the forward pass, and nothing that is computed again."""
    temporary_bytes: int | None = None
    """Of the two passes together, beside operands and gradients."""
    failure: str = ""


ATTENTION_COLUMNS = (
    Column(heading="tokens", field="tokens"),
    Column(heading="attention", field="implementation"),
    Column(heading="forward ms", field="forward_seconds", divisor=1e-3, digits=3),
    Column(heading="TFLOP/s", field="forward_flops_per_second", divisor=1e12, digits=3),
    Column(heading="forward+backward ms", field="both_seconds", divisor=1e-3, digits=3),
    Column(heading="TFLOP/s", field="both_flops_per_second", divisor=1e12, digits=3),
    Column(heading="temporary MiB", field="temporary_bytes", divisor=2**20, digits=1),
    Column(heading="failure", field="failure"),
)


def forward_flops(config: AttentionBenchConfig, num_tokens: int) -> int:
    """Returns the operations of causal attention, 2 x 2 x S^2 x K / 2 a head: half of both products is masked."""
    return 2 * config.num_rows * config.num_heads * config.head_dim * num_tokens**2


def measure_attention(config: AttentionBenchConfig) -> Iterator[AttentionRow]:
    """Yields a row for each length and implementation, as soon as it is measured."""
    for num_tokens, implementation in itertools.product(config.tokens, config.implementations):
        row = AttentionRow(tokens=num_tokens, implementation=implementation)
        try:
            yield _measure(row, config)
        except FAILURES as error:
            yield dataclasses.replace(row, failure=failure_of(error))


def _measure(row: AttentionRow, config: AttentionBenchConfig) -> AttentionRow:
    attend = functools.partial(
        dot_product_attention,
        implementation=row.implementation,
        query_chunk_size=config.chunk_size,
        key_chunk_size=config.chunk_size,
    )
    shape = AttentionShape(
        num_rows=config.num_rows,
        num_tokens=row.tokens,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=config.dtype,
    )
    times = time_attention(attend, shape, config.num_calls)
    flops = forward_flops(config, row.tokens)
    return dataclasses.replace(
        row,
        forward_seconds=times.forward,
        forward_flops_per_second=flops / times.forward,
        both_seconds=times.both,
        both_flops_per_second=3 * flops / times.both,
        temporary_bytes=times.temporary_bytes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Operands of attention."""

    num_rows: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str


class AttentionTimes(NamedTuple):
    """Seconds of a call, and bytes."""

    forward: float
    both: float
    """With the gradients of query, key and value."""
    temporary_bytes: int | None
    """Of the two passes together."""


def time_attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], shape: AttentionShape, num_calls: int
) -> AttentionTimes:
    """Returns medians over calls on random operands; a call of five seconds is made once, and no other before it."""

    def both(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        _, gradients_of = jax.vjp(attend, query, key, value)
        return tuple(gradients_of(gradient))

    query, key, value, gradient = _operands(shape)
    forward = jax.jit(attend).lower(query, key, value).compile()
    backward = jax.jit(both).lower(query, key, value, gradient).compile()
    return AttentionTimes(
        median_seconds(lambda: forward(query, key, value), num_calls, enough=5),
        median_seconds(lambda: backward(query, key, value, gradient), num_calls, enough=5),
        compiled_bytes(backward).temporary,
    )


def _operands(shape: AttentionShape) -> list[Tensor]:
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    keys = jax.random.split(jax.random.key(0), len(heads))
    return [
        jax.random.normal(key, (shape.num_rows, shape.num_tokens, count, shape.head_dim), shape.dtype)
        for key, count in zip(keys, heads, strict=True)
    ]
