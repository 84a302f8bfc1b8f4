"""Compiling a step and running it: what it asks for, what it takes, and how far that is from the floor."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from bpt_rl.agents.base import Params
from bpt_rl.datasets.capacity import GIB
from bpt_rl.run.bench_floor import KernelTimes, floor_seconds
from bpt_rl.run.bench_measurement import compiled_bytes, median_seconds, peak_bytes
from bpt_rl.run.bench_record import Column
from bpt_rl.run.bench_subject import Subject, first_loss
from bpt_rl.run.bench_trace import communication_of
from bpt_rl.run.step import compile_step, placed_state
from bpt_rl.types import PackedBatch

ENOUGH_SECONDS = 20.0
"""A step of this length is not repeated: beside it, what a first step does in addition is small."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of a step. None: not measured, for the reason in `failure`, or because it was only compiled."""

    compile_seconds: float | None = None
    device_bytes: int | None = None
    """All that the compiled step asks for on a device: arguments, temporaries and results of its own."""
    argument_bytes: int | None = None
    """Parameters, optimiser state and batch."""
    temporary_bytes: int | None = None
    """Gradients, kept activations and the rest, at the worst moment, as the compiler plans it."""
    host_bytes: int | None = None
    peak_bytes: int | None = None
    """Most bytes in use, as the device counts them; None too where an earlier row of this process needed as much."""
    step_seconds: float | None = None
    """Median; of a long step, the only one."""
    tokens_per_second: float | None = None
    model_flops_per_second: float | None = None
    """By `Subject.model_flops`; of a forward pass alone, a third of them."""
    matrix_flops_per_second: float | None = None
    """Of a large matrix product of the compute type, in the same run."""
    utilization: float | None = None
    """Model FLOP/s as a share of those of the matrix product, on each device."""
    attention_forward_seconds: float | None = None
    """Of one layer's attention alone, forward, in the same run."""
    attention_both_seconds: float | None = None
    """The same, forward and backward."""
    floor_seconds: float | None = None
    """Attention and matrix products of the step at the speed that each reaches alone, and nothing else."""
    floor_share: float | None = None
    """Floor over step."""
    communication_seconds: float | None = None
    """While a device sends or receives in one step, the mean over devices; of a profile, if one was asked for."""
    hidden_seconds: float | None = None
    """Of those, while it computes too."""
    losses: tuple[float, ...] = ()
    """Of all steps, those before the timed ones first, up to one that is not finite."""
    loss: float | None = None
    """Of the first step: the same for every row of the table that has as many tokens, but for rounding."""
    failure: str = ""


MEASURED_COLUMNS = (
    Column(heading="compile s", field="compile_seconds", digits=1),
    Column(heading="arguments GiB", field="argument_bytes", divisor=GIB, digits=3),
    Column(heading="temporary GiB", field="temporary_bytes", divisor=GIB, digits=3),
    Column(heading="host GiB", field="host_bytes", divisor=GIB, digits=3),
    Column(heading="peak GiB", field="peak_bytes", divisor=GIB, digits=3),
    Column(heading="step s", field="step_seconds", digits=3),
    Column(heading="tokens/s", field="tokens_per_second"),
    Column(heading="model TFLOP/s", field="model_flops_per_second", divisor=1e12, digits=3),
    Column(heading="MFU %", field="utilization", divisor=0.01, digits=1),
    Column(heading="of floor %", field="floor_share", divisor=0.01, digits=1),
    Column(heading="sending s", field="communication_seconds", digits=3),
    Column(heading="hidden s", field="hidden_seconds", digits=3),
    Column(heading="loss", field="loss", digits=5),
    Column(heading="failure", field="failure"),
)

Row = TypeVar("Row", bound=Measured)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, or a compiled forward pass, of a subject."""

    make_state: Callable[[], Any]
    """Puts on the device, or wherever the optimiser's moments lie, what the first call needs."""
    call: Callable[[Any, PackedBatch], tuple[Any, jax.Array]]
    """Of state and batch: the next state and the loss. The state it is given may be gone."""
    compiled: tuple[jax.stages.Compiled, ...]


