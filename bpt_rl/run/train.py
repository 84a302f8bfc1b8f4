"""Training: a pure step, and the loop that feeds, logs and checkpoints it."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bpt_rl import config_toml
from bpt_rl.agents.base import Agent, Params
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import OptimizerConfig, TrainConfig
from bpt_rl.datasets.sampling import ChainSampler, batches
from bpt_rl.datasets.store import Store
from bpt_rl.run import records
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.loggers import Log, open_loggers
from bpt_rl.types import PackedBatch

UNFIXED_FIELDS = (
    "run",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "logger",
    "data.store",
    "data.place",
)
"""Fields that may change between a run and its continuation: they do not change the parameters.

A store may lie elsewhere by then; its digest tells whether it is the same.
"""

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, steps in all and the last metrics."""
Announce = Callable[[str], None]
"""Called with a line to show before training begins."""


class TrainState(NamedTuple):
    """All that a gradient step reads and changes."""

    step: jax.Array
    """Gradient steps done."""
    params: Params
    optimizer_state: Any


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then cosine decay."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.num_steps,
        end_value=config.learning_rate * config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns AdamW behind clipping by the global norm; only matrices of linear layers decay."""

    def is_decayed(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "key", "") == "kernel", params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(make_schedule(config), b2=0.95, weight_decay=config.weight_decay, mask=is_decayed),
    )


def init_state(agent: Agent, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step."""
    params = agent.init(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    agent: Agent,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: PackedBatch,
    key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one gradient step and its metrics.

    Args:
      agent: Gives the loss.
      optimizer: Turns its gradient into an update.
      state: Before the step.
      batch: Micro-batches stacked on a leading axis; the gradient of each step that counts weighs the same.
      key: Draws dropout; the step number is folded in here.
    """
    step_key = jax.random.fold_in(key, state.step)

    def micro(total: Params, inputs: tuple[PackedBatch, jax.Array]) -> tuple[Params, dict[str, jax.Array]]:
        micro_batch, index = inputs
        weight = micro_batch.loss_mask.sum() / jnp.maximum(batch.loss_mask.sum(), 1)
        micro_key = jax.random.fold_in(step_key, index)
        (_, metrics), gradient = jax.value_and_grad(agent.loss, has_aux=True)(
            state.params, micro_batch, micro_key
        )
        metrics = {name: weight * value for name, value in metrics.items()}
        return jax.tree.map(lambda t, g: t + weight * g, total, gradient), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    indices = jnp.arange(len(batch.loss_mask))
    gradient, metrics = jax.lax.scan(micro, zeros, (batch, indices))
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    metrics = {name: values.sum() for name, values in metrics.items()}
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    params = optax.apply_updates(state.params, updates)
    # Not finite at the step that breaks the parameters, where the loss is so only at the next.
    metrics["parameter_norm"] = optax.tree.norm(params)
    return TrainState(state.step + 1, params, optimizer_state), metrics


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
      announce: Told where the episodes are kept, and why.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If the store does not exist.
      ValueError: If configuration, store and run folder do not fit together.
      FloatingPointError: If loss, gradient or parameters stop being finite.
    """
    folder = records.RunFolder(Path(config.run))
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(config.data.store))
        # Whatever is wrong with configuration or data shows before there is a run folder.
        statistics = store.statistics(config.data.task)
        sampler = ChainSampler(store, config.data, config.model.layout, config.seed)
        agent = make_agent(config, statistics)
        saved = stack.enter_context(Checkpoints(folder.checkpoints_path, config.keep_checkpoints))
        _check_continuation(config, folder, store.digest, saved.latest_step)
        optimizer = make_optimizer(config.optimizer)
        state = init_state(agent, optimizer, config.seed)
        start = saved.latest_step or 0
        if start:
            state = saved.restore(start, jax.eval_shape(lambda s: s, state))
        facts = {"command": command, "data": dataclasses.asdict(sampler.choice)}
        _write_description(config, folder, dataclasses.asdict(statistics), start, facts)
        if announce:
            announce(f"Episodes are kept in place {sampler.choice}.")
        log = stack.enter_context(open_loggers(config, folder))
        tokens = sampler.num_rows * sampler.context_length * config.optimizer.accumulation
        ledger = Ledger(config, tokens, saved, log, report_progress)
        for step, reached, metrics in _steps(config, agent, optimizer, state, sampler):
            ledger.add(step, metrics)
            if step % config.checkpoint_every == 0 or step == config.optimizer.num_steps:
                ledger.settle()
                saved.save(step, reached)
    return folder


def _steps(
    config: TrainConfig,
    agent: Agent,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    sampler: ChainSampler,
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Yields number, state and metrics of each gradient step as soon as it is dispatched to the device."""

    def take(state: TrainState, micro_batches: tuple[PackedBatch, ...], key: jax.Array) -> Any:
        batch = jax.tree.map(lambda *arrays: jnp.stack(arrays), *micro_batches)
        if sampler.is_one_chain_a_row:
            batch = batch._replace(segment_ids=None)
        next_state, metrics = train_step(agent, optimizer, state, batch, key)
        return next_state, metrics | {"learning_rate": schedule(state.step)}

    schedule, key = make_schedule(config.optimizer), jax.random.key(config.seed)
    step_function = jax.jit(take, donate_argnums=0)
    start, accumulation = int(state.step), config.optimizer.accumulation
    source = batches(sampler, start * accumulation, config.optimizer.num_steps * accumulation)
    for step, micro_batches in enumerate(zip(*[source] * accumulation, strict=True), start + 1):
        state, metrics = step_function(state, micro_batches, key)
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


def _check_continuation(
    config: TrainConfig, folder: records.RunFolder, digest: str, latest: int | None
) -> None:
    if latest is None:
        return
    old = folder.config()
    before, now = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(config))
    changed = [name for name in now if now[name] != before.get(name) and name not in UNFIXED_FIELDS]
    if changed:
        name = changed[0]
        raise ValueError(
            f"A run folder keeps one configuration; {folder.path} was trained with {name} = {before.get(name)!r}, "
            f"and got {now[name]!r}. Name another folder with --run, or put the old value back."
        )
    if folder.statistics().digest != digest:
        raise ValueError(
            f"A run goes on with the data it began with; {folder.path} began with store digest "
            f"{folder.statistics().digest[:12]}, and {config.data.store} has {digest[:12]}. Name another folder."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _write_description(
    config: TrainConfig,
    folder: records.RunFolder,
    statistics: Mapping[str, Any],
    start: int,
    facts: Mapping[str, Any],
) -> None:
    records.write_atomically(folder.config_path, config_toml.to_toml(config))
    records.write_json(folder.path / "statistics.json", statistics)
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    records.write_json(folder.path / "versions.json", records.versions() | {"device": device, **facts})
    kept = [line for line in folder.metrics() if line["step"] <= start]
    records.write_atomically(folder.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
