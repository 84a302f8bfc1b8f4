"""A plan as text for the terminal. GiB are 2**30 bytes."""

from bpt_rl.run.plan import GIB, Plan
from bpt_rl.run.ways_out import ways_out


def describe(plan: Plan) -> str:
    """Returns what `bpt-rl plan` prints."""
    work, model, device = plan.workload, plan.workload.model, plan.device
    lines = [
        f"Model: {work.num_parameters:,} parameters; {model.num_layers} layers, width {model.embed_dim}, "
        f"{model.num_heads} heads, layout {model.layout}, {model.compute_dtype}.",
        f"Step: {work.accumulation} x {work.num_rows} rows of {work.context_length:,} tokens, "
        f"{work.implementation} attention.",
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


def _host_line(plan: Plan) -> str:
    if plan.device.is_host:
        return "Host: the device itself."
    if plan.device.host_memory is None:
        return "Host: assumed to have what a step takes; --host-gib sets how much it has."
    return f"Host: {plan.device.host_memory / GIB:.1f} GiB."


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
    if plan.workload.optimizer_in_host:
        rows.insert(7, ["or the update, GiB", *(gib(level.memory.update) for level in plan.levels)])
    if not plan.reason_without_seconds:
        rows.append(["step at kernel rates, s", *(f"{level.seconds:.3g}" for level in plan.levels)])
    rows.append(["longest row that fits", *(f"{level.longest_context:,}" for level in plan.levels)])
    return "\n".join(f"{name:<23}" + "".join(f"{cell:>19}" for cell in cells) for name, *cells in rows)
