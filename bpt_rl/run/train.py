"""Training: the loop that feeds, logs and checkpoints a gradient step."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bpt_rl.agents.base import Agent
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import Activations, TrainConfig
from bpt_rl.datasets.sampling import ChainSampler, batches
from bpt_rl.datasets.store import Store
from bpt_rl.run import records
from bpt_rl.run.activations import choose_activations
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.continuation import check_continuation, write_description
from bpt_rl.run.devices import Device, this_device
from bpt_rl.run.loggers import Log, open_loggers
from bpt_rl.run.out_of_memory import MemoryWatch
from bpt_rl.run.plan import Rows
from bpt_rl.run.step import (
    CompiledStep,
    TrainState,
    compile_step,
    init_state,
    make_optimizer,
    placed_state,
    state_layout,
)
from bpt_rl.td_config import TD_AGENTS, TDConfig
from bpt_rl.types import DataStatistics, PackedBatch

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, steps in all and the last metrics."""
Announce = Callable[[str], None]
"""Called with a line to show before training begins."""


def train(
    config: TrainConfig,
    report_progress: Progress | None = None,
    *,
    announce: Announce | None = None,
    command: str = "",
) -> records.RunFolder:
    """Trains to the configured number of steps, going on from the newest checkpoint of the run folder.

    Interrupted at any step and called again, it ends with the parameters of an uninterrupted run, bit for bit
    on the CPU.

    Args:
      config: Of the run.
      report_progress: Told of every gradient step, once its metrics are known to be finite.
      announce: Told where the episodes are kept and what layers keep, and why.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If the store does not exist.
      ValueError: If configuration, store and run folder do not fit together.
      FloatingPointError: If loss, gradient or parameters stop being finite.
      OutOfMemoryError: If a step does not fit the device.
    """
    if config.agent in TD_AGENTS:
        from bpt_rl.run.train_td import train_td  # It takes what it tells of its progress from here.

        return train_td(config, report_progress, announce=announce, command=command)
    if config.td != TDConfig():
        raise ValueError(
            f"Only agents that learn from single transitions read td.*; got agent {config.agent!r} and {config.td}. "
            "Leave td.* out, or name another agent."
        )
    folder = records.RunFolder(Path(config.run))
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(config.data.store))
        # Whatever is wrong with configuration or data shows before there is a run folder.
        statistics = store.statistics(config.data.task)
        sampler = ChainSampler(store, config.data, config.model.layout, config.seed)
        rows, device = _rows_of(sampler, statistics), _device_beside(sampler)
        choice = choose_activations(config, rows, device=device, recorded=_recorded_activations(folder))
        resolved = choice.applied(config)
        agent = make_agent(resolved, statistics)
        watch = MemoryWatch(config=resolved, rows=rows, device=device)
        watch.refuse_what_is_far_beyond()
        saved = stack.enter_context(Checkpoints(folder.checkpoints_path, config.keep_checkpoints))
        check_continuation(config, folder, store.digest, saved.latest_step)
        start = saved.latest_step or 0
        with watch.over("making the parameters"):
            state = _state_at(start, agent, config, saved)
        facts = {"command": command, "data": dataclasses.asdict(sampler.choice)}
        has_layers = config.agent != "bc"
        if has_layers:
            facts["activations"] = dataclasses.asdict(choice)
        write_description(config, folder, dataclasses.asdict(statistics), start, facts)
        if announce:
            announce(f"Episodes are kept in place {sampler.choice}.")
        if announce and has_layers:
            announce(f"Activations: {choice}.")
        log = stack.enter_context(open_loggers(config, folder))
        tokens = sampler.num_rows * sampler.context_length * config.optimizer.accumulation
        ledger = Ledger(config, tokens, saved, log, report_progress)
        for step, reached, metrics in _steps(agent, state, sampler, watch):
            # Memory may run out in a step that is only waited for here.
            with watch.over(f"in step {step - 1}"):
                ledger.settle()
            ledger.add(step, metrics)
            if step % config.checkpoint_every == 0 or step == config.optimizer.num_steps:
                with watch.over(f"in step {step}"):
                    ledger.settle()
                    saved.save(step, reached)
    return folder


def _rows_of(sampler: ChainSampler, statistics: DataStatistics) -> Rows:
    return Rows(
        statistics=statistics,
        num_rows=sampler.num_rows,
        context_length=sampler.context_length,
        is_one_chain_a_row=sampler.is_one_chain_a_row,
    )


