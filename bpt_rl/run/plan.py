"""`bpt-rl plan`: the memory, operations and time of a training step, before anything runs."""

import dataclasses
from typing import Literal

import jax

from bpt_rl.agents.registry import make_agent
from bpt_rl.config import Activations, PlanConfig
from bpt_rl.datasets import capacity
from bpt_rl.datasets.packing import steps_of
from bpt_rl.envs.tasks import DOMAINS, domain_of
from bpt_rl.nn.memory_plan import (
    IN_HOST,
    LEVELS,
    Flops,
    MemoryPlan,
    Workload,
    count_flops,
    longest_context,
    plan_memory,
)
from bpt_rl.run.synthetic import synthetic_statistics
from bpt_rl.types import LAYOUTS

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations a second of a card's kernels."""

    attention: float
    """cuDNN's causal attention, heads of 128, two products forward and five backward, of the causal half."""
    matrices: float
    """A large bfloat16 matrix product."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator, as far as a plan needs it."""

    name: str
    memory: int
    """Bytes that JAX may take."""
    host_memory: int | None = None
    """Bytes of the host; None if they are not known."""
    has_cudnn: bool = True
    is_host: bool = False
    """Whether its memory is the host's, so that nothing can be moved out of it."""
    rates: Rates | None = None
    """None if they were not measured."""


H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    # 81,559 MiB as nvidia-smi counts them, at XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
    memory=int(0.95 * 81_559 * 2**20),
    # Measured by this project on one card; attention at 131,072 tokens.
    rates=Rates(attention=564e12, matrices=790e12),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """A step with one choice of what layers keep."""

    activations: Activations
    memory: MemoryPlan
    flops: Flops
    seconds: float | None
    """Of a step whose attention and matrix products run at their kernels' rates and which does nothing else. Measured
    on an H100, steps of 131,072 and 524,288 tokens took 7 to 12% longer, those of 32,768 23 to 30%. None if no rates
    were measured."""
    longest_context: int
    """Tokens of one row that fit the device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training run needs of a device."""

    config: PlanConfig
    device: Device
    workload: Workload
    levels: tuple[Level, ...]
    """Fastest first; those that move what is kept to the host only where it has a memory of its own."""
    reason_without_seconds: str
    """Empty if steps are timed."""

    @property
    def choice(self) -> Level | None:
        """The fastest level that fits the device; None if none does."""
        return next((level for level in self.levels if level.memory.device <= self.device.memory), None)


def make_plan(config: PlanConfig) -> Plan:
    """Returns what a training step needs, at each level of `model.activations`.

    Sizes of observations, actions and episodes are those of the task's domain, at an action repeat of 1: a plan needs
    no store. Seconds of offload leave out the transfers, which are to hide behind the attention.

    Raises:
      ValueError: If agent, attention, task or context length cannot be planned.
    """
    device = H100 if config.device == "h100" else this_device()
    workload = _workload(config, device)
    levels = []
    for activations in LEVELS:
        if device.is_host and activations in IN_HOST:
            continue
        flops = count_flops(workload, activations)
        levels.append(
            Level(
                activations=activations,
                memory=plan_memory(workload, activations),
                flops=flops,
                seconds=_seconds(device, workload, flops),
                longest_context=longest_context(
                    workload, activations, device.memory, host_memory=device.host_memory
                ),
            )
        )
    return Plan(
        config=config,
        device=device,
        workload=workload,
        levels=tuple(levels),
        reason_without_seconds=_reason_without_seconds(device, workload),
    )


def this_device() -> Device:
    """Returns the first device of this machine; its rates are known only for the cards in this file."""
    device, room = jax.devices()[0], capacity.measure()
    if jax.default_backend() == "cpu":
        return Device(name="this machine's CPU", memory=room.host, has_cudnn=False, is_host=True)
    statistics = device.memory_stats()
    memory = statistics["bytes_limit"] if statistics else room.host
    has_cudnn = jax.default_backend() == "gpu" and "NVIDIA" in device.device_kind
    if device.device_kind == H100.name:
        return dataclasses.replace(H100, memory=memory)
    return Device(name=device.device_kind, memory=memory, has_cudnn=has_cudnn)


