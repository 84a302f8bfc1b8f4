"""Training of the agents that learn from chains: the loop that feeds, logs and checkpoints a gradient step."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bpt_rl
from bpt_rl.agents.base import Agent
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import Activations, TrainConfig
from bpt_rl.config_toml import flat
from bpt_rl.datasets.sampling import ChainSampler, batches
from bpt_rl.datasets.store import Store
from bpt_rl.nn.device_mesh import check_rows, make_mesh, placed_batch, row_share
from bpt_rl.run import records
from bpt_rl.run.activations import Choice, choose_activations
from bpt_rl.run.devices import Device, this_device
from bpt_rl.run.expected_return import prepare_expected_return
from bpt_rl.run.ledger import Ledger
from bpt_rl.run.open_runs import Announce, OpenRun, Progress, legs, open_runs
from bpt_rl.run.out_of_memory import MemoryWatch, OutOfMemoryError
from bpt_rl.run.plan import Rows
from bpt_rl.run.processes import agreed, check_alike, ending_together, gathered, is_first
from bpt_rl.run.seed_axis import split, stacked
from bpt_rl.run.step import (
    CompiledStep,
    TrainState,
    compile_step,
    init_state,
    make_optimizer,
    placed_state,
    state_layout,
)
from bpt_rl.td_config import TDConfig
from bpt_rl.types import DataStatistics, PackedBatch


def train_chains(
    configs: Sequence[TrainConfig],
    report_progress: Progress | None = None,
    *,
    announce: Announce | None = None,
    command: str = "",
) -> list[records.RunFolder]:
    """Trains runs to `optimizer.num_steps` gradient steps, all at once, going on from their newest checkpoints.

    Batch k of a run depends on its seed and k alone, so that a run that was interrupted at any step and called again
    ends with the parameters of an uninterrupted one, bit for bit on the CPU.

    Args:
      configs: Of the runs, as `bpt_rl.run.train_seeds` takes them.
      report_progress: Told of every gradient step, once its metrics are known to be finite.
      announce: Told where the episodes are kept and what layers keep, and why.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If the store does not exist.
      ValueError: If configuration, store and run folder do not fit together.
      FloatingPointError: If loss, gradient or parameters stop being finite.
      OutOfMemoryError: If a step does not fit the device.
    """
    config = configs[0]
    _check_settings(config, len(configs))
    with contextlib.ExitStack() as stack:
        # Whatever is wrong with configuration or data shows before there is a run folder.
        subject = _subject_of(stack, config, len(configs))
        facts = {"command": command, "data": dataclasses.asdict(subject.sampler.choice)}
        if jax.process_count() > 1:
            facts["processes"] = jax.process_count()
        has_layers = config.agent != "bc"
        if has_layers:
            facts["activations"] = dataclasses.asdict(subject.choice)
        runs = open_runs(stack, configs, subject.statistics, facts)
        stack.enter_context(ending_together(runs[0].folder.path))
        if announce:
            announce(f"Episodes are kept in place {subject.sampler.choice}.")
        if announce and has_layers:
            announce(f"Activations: {subject.choice}.")
        expected = prepare_expected_return(subject.store, runs) if is_first() else None
        gathered(None)
        if announce and expected:
            announce(f"Expected returns: {expected}.")
        for together, start, stop in legs(runs, config.optimizer.num_steps):
            with _noting_exhaustion(subject, configs):
                _train(subject, together, range(start, stop), report_progress)
    return [run.folder for run in runs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is trained, of what, and where."""

    mesh: jax.sharding.Mesh | None
    """Devices that share a step; None for one, whose programs know of no mesh."""
    store: Store
    statistics: DataStatistics
    sampler: ChainSampler
    """Of the rows that the devices of this process share."""
    num_rows: int
    """Of a micro-batch, of all processes."""
    choice: Choice
    """What layers keep."""
    watch: MemoryWatch
    agent: Agent


