"""The real training step on synthetic chains: time, memory and rate by context length and by what layers keep."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from bpt_rl.agents.registry import make_agent
from bpt_rl.bench_config import StepBenchConfig
from bpt_rl.config import ModelConfig, TrainConfig
from bpt_rl.datasets.packing import steps_of
from bpt_rl.envs.tasks import DOMAINS, Domain, domain_of
from bpt_rl.run.bench_measurement import FAILURES, compiled_bytes, failure_of, median_seconds, peak_bytes
from bpt_rl.run.bench_record import Column
from bpt_rl.run.synthetic import synthetic_statistics
from bpt_rl.run.train import TrainState, init_state, make_optimizer, train_step
from bpt_rl.types import PackedBatch

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRow:
    """One measurement. None: not measured, for the reason in `failure`, or because it was only compiled."""

    tokens: int
    """Of a row of the batch."""
    implementation: str
    activations: str
    num_rows: int
    compile_seconds: float | None = None
    argument_bytes: int | None = None
    """Parameters, optimiser state and batch."""
    temporary_bytes: int | None = None
    """Gradients, kept activations and the rest, at the worst moment, as the compiler plans it."""
    host_bytes: int | None = None
    peak_bytes: int | None = None
    """Most bytes in use, as the device counts them; None too where an earlier row of this process needed as much."""
    step_seconds: float | None = None
    """Median."""
    tokens_per_second: float | None = None
    model_flops_per_second: float | None = None
    """By `step_flops`."""
    loss: float | None = None
    """Of the first step: the same for every row of the table that has as many tokens, but for rounding."""
    failure: str = ""


STEP_COLUMNS = (
    Column(heading="tokens", field="tokens"),
    Column(heading="attention", field="implementation"),
    Column(heading="activations", field="activations"),
    Column(heading="rows", field="num_rows"),
    Column(heading="compile s", field="compile_seconds", digits=1),
    Column(heading="arguments GiB", field="argument_bytes", divisor=GIB, digits=3),
    Column(heading="temporary GiB", field="temporary_bytes", divisor=GIB, digits=3),
    Column(heading="host GiB", field="host_bytes", divisor=GIB, digits=3),
    Column(heading="peak GiB", field="peak_bytes", divisor=GIB, digits=3),
    Column(heading="step s", field="step_seconds", digits=3),
    Column(heading="tokens/s", field="tokens_per_second"),
    Column(heading="model TFLOP/s", field="model_flops_per_second", divisor=1e12, digits=3),
    Column(heading="loss", field="loss", digits=5),
    Column(heading="failure", field="failure"),
)


def step_flops(model: ModelConfig, num_tokens: int) -> int:
    """Returns the floating-point operations of one training step on one causal row, nothing counted twice.

    3 x layers x (2 x P x S + 2 x 2 x S^2 x D / 2), for the forward pass and a backward pass of twice its work:
    P entries of a layer's matrices, S tokens, D the width of all query heads; two matrix products of the attention,
    half of each masked. Embeddings, norms, the head, the optimiser and recomputation are left out, so that the rate
    of a step that recomputes nothing but does the same is the same number.
    """
    width = model.embed_dim
    key_width = width // model.num_heads * (model.num_kv_heads or model.num_heads)
    hidden = model.feedforward_dim or 4 * width
    entries = 2 * width * width + 2 * width * key_width + 2 * width * hidden
    return 3 * model.num_layers * (2 * entries * num_tokens + 2 * num_tokens**2 * width)


def synthetic_batch(config: TrainConfig, domain: Domain, num_tokens: int, num_rows: int) -> PackedBatch:
    """Returns random micro-batches of one full chain a row, stacked on a leading axis as `train_step` wants them."""
    num_steps = steps_of(num_tokens, config.model.layout)
    shape = (config.optimizer.accumulation, num_rows, num_steps)
    generator = np.random.default_rng(config.seed)

    def uniform(*trailing: int, low: float = 0.0) -> np.ndarray:
        return generator.uniform(low, 1, shape + trailing).astype(np.float32)

    index = np.broadcast_to(np.arange(num_steps, dtype=np.int32), shape)
    step = index % domain.episode_steps
    return PackedBatch(
        observation=generator.normal(size=(*shape, domain.observation_dim)).astype(np.float32),
        action=uniform(domain.action_dim, low=-1.0),
        reward=uniform(),
        return_to_go=uniform(),
        completion=(step == domain.episode_steps - 1).astype(np.float32),
        step=step,
        episode=index // domain.episode_steps,
        segment_ids=None,
        loss_mask=np.ones(shape, np.float32),
    )


def step_variants(config: StepBenchConfig) -> list[tuple[int, TrainConfig]]:
    """Returns what is to be measured, in order: a length and the training configuration.

    Raises:
      ValueError: If the task is unknown or a length is no multiple of the layout's tokens a step.
    """
    train, model = config.train, config.train.model
    domain_of(train.data.task)
    for num_tokens in config.tokens:
        steps_of(num_tokens, model.layout)
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
    for num_tokens, train in step_variants(config):
        row = StepRow(
            tokens=num_tokens,
            implementation=train.model.implementation,
            activations=train.model.activations,
            num_rows=config.num_rows,
        )
        yield _measure(row, config, train)


def _measure(row: StepRow, config: StepBenchConfig, train: TrainConfig) -> StepRow:
    domain = DOMAINS[domain_of(train.data.task)]
    agent = make_agent(train, synthetic_statistics(train.data.task, domain))
    optimizer, key = make_optimizer(train.optimizer), jax.random.key(train.seed)
    make_state = functools.partial(init_state, agent, optimizer, train.seed)
    try:
        batch = jax.device_put(synthetic_batch(train, domain, row.tokens, row.num_rows))
        step_function = jax.jit(functools.partial(train_step, agent, optimizer), donate_argnums=0)
        began = time.perf_counter()
        compiled = step_function.lower(jax.eval_shape(make_state), batch, key).compile()
        seconds = time.perf_counter() - began
        asked = compiled_bytes(compiled)
        row = dataclasses.replace(
            row,
            compile_seconds=seconds,
            argument_bytes=asked.argument,
            temporary_bytes=asked.temporary,
            host_bytes=asked.host,
        )
        if not config.compile_only:
            # Compiled as one program, so that nothing else is on the device when the first step begins.
            row = _run(row, config, lambda state: compiled(state, batch, key), jax.jit(make_state)())
    except FAILURES as error:
        return dataclasses.replace(row, failure=failure_of(error))
    flops = row.num_rows * train.optimizer.accumulation * step_flops(train.model, row.tokens)
    rate = flops / row.step_seconds if row.step_seconds else None
    return dataclasses.replace(row, model_flops_per_second=rate)


def _run(
    row: StepRow, config: StepBenchConfig, step: Callable[[TrainState], Any], state: TrainState
) -> StepRow:
    losses: list[float] = []

    def call() -> TrainState:
        nonlocal state
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
        return state

    before = peak_bytes()
    seconds = median_seconds(call, config.num_steps, num_warmup=config.num_warmup_steps)
    after = peak_bytes()
    tokens = row.num_rows * row.tokens * config.train.optimizer.accumulation
    bad = [number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    return dataclasses.replace(
        row,
        peak_bytes=None if after == before else after,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        loss=losses[0] if math.isfinite(losses[0]) else None,
        failure=f"the loss of step {bad[0]} is {losses[bad[0] - 1]}" if bad else "",
    )
