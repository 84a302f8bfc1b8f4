"""The memory, operations and time of a training step, before anything runs."""

import dataclasses
from typing import Literal

import jax

from bpt_rl.agents.registry import make_agent
from bpt_rl.config import CHAIN_AGENTS, CONDITIONED_AGENTS, Activations, PlanConfig, TrainConfig
from bpt_rl.datasets.capacity import GIB
from bpt_rl.datasets.packing import steps_of
from bpt_rl.envs.tasks import DOMAINS, domain_of
from bpt_rl.nn.attention import model_implementation
from bpt_rl.nn.context_parallel import MethodChoice
from bpt_rl.nn.device_mesh import attention_choice, check_matrices, check_rows
from bpt_rl.nn.memory_plan import (
    IN_HOST,
    LEVELS,
    Flops,
    MemoryPlan,
    count_flops,
    longest_context,
    plan_memory,
)
from bpt_rl.nn.traffic import Transfer, step_traffic
from bpt_rl.nn.workload import StepShare, Workload
from bpt_rl.run.devices import H100, Device, this_device
from bpt_rl.run.step_time import StepTime, computing_seconds, exposed_seconds
from bpt_rl.run.synthetic import synthetic_statistics
from bpt_rl.types import LAYOUTS, DataStatistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What a micro-batch is made of, for all devices together."""

    statistics: DataStatistics
    """Of the data: the sizes of observations, actions and episodes count."""
    num_rows: int
    context_length: int
    """Tokens a row."""
    is_one_chain_a_row: bool
    """Whether rows need no segment ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """A step with one choice of what layers keep."""

    activations: Activations
    memory: MemoryPlan
    """Of each device."""
    flops: Flops
    """Of each device."""
    traffic: tuple[Transfer, ...]
    """Of each device."""
    time: StepTime | None
    """Of a step whose attention, matrix products, other passes over the device's memory and transfers to the host and
    back run at their own rates, one after another. Measured on one H100 and on two, steps of 32,768 to 524,288 tokens
    took within 5% of it. None if no rates are known."""
    longest_context: int
    """Tokens of a row that fit the devices, with no more rows than they must have."""

    @property
    def seconds(self) -> float | None:
        """Of a step; None if no rates are known."""
        return self.time.total if self.time else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training run needs of a device, or of each of those that share its steps."""

    config: TrainConfig
    device: Device
    method: MethodChoice | None
    """How attention crosses the devices that share a row, if there are several."""
    rows: Rows
    workload: Workload
    levels: tuple[Level, ...]
    """Fastest first, by seconds or, without them, by what is computed again; those that move what is kept to the host
    only where it has a memory of its own."""
    reason_without_seconds: str
    """Empty if steps are timed."""

    @property
    def choice(self) -> Level | None:
        """The fastest level that fits device and host; None if none does."""
        memory, host = self.device.memory, self.device.host_memory
        return next((level for level in self.levels if level.memory.fits(memory, host)), None)

    @property
    def leanest(self) -> Level:
        """The level that takes least of the device, of those for which the host has room if there are any."""
        host = self.device.host_memory
        roomy = [level for level in self.levels if host is None or level.memory.host <= host]
        return min(roomy or self.levels, key=lambda level: (level.memory.device, level.memory.host))

    def level(self, activations: Activations) -> Level | None:
        """Returns the level of that name; None if this device has it not."""
        return next((level for level in self.levels if level.activations == activations), None)


def make_plan(config: PlanConfig) -> Plan:
    """Returns what a training step needs, at each level of `model.activations`.

    Sizes of observations, actions and episodes are those of the task's domain, at an action repeat of 1: a plan needs
    no store.

    Raises:
      ValueError: If agent, attention, task or context length cannot be planned.
    """
    device = H100 if config.device == "h100" else this_device()
    if config.host_gib:
        device = dataclasses.replace(device, host_memory=int(config.host_gib * GIB))
    return plan_step(config, rows_of_task(config), device.one_of(config.mesh.num_devices))


def rows_of_task(config: PlanConfig) -> Rows:
    """Returns the rows that `data.*` make of full episodes of the task, or the fewest there can be of `tokens`.

    Raises:
      ValueError: If a row cannot hold a whole chain, or `tokens` is no multiple of the layout's tokens a step.
    """
    domain = DOMAINS[domain_of(config.data.task)]
    data, longest = config.data, min(config.data.window or domain.episode_steps, domain.episode_steps)
    chain_steps = data.num_trajectories * longest
    chain_tokens = chain_steps * LAYOUTS[config.model.layout]
    context_length = config.tokens or data.context_length or chain_tokens
    num_steps = steps_of(context_length, config.model.layout)
    num_rows, is_one_chain_a_row = config.mesh.data * config.mesh.fsdp, True
    if not config.tokens:
        chains_per_row = num_steps // chain_steps
        if not chains_per_row:
            raise ValueError(
                f"context_length must hold a whole chain; got {context_length} tokens for "
                f"{data.num_trajectories} trajectories of {longest} steps. Use "
                f"{chain_tokens} tokens or fewer trajectories."
            )
        num_rows = -(-data.batch_size // chains_per_row)
        has_short_ones = data.window and data.window_start == "anywhere" and not data.mixture
        fewest = min(data.mixture, default=data.num_trajectories)
        is_one_chain_a_row = 2 * fewest * (1 if has_short_ones else longest) > num_steps
    return Rows(
        statistics=synthetic_statistics(data.task),
        num_rows=num_rows,
        context_length=context_length,
        is_one_chain_a_row=is_one_chain_a_row,
    )


def plan_step(config: TrainConfig, rows: Rows, device: Device, *, num_parameters: int | None = None) -> Plan:
    """Returns what a training step on such rows needs of a device, at each level of `model.activations`.

    Args:
      config: Of the run.
      rows: Of a micro-batch.
      device: Where it is to run: one of `config.mesh`, with its share of the host (`Device.one_of`).
      num_parameters: Of the agent, where they are known; else its parameters are counted.

    Raises:
      ValueError: If agent or attention cannot be planned, or the devices cannot share rows, heads or matrices.
    """
    check_rows(rows.num_rows, config.mesh)
    check_matrices(config.mesh, config.model)
    method = _method(config, rows)
    workload = _workload(config, rows, device, method, num_parameters)
    levels = []
    # What one group of heads leaves is no whole attention's result to move.
    left_out = IN_HOST if device.is_host else IN_HOST[:1] if config.model.head_groups > 1 else ()
    for activations in LEVELS:
        if activations in left_out:
            continue
        flops, memory = count_flops(workload, activations), plan_memory(workload, activations)
        traffic = step_traffic(workload, activations)
        levels.append(
            Level(
                activations=activations,
                memory=memory,
                flops=flops,
                traffic=traffic,
                time=_time(device, workload, activations, flops, memory, traffic),
                longest_context=longest_context(
                    workload, activations, device.memory, host_memory=device.host_memory
                ),
            )
        )
    return Plan(
        config=config,
        device=device,
        method=method,
        rows=rows,
        workload=workload,
        levels=tuple(sorted(levels, key=lambda level: level.seconds or 0)),
        reason_without_seconds=_reason_without_seconds(device, workload),
    )


def _method(config: TrainConfig, rows: Rows) -> MethodChoice | None:
    """Returns how attention will cross the devices of a row; None for one."""
    if config.mesh.context == 1:
        return None
    return attention_choice(config.mesh, config.model, num_tokens=rows.context_length)


def _workload(
    config: TrainConfig, rows: Rows, device: Device, method: MethodChoice | None, num_parameters: int | None
) -> Workload:
    if config.agent not in (*CHAIN_AGENTS, *CONDITIONED_AGENTS):
        raise ValueError(
            f"A plan must be of a transformer; got agent {config.agent!r}, whose memory no context fills. Use at, dt "
            "or ad."
        )
    if num_parameters is None:
        shapes = jax.eval_shape(make_agent(config, rows.statistics).init, jax.random.key(0))
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return Workload(
        model=config.model,
        implementation=_implementation(config, rows, device),
        num_parameters=num_parameters,
        num_rows=rows.num_rows,
        context_length=rows.context_length,
        accumulation=config.optimizer.accumulation,
        optimizer_in_host=config.optimizer.place == "host" and not device.is_host,
        share=StepShare(
            data=config.mesh.data,
            fsdp=config.mesh.fsdp,
            context=config.mesh.context,
            method=method.method if method else "ulysses",
        ),
        is_on_processor=device.is_host,
    )


def _implementation(config: TrainConfig, rows: Rows, device: Device) -> Literal["cudnn", "blockwise"]:
    """Returns the attention that the run will get."""
    implementation = model_implementation(
        config.model, device_kind=device.name, has_segments=not rows.is_one_chain_a_row
    )
    if implementation not in ("cudnn", "blockwise"):
        raise ValueError(
            "A plan must be of attention with memory linear in the context; got implementation "
            f"{implementation!r}. Use auto, cudnn or blockwise."
        )
    return "cudnn" if implementation == "cudnn" else "blockwise"


def _time(
    device: Device,
    workload: Workload,
    activations: Activations,
    flops: Flops,
    memory: MemoryPlan,
    traffic: tuple[Transfer, ...],
) -> StepTime | None:
    if device.rates is None or _reason_without_seconds(device, workload):
        return None
    exposed = 0.0
    if device.links:
        exposed = exposed_seconds(device.links, device.rates, workload, activations, traffic)
    return StepTime(
        computing=computing_seconds(device.rates, workload, activations, flops, memory), exposed=exposed
    )


def _reason_without_seconds(device: Device, workload: Workload) -> str:
    if device.rates is None:
        return f"no rates were measured on {device.name}"
    if workload.item_bytes != 2:
        return f"no rates were measured in {workload.model.compute_dtype}"
    if workload.share.num_devices > 1 and device.links is None:
        return f"nothing is known of what links {device.name} to others"
    return ""


def size(num_bytes: int) -> str:
    """Returns bytes for people: GiB, or MiB where they are fewer than one."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
