"""A plan as text for the terminal. GiB are 2**30 bytes."""

from collections.abc import Iterable, Iterator

from bpt_rl.datasets.capacity import GIB
from bpt_rl.nn.device_mesh import matrix_widths
from bpt_rl.run.plan import Level, Plan
from bpt_rl.run.ways_out import ways_out


def describe(plan: Plan) -> str:
    """Returns what `bpt-rl plan` prints."""
    work, model, device = plan.workload, plan.workload.model, plan.device
    lines = [
        f"Model: {work.num_parameters:,} parameters; {model.num_layers} layers, width {model.embed_dim}, "
        f"{model.num_heads} heads, layout {model.layout}, {model.compute_dtype}.",
        f"Step: {work.accumulation} x {work.num_rows} rows of {work.context_length:,} tokens, "
        f"{work.implementation} attention.",
        *_mesh_lines(plan),
        f"Device: {device.name}, {device.memory / GIB:.1f} GiB for JAX.",
        _host_line(plan),
        "",
        _table(plan),
        "",
    ]
    if plan.reason_without_seconds:
        lines.append(f"Step time is left out: {plan.reason_without_seconds}.")
    if plan.choice:
        lines.append(
            f"Choice: {plan.choice.activations}, the fastest that fits: model.activations = "
            f'"{plan.choice.activations}"; "auto" takes it.'
        )
    else:
        need = plan.leanest.memory.device / GIB
        lines.append(
            f"Choice: none, even {plan.leanest.activations} takes {need:.1f} GiB. Ways out:"
            + ways_out(plan, plan.leanest, device.memory)
        )
    return "\n".join(lines)


def _mesh_lines(plan: Plan) -> Iterator[str]:
    work, share, links = plan.workload, plan.workload.share, plan.device.links
    if share.num_devices == 1:
        return
    hosts = (
        f", {links.devices_per_host} a host" if links and share.num_devices > links.devices_per_host else ""
    )
    yield (
        f"Mesh: data {share.data} x fsdp {share.fsdp} x context {share.context} = {share.num_devices} "
        f"devices{hosts}. All below is of one of them, which has {work.local_rows} x {work.local_length:,} tokens."
    )
    yield _matrix_line(plan)
    if plan.method:
        yield f"Attention crosses devices by {plan.method}."


def _matrix_line(plan: Plan) -> str:
    work, share = plan.workload, plan.workload.share
    among = share.fsdp * share.context
    said = "Matrices of layers are " + (
        f"split among {work.matrix_devices} devices" if work.matrix_axes else "whole on each"
    )
    if work.matrix_devices == among:
        return f"{said}."
    stream, hidden = matrix_widths(work.model)
    return f"{said}: {among} do not divide {stream:,} and {hidden:,}."


def _host_line(plan: Plan) -> str:
    if plan.device.is_host:
        return "Host: the device itself."
    if plan.device.host_memory is None:
        return "Host: assumed to have what a step takes; --host-gib sets how much it has."
    of_one = " for each device" if plan.workload.share.num_devices > 1 else ""
    return f"Host: {plan.device.host_memory / GIB:.1f} GiB{of_one}."


def _table(plan: Plan) -> str:
    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:<23}" + "".join(f"{cell:>19}" for cell in cells)

    rows = [line(name, cells) for name, cells in (*_memory_rows(plan), *_work_rows(plan))]
    return "\n".join([line("", (level.activations for level in plan.levels)), *rows])


def _memory_rows(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    memory = [level.memory for level in plan.levels]
    yield "parameters, GiB", [_gib(each.parameters) for each in memory]
    yield "optimizer, GiB", [_gib(each.optimizer) for each in memory]
    yield "gradients, GiB", [_gib(each.gradients) for each in memory]
    yield "kept activations, GiB", [_gib(each.kept) for each in memory]
    yield "token embeddings, GiB", [_gib(each.embeddings) for each in memory]
    yield "largest temporary, GiB", [_gib(each.layer) for each in memory]
    if plan.workload.optimizer_in_host:
        yield "or the update, GiB", [_gib(each.update) for each in memory]
    yield "device in all, GiB", [_gib(each.device) for each in memory]
    yield "host, GiB", [_gib(each.host) for each in memory]


def _work_rows(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    yield "attention, TFLOP", [f"{level.flops.attention / 1e12:.4g}" for level in plan.levels]
    yield "matrices, TFLOP", [f"{level.flops.matrices / 1e12:.4g}" for level in plan.levels]
    is_shared = plan.workload.share.num_devices > 1
    collectives = dict.fromkeys(sent.collective for level in plan.levels for sent in level.traffic)
    for collective in collectives:
        yield f"{collective}, GiB", [_gib(_sent(level, collective)) for level in plan.levels]
    times = [level.time for level in plan.levels if level.time]
    if times and is_shared:
        yield "computing, s", [f"{time.computing:.3g}" for time in times]
        yield "waiting for others, s", [f"{time.exposed:.3g}" for time in times]
    if times:
        yield "step, s", [f"{time.total:.3g}" for time in times]
    yield "longest row that fits", [f"{level.longest_context:,}" for level in plan.levels]


def _sent(level: Level, collective: str) -> int:
    """Returns the bytes that a device sends in a step by one collective."""
    return sum(transfer.sent for transfer in level.traffic if transfer.collective == collective)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