def _workload(config: PlanConfig, device: Device) -> Workload:
    if config.agent == "bc":
        raise ValueError(
            "A plan must be of a transformer; got agent 'bc', whose memory no context fills. Use at or dt."
        )
    domain = DOMAINS[domain_of(config.data.task)]
    longest = config.data.window or domain.episode_steps
    chain_steps = config.data.num_trajectories * longest
    chain_tokens = chain_steps * LAYOUTS[config.model.layout]
    context_length = config.tokens or config.data.context_length or chain_tokens
    num_steps = steps_of(context_length, config.model.layout)
    num_rows, is_one_chain_a_row = 1, True
    if not config.tokens:
        chains_per_row = num_steps // chain_steps
        if not chains_per_row:
            raise ValueError(
                f"context_length must hold a whole chain; got {context_length} tokens for "
                f"{config.data.num_trajectories} trajectories of {longest} steps. Use "
                f"{chain_tokens} tokens or fewer trajectories."
            )
        num_rows = -(-config.data.batch_size // chains_per_row)
        is_one_chain_a_row = chains_per_row == 1
    statistics = synthetic_statistics(config.data.task, domain)
    shapes = jax.eval_shape(make_agent(config, statistics).init, jax.random.key(0))
    return Workload(
        model=config.model,
        implementation=_implementation(config, device, is_one_chain_a_row),
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        num_rows=num_rows,
        context_length=context_length,
        accumulation=config.optimizer.accumulation,
    )


def _implementation(
    config: PlanConfig, device: Device, is_one_chain_a_row: bool
) -> Literal["cudnn", "blockwise"]:
    """Returns the attention that the run will get, by the rules of `bpt_rl.nn.attention`."""
    asked, head_dim = config.model.implementation, config.model.embed_dim // config.model.num_heads
    if asked == "reference":
        raise ValueError(
            "A plan must be of attention with memory linear in the context; got implementation 'reference'. "
            "Use auto, cudnn or blockwise."
        )
    is_fit = config.model.compute_dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128
    if asked == "cudnn" or (asked == "auto" and device.has_cudnn and is_fit and is_one_chain_a_row):
        return "cudnn"
    return "blockwise"


def _seconds(device: Device, workload: Workload, flops: Flops) -> float | None:
    if device.rates is None or workload.implementation == "blockwise":
        return None
    return flops.attention / device.rates.attention + flops.matrices / device.rates.matrices


def _reason_without_seconds(device: Device, workload: Workload) -> str:
    if device.rates is None:
        return f"no rates were measured on {device.name}"
    if workload.implementation == "blockwise":
        return "no rate was measured for blockwise attention; cudnn needs bfloat16 and one chain a row"
    return ""


def describe(plan: Plan) -> str:
    """Returns the plan as text for the terminal: GiB are 2**30 bytes."""
    work, model = plan.workload, plan.workload.model
    lines = [
        f"Model: {work.num_parameters:,} parameters; {model.num_layers} layers, width {model.embed_dim}, "
        f"{model.num_heads} heads, layout {model.layout}, {model.compute_dtype}.",
        f"Step: {work.accumulation} x {work.num_rows} rows of {work.context_length:,} tokens, "
        f"{work.implementation} attention.",
        f"Device: {plan.device.name}, {plan.device.memory / GIB:.1f} GiB for JAX.",
        "",
        _table(plan),
        "",
    ]
    if plan.reason_without_seconds:
        lines.append(f"Step time is left out: {plan.reason_without_seconds}.")
    if plan.choice:
        lines.append(
            f"Choice: {plan.choice.activations}, the fastest that fits: model.activations = "
            f'"{plan.choice.activations}".'
        )
    else:
        need = plan.levels[-1].memory.device / GIB
        lines.append(
            f"Choice: none, even {plan.levels[-1].activations} takes {need:.1f} GiB. Three ways out: a shorter context "
            f"(up to {plan.levels[-1].longest_context:,} tokens), fewer rows (data.batch_size) or a smaller model."
        )
    return "\n".join(lines)


def _table(plan: Plan) -> str:
    def gib(num_bytes: int) -> str:
        return f"{num_bytes / GIB:.2f}"

    rows = [
        ["", *(level.activations for level in plan.levels)],
        ["parameters, GiB", *(gib(level.memory.parameters) for level in plan.levels)],
        ["optimizer, GiB", *(gib(level.memory.optimizer) for level in plan.levels)],
        ["gradients, GiB", *(gib(level.memory.gradients) for level in plan.levels)],
        ["kept activations, GiB", *(gib(level.memory.kept) for level in plan.levels)],
        ["token embeddings, GiB", *(gib(level.memory.embeddings) for level in plan.levels)],
        ["largest temporary, GiB", *(gib(level.memory.layer) for level in plan.levels)],
        ["device in all, GiB", *(gib(level.memory.device) for level in plan.levels)],
        ["host, GiB", *(gib(level.memory.host) for level in plan.levels)],
        ["attention, TFLOP", *(f"{level.flops.attention / 1e12:.4g}" for level in plan.levels)],
        ["matrices, TFLOP", *(f"{level.flops.matrices / 1e12:.4g}" for level in plan.levels)],
    ]
    if not plan.reason_without_seconds:
        rows.append(["step at kernel rates, s", *(f"{level.seconds:.3g}" for level in plan.levels)])
    rows.append(["longest row that fits", *(f"{level.longest_context:,}" for level in plan.levels)])
    return "\n".join(f"{name:<23}" + "".join(f"{cell:>19}" for cell in cells) for name, *cells in rows)
