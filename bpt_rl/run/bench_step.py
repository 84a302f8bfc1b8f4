"""The real training step on synthetic chains: time, memory and rate by context length and by what layers keep."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax

from bpt_rl.bench_config import StepBenchConfig
from bpt_rl.config import TrainConfig
from bpt_rl.datasets.packing import steps_of
from bpt_rl.envs.tasks import domain_of
from bpt_rl.nn.attention import model_implementation
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
from bpt_rl.run.bench_subject import agent_subject


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRow(Measured):
    """One measurement."""

    tokens: int
    """Of a row of the batch."""
    implementation: str
    activations: str
    """What layers kept; where `auto` was asked for, what training would choose."""
    num_rows: int
    mesh: str = ""
    """Devices that share the step; empty for one."""


STEP_COLUMNS = (
    Column(heading="tokens", field="tokens"),
    Column(heading="attention", field="implementation"),
    Column(heading="activations", field="activations"),
    Column(heading="rows", field="num_rows"),
    Column(heading="mesh", field="mesh"),
    *MEASURED_COLUMNS,
)


def step_variants(config: StepBenchConfig) -> list[tuple[int, TrainConfig]]:
    """Returns what is to be measured, in order: a length and the training configuration.

    Raises:
      ValueError: If the task is unknown, or a length is no multiple of the layout's tokens a step or of what devices
        share.
    """
    train, model = config.train, config.train.model
    domain_of(train.data.task)
    for num_tokens in config.tokens:
        if steps_of(num_tokens, model.layout) % train.mesh.context:
            raise ValueError(
                "Devices of mesh.context must have equally many steps of a row; got "
                f"{num_tokens} tokens, {steps_of(num_tokens, model.layout)} steps, for {train.mesh.context}. Use a "
                "multiple."
            )
    grid = itertools.product(
        config.tokens,
        config.implementations or (model.implementation,),
        config.activations or (model.activations,),
    )
    return [
        (
            num_tokens,
            dataclasses.replace(train, model=dataclasses.replace(model, implementation=i, activations=a)),
        )
        for num_tokens, i, a in grid
    ]


def measure_steps(config: StepBenchConfig) -> Iterator[StepRow]:
    """Yields a row for each of `step_variants`, as soon as it is measured."""
    times = KernelTimes()
    for num_tokens, train in step_variants(config):
        row = StepRow(
            tokens=num_tokens,
            implementation=train.model.implementation,
            activations=train.model.activations,
            num_rows=config.num_rows,
            mesh=str(train.mesh) if train.mesh.num_devices > 1 else "",
        )
        yield _measure(row, config, train, times)


def _measure(row: StepRow, config: StepBenchConfig, train: TrainConfig, times: KernelTimes) -> StepRow:
    try:
        subject = agent_subject(train, row.tokens, row.num_rows)
        row = dataclasses.replace(
            row,
            activations=subject.train.model.activations,
            implementation=model_implementation(
                subject.train.model, device_kind=jax.devices()[0].device_kind, has_segments=False
            ),
        )
        row, program = measure_compiling(row, subject, forward_only=config.forward_only)
        if not config.compile_only:
            row = measure_running(
                row,
                subject,
                program,
                num_steps=config.num_steps,
                num_warmup=config.num_warmup_steps,
                forward_only=config.forward_only,
                profile=config.profile,
            )
            if config.floors:
                row = add_floor(row, subject, times, forward_only=config.forward_only)
    except FAILURES as error:
        return dataclasses.replace(row, failure=failure_of(error))
    return row
