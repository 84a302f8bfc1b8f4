"""Memory and time of a whole training step against the context's length, method by method, as the papers compare."""

import dataclasses
import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax

from bpt_rl.bench_config import ContextBenchConfig, Method
from bpt_rl.config import ModelConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.datasets.packing import steps_of
from bpt_rl.envs.tasks import domain_of
from bpt_rl.nn.memory_plan import plan_memory
from bpt_rl.nn.workload import Workload
from bpt_rl.run.bench_execution import (
    MEASURED_COLUMNS,
    Measured,
    add_floor,
    measure_compiling,
    measure_running,
)
from bpt_rl.run.bench_floor import KernelTimes
from bpt_rl.run.bench_measurement import FAILURES, failure_of
from bpt_rl.run.bench_record import Column
from bpt_rl.run.bench_subject import Subject, agent_subject, language_subject
from bpt_rl.run.devices import Device, this_device
from bpt_rl.run.out_of_memory import SIGNS

Status = Literal["executed", "compiled", "does not fit", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextRow(Measured):
    """One length of one method."""

    method: Method
    tokens: int
    status: Status = "failed"
    """What was done. `does not fit`: memory is short by the compiler's count or by the device's."""
    expected_seconds: float | None = None
    """Of a step that was not run: four times the method's last measured one for twice its length."""
    limit_bytes: int
    """Memory that JAX may take of the device."""
    floor_bytes: int
    """Parameters, optimiser, gradients and the layers' inputs: less is possible only by moving one of them away, or by
    computing layers again in groups."""


CONTEXT_COLUMNS = (
    Column(heading="method", field="method"),
    Column(heading="tokens", field="tokens"),
    Column(heading="status", field="status"),
    Column(heading="compiled GiB", field="device_bytes", divisor=GIB, digits=3),
    Column(heading="floor GiB", field="floor_bytes", divisor=GIB, digits=3),
    *(column for column in MEASURED_COLUMNS if column.field in ("host_bytes", "peak_bytes", "step_seconds")),
    Column(heading="expected s", field="expected_seconds", digits=1),
    *(
        column
        for column in MEASURED_COLUMNS
        if column.field in ("tokens_per_second", "utilization", "floor_share", "loss", "failure")
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongestRow:
    """How long the context of one method was; None where no row was so."""

    method: Method
    executed: int | None
    """Tokens of the longest row that was run."""
    fitting: int | None
    """Tokens of the longest row that was run or compiled to fit."""
    too_long: int | None
    """Tokens of the shortest row that does not fit."""


LONGEST_COLUMNS = (
    Column(heading="method", field="method"),
    Column(heading="longest executed, tokens", field="executed"),
    Column(heading="longest that fits", field="fitting"),
    Column(heading="shortest that does not", field="too_long"),
)

_PLAIN: Mapping[str, Any] = {"activations": "recompute", "head_groups": 1, "layer_groups": 1}
"""What the papers' methods have in common."""


def longest_rows(rows: Iterable[ContextRow]) -> list[LongestRow]:
    """Returns a row for each method, in order of appearance."""
    lengths: dict[Method, dict[str, list[int]]] = {}
    for row in rows:
        lengths.setdefault(row.method, {}).setdefault(row.status, []).append(row.tokens)
    return [
        LongestRow(
            method=method,
            executed=max(by.get("executed", []), default=None),
            fitting=max(by.get("executed", []) + by.get("compiled", []), default=None),
            too_long=min(by.get("does not fit", []), default=None),
        )
        for method, by in lengths.items()
    ]


def method_model(model: ModelConfig, method: Method, num_tokens: int) -> ModelConfig:
    """Returns the model as a method computes it on rows of so many tokens."""
    whole = dataclasses.replace(
        model, feedforward_chunk_size=max(num_tokens, model.feedforward_chunk_size), **_PLAIN
    )
    match method:
        case "full":
            return dataclasses.replace(whole, implementation="reference")
        case "memory_efficient":
            return dataclasses.replace(whole, implementation="blockwise")
        case "bpt":
            return dataclasses.replace(model, implementation="blockwise", **_PLAIN)
    return dataclasses.replace(model, activations=method)


def check_contexts(config: ContextBenchConfig) -> None:
    """Refuses what cannot be measured before anything is.

    Raises:
      ValueError: If a method cannot be had of the model, an agent's task is unknown, or a length is no multiple of the
        layout's tokens a step.
    """
    for method in config.methods:
        method_model(config.train.model, method, config.tokens[0])
    if config.vocabulary_size:
        return
    domain_of(config.train.data.task)
    for num_tokens in config.tokens:
        steps_of(num_tokens, config.train.model.layout)


def measure_contexts(config: ContextBenchConfig) -> Iterator[ContextRow]:
    """Yields the rows of one method after another, each from short to long, as soon as they are measured."""
    meter = _Meter(config, this_device(), KernelTimes())
    for method in config.methods:
        yield from _measure_method(meter, method)


def _measure_method(meter: "_Meter", method: Method) -> Iterator[ContextRow]:
    config = meter.config
    fitting = too_long = 0
    executed: ContextRow | None = None
    for num_tokens in sorted(set(config.tokens)):
        if too_long:
            row = meter.row(method, num_tokens)
            yield dataclasses.replace(row, status="does not fit", failure=f"nor do {too_long:,} tokens")
            continue
        row = meter.measure(method, num_tokens, executed)
        yield row
        fitting = num_tokens if row.status in ("executed", "compiled") else fitting
        too_long = num_tokens if row.status == "does not fit" else too_long
        executed = row if row.step_seconds else executed
    while config.longest and fitting and 2 * fitting <= config.max_tokens and 2 * fitting != too_long:
        row = meter.measure(method, 2 * fitting, executed, compile_only=True)
        yield row
        if row.status != "compiled":
            return
        fitting *= 2


@dataclasses.dataclass(frozen=True)
class _Meter:
    """Measures one row after another on one device."""

    config: ContextBenchConfig
    device: Device
    times: KernelTimes

    def subject(self, method: Method, num_tokens: int) -> Subject:
        """Returns the step to be measured."""
        train = self.config.train
        train = dataclasses.replace(train, model=method_model(train.model, method, num_tokens))
        if self.config.vocabulary_size:
            return language_subject(train, self.config.vocabulary_size, num_tokens)
        return agent_subject(train, num_tokens, 1)

    def row(self, method: Method, num_tokens: int) -> ContextRow:
        """Returns a row of which nothing is measured."""
        subject = self.subject(method, num_tokens)
        return ContextRow(
            method=method,
            tokens=num_tokens,
            limit_bytes=self.device.memory,
            floor_bytes=floor_bytes(subject),
        )

    def measure(
        self, method: Method, num_tokens: int, executed: ContextRow | None, *, compile_only: bool = False
    ) -> ContextRow:
        """Returns a row; `executed` is the longest before it that was run."""
        row, subject = self.row(method, num_tokens), self.subject(method, num_tokens)
        try:
            row, program = measure_compiling(row, subject)
            if obstacle := self._obstacle(row):
                return dataclasses.replace(row, status="does not fit", failure=obstacle)
            row = dataclasses.replace(
                row, status="compiled", expected_seconds=_expected(executed, num_tokens)
            )
            if compile_only or self.config.compile_only or self._is_too_slow(row):
                return row
            row = measure_running(row, subject, program, num_steps=self.config.num_steps, num_warmup=1)
            row = dataclasses.replace(row, status="executed", expected_seconds=None)
            return add_floor(row, subject, self.times) if self.config.floors else row
        except FAILURES as error:
            if row.status != "executed":
                is_too_large = isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)
                row = dataclasses.replace(row, status="does not fit" if is_too_large else "failed")
            return dataclasses.replace(row, failure=failure_of(error))
        finally:
            # Whatever a failure's traceback held on the device must be gone before the next row.
            gc.collect()

    def _obstacle(self, row: ContextRow) -> str:
        """Returns which memory a compiled step does not fit; empty if it fits."""
        asked = {"the device": (row.device_bytes, self.device.memory)}
        if self.device.host_memory is not None:
            asked["the host"] = (row.host_bytes, self.device.host_memory)
        for place, (num_bytes, limit) in asked.items():
            if num_bytes is not None and num_bytes > limit:
                return f"compiled to {num_bytes / GIB:.1f} GiB, of which {place} has {limit / GIB:.1f}"
        return ""

    def _is_too_slow(self, row: ContextRow) -> bool:
        return (row.expected_seconds or 0) > self.config.max_step_seconds


def _expected(executed: ContextRow | None, num_tokens: int) -> float | None:
    if executed is None or executed.step_seconds is None:
        return None
    return executed.step_seconds * (num_tokens / executed.tokens) ** 2


def floor_bytes(subject: Subject) -> int:
    """Returns the bytes that the state, its gradient and the layers' inputs take."""
    shapes = jax.eval_shape(subject.agent.init, jax.random.key(0))
    model = dataclasses.replace(subject.train.model, layer_groups=1)
    work = Workload(
        model=model,
        # Nothing that is counted here depends on it.
        implementation="blockwise",
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        num_rows=subject.num_rows,
        context_length=subject.num_tokens,
        accumulation=subject.train.optimizer.accumulation,
        optimizer_in_host=subject.train.optimizer.place == "host",
    )
    plan = plan_memory(work, "recompute")
    return max(plan.parameters + plan.optimizer + plan.gradients + plan.kept, plan.update)
