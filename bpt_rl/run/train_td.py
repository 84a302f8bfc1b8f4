"""Training of the agents that learn from single transitions: many gradient steps a compiled call, on resident data."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bpt_rl.agents.base import OfflineLearner
from bpt_rl.agents.registry import make_learner
from bpt_rl.config import TrainConfig
from bpt_rl.config_toml import flat
from bpt_rl.datasets.capacity import Choice
from bpt_rl.datasets.store import Store
from bpt_rl.datasets.transitions import TransitionDraw, Transitions, check_room, load_transitions, num_bytes
from bpt_rl.run import records
from bpt_rl.run.checkpoint import Checkpoints
from bpt_rl.run.open_runs import Announce, OpenRun, Progress, legs, means, open_runs
from bpt_rl.run.seed_axis import numbers, over_seeds, split, stacked
from bpt_rl.td_config import READ_FIELDS, TD_AGENTS, TDAgentName
from bpt_rl.types import DataStatistics

Metrics = dict[str, jax.Array]


def train_td(
    configs: Sequence[TrainConfig],
    report_progress: Progress | None = None,
    *,
    announce: Announce | None = None,
    command: str = "",
) -> list[records.RunFolder]:
    """Trains runs to `td.num_updates` gradient steps, all at once, going on from their newest checkpoints.

    A compiled call makes the gradient steps up to the next line of metrics or the next checkpoint; the line has their
    means. What a step draws depends on the seed and its number alone, so that a run that was interrupted and called
    again ends with the parameters of an uninterrupted one, bit for bit on the CPU.

    Args:
      configs: Of the runs, as `bpt_rl.run.train_seeds` takes them; `agent` is one of `TD_AGENTS`.
      report_progress: Told of every call, once its metrics are known to be finite.
      announce: Told what the transitions take.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If the store does not exist.
      ValueError: If configuration, store and run folder do not fit together, or transitions do not fit the device.
      FloatingPointError: If a loss or a network stops being finite.
    """
    config = configs[0]
    _check_settings(config)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(config.data.store))
        # Whatever is wrong with configuration or data shows before there is a run folder.
        statistics = store.statistics(config.data.task)
        check_room(store)
        learner = _learner(config, statistics)
        choice = Choice(place="accelerator", num_bytes=num_bytes(store), reason="as transitions")
        facts = {"command": command, "data": dataclasses.asdict(choice)}
        runs = open_runs(stack, configs, statistics, facts)
        if announce:
            announce(f"Transitions lie on the device: {choice.num_bytes / 2**20:.3g} MiB.")
        transitions: Transitions | None = None
        for together, start, stop in legs(runs, config.td.num_updates):
            if transitions is None:
                transitions = load_transitions(store, config.data.task)
            ledger = _Ledger(together, start, report_progress)
            for step, states, metrics in _calls(learner, together, transitions, start, stop):
                ledger.add(step, metrics)
                if step % config.checkpoint_every == 0 or step == stop:
                    ledger.settle()
                    for run, state in zip(together, split(states, len(together)), strict=True):
                        run.saved.save(step, state)
    return [run.folder for run in runs]


def restore_learner(folder: records.RunFolder) -> tuple[OfflineLearner, Any, int]:
    """Returns the learner of a run, its state at the newest checkpoint, and the gradient steps done by then.

    `learner.policy(state)` acts as the run has learnt to.

    Raises:
      FileNotFoundError: If this is no run folder, or it has no checkpoint.
      ValueError: If the run is of an agent that learns from trajectories.
    """
    config = folder.config()
    if config.agent not in TD_AGENTS:
        raise ValueError(
            f"Here a run's agent must be one of {', '.join(TD_AGENTS)}; {folder.path} has {config.agent!r}. Name "
            "another run."
        )
    learner = _learner(config, folder.statistics())
    with Checkpoints(folder.checkpoints_path, config.keep_checkpoints) as saved:
        step = saved.latest_step or 0
        return learner, saved.restore(step, jax.eval_shape(learner.init, jax.random.key(0))), step


def make_updates(
    learner: OfflineLearner,
    draw: TransitionDraw,
    state: Any,
    transitions: Transitions,
    first: Any,
    *,
    key: jax.Array,
    num_updates: int,
) -> tuple[Any, Metrics]:
    """Returns the state after gradient steps one after another, and the means of their metrics.

    Args:
      learner: Makes the steps.
      draw: Makes their batches.
      state: Before them.
      transitions: All there are.
      first: Number of the first step, from 0.
      key: Of the run; a step's number is folded in.
      num_updates: Steps.
    """

    def keys_of(step: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(key, step))

    # All at once: within the loop each would cost more than the batch it is drawn for.
    draw_keys, update_keys = jnp.moveaxis(jax.vmap(keys_of)(first + jnp.arange(num_updates)), 1, 0)
    indices = jax.vmap(functools.partial(draw.indices, transitions))(draw_keys)

    def update(state: Any, drawn: tuple[jax.Array, jax.Array]) -> tuple[Any, Metrics]:
        return learner.update(state, draw.gather(transitions, drawn[0]), drawn[1])

    state, metrics = jax.lax.scan(update, state, (indices, update_keys))
    means = {name: values.mean() for name, values in metrics.items()}
    # Not finite after the step that breaks a network, where the losses are so only at the next.
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return state, means | {"state_norm": optax.tree.norm(floats)}


def compile_updates(
    learner: OfflineLearner, draw: TransitionDraw, num_seeds: int = 1
) -> Callable[..., tuple[Any, Metrics]]:
    """Returns `make_updates` of them, compiled once for each `num_updates`; the state it is given is gone.

    With several seeds, states, keys and metrics are stacked (`bpt_rl.run.seed_axis`); the transitions are shared.
    """

    def run(
        state: Any, transitions: Transitions, first: Any, *, key: jax.Array, num_updates: int
    ) -> tuple[Any, Metrics]:
        def one(state: Any, key: jax.Array) -> tuple[Any, Metrics]:
            return make_updates(learner, draw, state, transitions, first, key=key, num_updates=num_updates)

        ran: tuple[Any, Metrics] = over_seeds(one, num_seeds)(state, key)
        return ran

    return jax.jit(run, static_argnames="num_updates", donate_argnums=0)


def _calls(
    learner: OfflineLearner, runs: Sequence[OpenRun], transitions: Transitions, start: int, stop: int
) -> Iterator[tuple[int, Any, Metrics]]:
    """Yields steps done, states and metrics of each compiled call as soon as it is dispatched."""
    config = runs[0].config
    td, step = config.td, start
    draw = TransitionDraw(batch_size=td.batch_size, num_step_return=td.num_step_return, discount=td.discount)
    update = compile_updates(learner, draw, len(runs))
    state = stacked([_state_at(start, learner, run) for run in runs])
    # Parameters are drawn with the seed's key itself.
    key = stacked([jax.random.fold_in(jax.random.key(run.config.seed), 1) for run in runs])
    while step < stop:
        ends = (step + every - step % every for every in (config.log_every, config.checkpoint_every))
        end = min(stop, *ends)
        state, metrics = update(state, transitions, np.int32(step), key=key, num_updates=end - step)
        step = end
        yield step, state, metrics


class _Ledger:
    """Checks, logs and reports calls in order, one behind the device, which so never waits for the host."""

    def __init__(self, runs: Sequence[OpenRun], start: int, report_progress: Progress | None) -> None:
        self._runs, self._report_progress = runs, report_progress
        self._pending: list[tuple[int, Metrics]] = []
        self._began, self._last_step = time.perf_counter(), start

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a call that may still be running; settles the one before it."""
        self.settle()
        self._pending = [(step, metrics)]

    def settle(self) -> None:
        """Waits for the metrics taken; checks, logs and reports them."""
        for step, metrics in self._pending:
            values = numbers(metrics, len(self._runs))
            self._check_finite(step, values)
            now = time.perf_counter()
            speed = {"updates_per_second": (step - self._last_step) / (now - self._began)}
            self._began, self._last_step = now, step
            for run, own in zip(self._runs, values, strict=True):
                run.log({"step": step, **own, **speed})
            if self._report_progress:
                num_updates = self._runs[0].config.td.num_updates
                self._report_progress(step, num_updates, means(values) | speed)
        self._pending = []

    def _check_finite(self, step: int, values: Sequence[Mapping[str, float]]) -> None:
        for run, own in zip(self._runs, values, strict=True):
            if bad := run.first_bad(own):
                raise FloatingPointError(
                    f"Losses and networks must stay finite; got {bad} between steps {self._last_step} and {step}. "
                    f"Last good checkpoint: {run.last_good}. Lower td.learning_rate or check the data with "
                    "`bpt-rl data verify`."
                )


def _learner(config: TrainConfig, statistics: DataStatistics) -> OfflineLearner:
    name: TDAgentName = config.agent  # type: ignore[assignment]
    return make_learner(name, config.td, statistics.observation_dim, statistics.action_dim)


def _state_at(start: int, learner: OfflineLearner, run: OpenRun) -> Any:
    key = jax.random.key(run.config.seed)
    return (
        run.saved.restore(start, jax.eval_shape(learner.init, key)) if start else jax.jit(learner.init)(key)
    )


def _check_settings(config: TrainConfig) -> None:
    """Refuses what would be read by no one."""
    if config.data.place not in ("auto", "accelerator"):
        raise ValueError(
            f"Transitions lie on the device: data.place must be auto or accelerator; got {config.data.place!r}. "
            "Leave it out."
        )
    default = flat(dataclasses.asdict(TrainConfig()))
    for name, value in flat(dataclasses.asdict(config)).items():
        is_foreign = name.startswith(("data.", "model.", "optimizer.")) and name not in READ_FIELDS
        if is_foreign and value != default[name]:
            raise ValueError(
                f"{config.agent} reads td.*, and of data.* store, task and place; got {name} {value!r}. Leave it "
                f"out, or begin with the preset {config.agent}."
            )