def compile_program(subject: Subject, batch: PackedBatch, *, forward_only: bool = False) -> Program:
    """Returns what training runs, or its forward pass alone, compiled for such a batch."""
    agent, optimizer, key = subject.agent, subject.train.optimizer, subject.key
    seed, mesh = subject.train.seed, subject.mesh
    if not forward_only:
        dtype = subject.train.model.compute_dtype
        step = compile_step(agent, optimizer, batch, key, kernel_dtype=dtype, mesh=mesh)

        def call(state: Any, batch: PackedBatch) -> tuple[Any, jax.Array]:
            state, metrics = step(state, batch, key)
            return state, metrics["loss"]

        return Program(functools.partial(placed_state, agent, optimizer, seed, mesh), call, step.programs)

    def make_params() -> Params:
        return agent.init(jax.random.key(seed))

    loss_of = functools.partial(first_loss, agent)
    compiled = jax.jit(loss_of).lower(jax.eval_shape(make_params), batch, key).compile()
    return Program(make_params, lambda params, batch: (params, compiled(params, batch, key)), (compiled,))


def measure_compiling(row: Row, subject: Subject, *, forward_only: bool = False) -> tuple[Row, Program]:
    """Returns the row with the memory that the compiled step asks for, and that step."""
    batch = subject.placed_batch()
    began = time.perf_counter()
    program = compile_program(subject, batch, forward_only=forward_only)
    seconds = time.perf_counter() - began
    asked = compiled_bytes(*program.compiled)
    row = dataclasses.replace(
        row,
        compile_seconds=seconds,
        device_bytes=asked.device,
        argument_bytes=asked.argument,
        temporary_bytes=asked.temporary,
        host_bytes=asked.host,
    )
    return row, program


def measure_running(
    row: Row,
    subject: Subject,
    program: Program,
    *,
    num_steps: int,
    num_warmup: int,
    forward_only: bool = False,
    profile: bool = False,
) -> Row:
    """Returns the row with the time, peak and loss of the compiled step; with a profile, what one more step sends."""
    batch = subject.placed_batch()
    state = program.make_state()
    losses: list[float] = []

    def call() -> Any:
        nonlocal state
        state, loss = program.call(state, batch)
        losses.append(float(loss))
        return state

    before = peak_bytes()
    seconds = median_seconds(call, num_steps, num_warmup=num_warmup, enough=ENOUGH_SECONDS)
    after = peak_bytes()
    bad = [number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    flops = subject.model_flops / (3 if forward_only else 1)
    sent = communication_of(call) if profile else None
    return dataclasses.replace(
        row,
        peak_bytes=None if after == before else after,
        step_seconds=seconds,
        tokens_per_second=subject.step_tokens / seconds,
        model_flops_per_second=flops / seconds,
        communication_seconds=sent.seconds if sent else None,
        hidden_seconds=sent.hidden_seconds if sent else None,
        loss=losses[0] if math.isfinite(losses[0]) else None,
        losses=tuple(losses[: bad[0] - 1] if bad else losses),
        failure=f"the loss of step {bad[0]} is {losses[bad[0] - 1]}" if bad else "",
    )


def add_floor(row: Row, subject: Subject, times: KernelTimes, *, forward_only: bool = False) -> Row:
    """Returns the row with what the same kernels alone would take; nothing of the step is on the device by now."""
    if row.step_seconds is None or row.model_flops_per_second is None:
        return row
    model, num_devices = subject.train.model, subject.train.mesh.num_devices
    rate = times.matrix_rate(model.compute_dtype)
    attention = times.attention(model, subject.num_rows, subject.num_tokens)
    # What one device would take, equally shared, and nothing sent.
    floor = floor_seconds(subject, attention, rate, forward_only=forward_only) / num_devices
    return dataclasses.replace(
        row,
        matrix_flops_per_second=rate,
        utilization=row.model_flops_per_second / (num_devices * rate),
        attention_forward_seconds=attention.forward,
        attention_both_seconds=attention.both,
        floor_seconds=floor,
        floor_share=floor / row.step_seconds,
    )