def _state_at(start: int, agent: Agent, config: TrainConfig, saved: Checkpoints) -> TrainState:
    """Returns the state after `start` steps, each array in its place; never two of them at once."""
    if not start:
        return placed_state(agent, config.optimizer, config.seed)
    optimizer = make_optimizer(config.optimizer)
    shapes = jax.eval_shape(lambda: init_state(agent, optimizer, config.seed))
    state: TrainState = saved.restore(start, state_layout(shapes, config.optimizer))
    return state


def _device_beside(sampler: ChainSampler) -> Device:
    """Returns the device that training has beside the episodes."""
    taken = sampler.choice.num_bytes
    device_bytes = taken if sampler.choice.place == "accelerator" else 0
    host_bytes = taken if sampler.choice.place == "host" else 0
    return this_device().less(device_bytes=device_bytes, host_bytes=host_bytes)


def _recorded_activations(folder: records.RunFolder) -> Activations | None:
    """Returns what layers kept in the run so far; None if it begins or did not say."""
    if not (folder.path / "versions.json").is_file():
        return None
    recorded: Activations | None = folder.versions().get("activations", {}).get("activations")
    return recorded


def _steps(
    agent: Agent, state: TrainState, sampler: ChainSampler, watch: MemoryWatch
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Yields number, state and metrics of each gradient step as soon as it is dispatched to the device."""

    def make_batch(micro_batches: tuple[PackedBatch, ...]) -> PackedBatch:
        batch: PackedBatch = jax.tree.map(lambda *arrays: jnp.stack(arrays), *micro_batches)
        return batch._replace(segment_ids=None) if sampler.is_one_chain_a_row else batch

    config, key = watch.config.optimizer, jax.random.key(watch.config.seed)
    start, accumulation = int(state.step), config.accumulation
    compiled: CompiledStep | None = None
    source = batches(sampler, start * accumulation, config.num_steps * accumulation)
    for step, micro_batches in enumerate(zip(*[source] * accumulation, strict=True), start + 1):
        if compiled is None:
            with watch.over("compiling the step"):
                compiled = compile_step(
                    agent,
                    config,
                    micro_batches,
                    key,
                    kernel_dtype=watch.config.model.compute_dtype,
                    make_batch=make_batch,
                )
        with watch.over(f"in step {step}"):
            state, metrics = compiled(state, micro_batches, key)
        yield step, state, metrics


class Ledger:
    """Checks, logs and reports steps in order, one behind the device, which so never waits for the host."""

    def __init__(
        self,
        config: TrainConfig,
        tokens: int,
        saved: Checkpoints,
        log: Log,
        report_progress: Progress | None,
    ) -> None:
        """Starts the clock.

        Args:
          config: Of the run.
          tokens: Of a gradient step.
          saved: Named when a step is bad.
          log: Takes a line every `log_every` steps.
          report_progress: Told of every step.
        """
        self._config = config
        self._tokens = tokens
        self._saved = saved
        self._log = log
        self._report_progress = report_progress
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._began, self._steps_since = time.perf_counter(), 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that may still be running; settles those before it."""
        self.settle()
        self._pending = [(step, metrics)]

    def settle(self) -> None:
        """Waits for the metrics taken; checks, logs and reports them.

        Raises:
          FloatingPointError: If one is not finite.
        """
        for step, metrics in self._pending:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self._check_finite(step, values)
            self._steps_since += 1
            num_steps = self._config.optimizer.num_steps
            if step % self._config.log_every == 0 or step == num_steps:
                values |= {"tokens": float(step * self._tokens), "tokens_per_second": self._speed()}
                self._log({"step": step, **values})
            if self._report_progress:
                self._report_progress(step, num_steps, values)
        self._pending = []

    def _speed(self) -> float:
        now = time.perf_counter()
        speed = self._steps_since * self._tokens / (now - self._began)
        self._began, self._steps_since = now, 0
        return speed

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"Loss, gradient and parameters must stay finite; got {bad[0]} {values[bad[0]]} at step {step}, "
                f"batch index {step - 1}. Last good checkpoint: step {self._saved.latest_step or 'none'} in "
                f"{records.RunFolder(Path(self._config.run)).checkpoints_path}. Lower optimizer.learning_rate or "
                "check the data with `bpt-rl data verify`."
            )