def _subject_of(stack: contextlib.ExitStack, config: TrainConfig, num_seeds: int) -> _Subject:
    """Returns what a configuration, the store and the devices make, the same in all processes; the stack closes it."""
    with agreed():
        mesh = make_mesh(config.mesh) if config.mesh.num_devices > 1 or config.mesh.coordinator else None
        store = stack.enter_context(Store.open(config.data.store))
        statistics = store.statistics(config.data.task)
        sampler = _sampler_of(config, store, mesh)
        num_rows = sampler.num_rows * row_share(mesh).num_shares
        rows = _rows_of(sampler, statistics, num_rows)
        # To each seed its share: a step takes as much for every seed.
        device = _device_beside(sampler).share(num_seeds)
        device = device.one_of(config.mesh.num_devices // jax.process_count())
        before = [_recorded_activations(config), records.RunFolder(Path(config.run)).exhausted()]
    check_alike(_shared_values(config) | {"a store of digest": statistics.digest})
    device, (recorded, exhausted) = _least(device), gathered(before)[0]
    with agreed():
        choice = choose_activations(config, rows, device=device, recorded=recorded, exhausted=exhausted)
        watch = MemoryWatch(config=choice.applied(config), rows=rows, device=device)
        agent = make_agent(watch.config, statistics)
        watch.refuse_what_is_far_beyond()
    return _Subject(
        mesh=mesh,
        store=store,
        statistics=statistics,
        sampler=sampler,
        num_rows=num_rows,
        choice=choice,
        watch=watch,
        agent=agent,
    )


@contextlib.contextmanager
def _noting_exhaustion(subject: _Subject, configs: Sequence[TrainConfig]) -> Iterator[None]:
    """Notes in the run folders what layers kept when memory runs out, so that `auto` takes less the next time.

    Raises:
      OutOfMemoryError: That it ran out, and what the next time takes.
    """
    try:
        yield
    except OutOfMemoryError as error:
        config, watch = configs[0], subject.watch
        if config.model.activations != "auto" or config.agent == "bc":
            raise
        # Seeds that are trained together share a choice, and so what it must leave out.
        exhausted = {*records.RunFolder(Path(config.run)).exhausted(), subject.choice.activations}
        for each in configs:
            path = records.RunFolder(Path(each.run)).exhausted_path
            records.write_json(path, {"activations": sorted(exhausted)})
        following = choose_activations(
            config, watch.rows, device=watch.device, exhausted=exhausted
        ).activations
        if following in exhausted:
            raise
        raise OutOfMemoryError(f"{error} The same command again takes {following}.") from error


def _train(
    subject: _Subject, together: Sequence[OpenRun], steps: range, report_progress: Progress | None
) -> None:
    """Takes gradient steps of runs that go on together, and saves what they reach."""
    watch, config = subject.watch, subject.watch.config
    with watch.over("making the parameters"):
        state = stacked([_state_at(steps.start, subject, run) for run in together])
    tokens = subject.num_rows * subject.sampler.context_length * config.optimizer.accumulation
    ledger = Ledger(together, tokens, report_progress)
    for step, reached, metrics in _steps(subject, state, [run.config.seed for run in together], steps):
        # Memory may run out in a step that is only waited for here.
        with watch.over(f"in step {step - 1}"):
            ledger.settle()
        ledger.add(step, metrics)
        if step % config.checkpoint_every == 0 or step == steps.stop:
            with watch.over(f"in step {step}"):
                ledger.settle()
                for run, own in zip(together, split(reached, len(together)), strict=True):
                    run.saved.save(step, own)


def _check_settings(config: TrainConfig, num_seeds: int) -> None:
    if config.td != TDConfig():
        raise ValueError(
            f"Only agents that learn from single transitions read td.*; got agent {config.agent!r} and {config.td}. "
            "Leave td.* out, or name another agent."
        )
    if num_seeds > 1 and config.optimizer.place == "host":
        raise ValueError(
            "Seeds that are trained at once keep their parameters on the device; got optimizer.place 'host' and "
            f"{num_seeds} seeds. Train them one after another, or leave optimizer.place out."
        )
    if num_seeds > 1 and config.mesh.num_devices > 1:
        raise ValueError(
            f"Seeds are trained at once on one device; got {num_seeds} seeds and mesh {config.mesh}. Train them one "
            "after another, or leave mesh.* out."
        )


def _shared_values(config: TrainConfig) -> dict[str, Any]:
    """Returns what must be the same in all processes that train a run: all but where things lie."""
    values = flat(dataclasses.asdict(config)) | {"jax": jax.__version__, "bpt_rl": bpt_rl.__version__}
    return {name: value for name, value in values.items() if name not in ("run", "data.store", "data.place")}


def _sampler_of(config: TrainConfig, store: Store, mesh: jax.sharding.Mesh | None) -> ChainSampler:
    """Returns the source of the rows that this process's devices share."""
    share = row_share(mesh)
    expected_return = None
    if config.data.relabel == "expected_return":
        expected_return = records.RunFolder(Path(config.run)).expected_return_path
    sampler = ChainSampler(
        store,
        config.data,
        config.model.layout,
        config.seed,
        process_index=share.index,
        num_processes=share.num_shares,
        expected_return=expected_return,
    )
    check_rows(sampler.num_rows * share.num_shares, config.mesh)
    return sampler


def _rows_of(sampler: ChainSampler, statistics: DataStatistics, num_rows: int) -> Rows:
    """Returns what all processes together have of a micro-batch."""
    return Rows(
        statistics=statistics,
        num_rows=num_rows,
        context_length=sampler.context_length,
        is_one_chain_a_row=sampler.is_one_chain_a_row,
    )


def _least(device: Device) -> Device:
    """Returns a device of which every process has no less memory: all must choose alike."""
    found = gathered([device.memory, device.host_memory])
    hosts = [host for _, host in found if host is not None]
    return dataclasses.replace(
        device, memory=min(memory for memory, _ in found), host_memory=min(hosts, default=None)
    )


def _state_at(start: int, subject: _Subject, run: OpenRun) -> TrainState:
    """Returns a run's state after `start` steps, each array in its place; never two of them at once."""
    agent, optimizer, seed = subject.agent, run.config.optimizer, run.config.seed
    if not start:
        return placed_state(agent, optimizer, seed, subject.mesh)
    shapes = jax.eval_shape(lambda: init_state(agent, make_optimizer(optimizer), seed))
    state: TrainState = run.saved.restore(start, state_layout(shapes, optimizer, subject.mesh))
    return state


def _device_beside(sampler: ChainSampler) -> Device:
    """Returns the device that training has beside the episodes."""
    taken = sampler.choice.num_bytes
    device_bytes = taken if sampler.choice.place == "accelerator" else 0
    host_bytes = taken if sampler.choice.place == "host" else 0
    return this_device().less(device_bytes=device_bytes, host_bytes=host_bytes)


def _recorded_activations(config: TrainConfig) -> Activations | None:
    """Returns what layers kept in the run so far; None if it begins or did not say."""
    folder = records.RunFolder(Path(config.run))
    if not (folder.path / "versions.json").is_file():
        return None
    recorded: Activations | None = folder.versions().get("activations", {}).get("activations")
    return recorded


def _steps(
    subject: _Subject, state: TrainState, seeds: Sequence[int], steps: range
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Yields number, state and metrics of each gradient step as soon as it is dispatched to the device.

    One that leaves no room for others is waited for, and the next batch takes memory only then.
    """
    watch, mesh, sampler = subject.watch, subject.mesh, subject.sampler

    def make_batch(inputs: tuple[tuple[PackedBatch, ...], ...]) -> PackedBatch:
        """Stacks each seed's micro-batches, and the seeds' batches."""
        stack = functools.partial(jax.tree.map, lambda *arrays: jnp.stack(arrays))
        batch: PackedBatch = stacked([stack(*micro_batches) for micro_batches in zip(*inputs, strict=True)])
        return batch._replace(segment_ids=None) if sampler.is_one_chain_a_row else batch

    config, accumulation = watch.config.optimizer, watch.config.optimizer.accumulation
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) if mesh else None
    key = jax.jit(lambda: stacked([jax.random.key(seed) for seed in seeds]), out_shardings=everywhere)()
    put = functools.partial(placed_batch, mesh=mesh) if mesh else None
    first, last = steps.start * accumulation, steps.stop * accumulation
    is_tight = watch.is_tight
    every = (
        batches(sampler.with_seed(seed), first, last, put=put, is_put_ahead=not is_tight) for seed in seeds
    )
    source = zip(*every, strict=True)
    compiled: CompiledStep | None = None
    for step, inputs in enumerate(zip(*[source] * accumulation, strict=True), steps.start + 1):
        if compiled is None:
            with watch.over("compiling the step"):
                compiled = compile_step(
                    subject.agent,
                    config,
                    inputs,
                    key,
                    kernel_dtype=watch.config.model.compute_dtype,
                    make_batch=make_batch,
                    num_seeds=len(seeds),
                    mesh=mesh,
                )
        with watch.over(f"in step {step}"):
            state, metrics = compiled(state, inputs, key)
            if is_tight:
                jax.block_until_ready(metrics)
        yield step, state, metrics
