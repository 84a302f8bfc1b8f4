"""What to change where a training step does not fit its device."""

import dataclasses
from collections.abc import Iterator

from bpt_rl.config import ModelConfig, TrainConfig
from bpt_rl.nn.memory_plan import longest_context, plan_memory
from bpt_rl.run.plan import Level, Plan, plan_step, size
from bpt_rl.types import LAYOUTS


def ways_out(plan: Plan, level: Level, memory: int) -> str:
    """Returns up to three ways to a step that takes at most so many bytes of the device, each planned to.

    Args:
      plan: Of the step that does not fit.
      level: What its layers keep.
      memory: Bytes of the device.
    """
    ways = [_leaner(plan, level, memory), _shorter(plan, level, memory), _fewer(plan, level, memory)]
    return "".join(f" ({letter}) {way}." for letter, way in zip("abc", filter(None, ways), strict=False))


def _leaner(plan: Plan, level: Level, memory: int) -> str:
    """Returns the same step with less on the device at a time; empty if that is not enough."""
    host = plan.device.host_memory
    for other in plan.levels:
        if other.memory.device < level.memory.device and other.memory.fits(memory, host):
            return f'model.activations = "{other.activations}" takes {size(other.memory.device)} by the plan'
    for settings, config in _leaner_configs(plan):
        again = plan_step(config, plan.rows, plan.device, num_parameters=plan.workload.num_parameters)
        fitting = [other for other in again.levels if other.memory.fits(memory, host)]
        if fitting:
            return (
                f'{settings} with model.activations = "{fitting[0].activations}" takes '
                f"{size(fitting[0].memory.device)} by the plan"
            )
    return ""


def _leaner_configs(plan: Plan) -> Iterator[tuple[str, TrainConfig]]:
    """Yields settings and the configuration with them: groups, the optimizer in the host, and both."""
    # The level that goes with each comes from its own plan.
    config, model = plan.config, dataclasses.replace(plan.config.model, activations="auto")
    heads = model.num_kv_heads or model.num_heads
    in_host = dataclasses.replace(config.optimizer, place="host")
    changed: list[tuple[str, ModelConfig]] = []
    for count in range(model.head_groups + 1, heads + 1):
        if heads % count == 0:
            changed.append((f"model.head_groups = {count}", dataclasses.replace(model, head_groups=count)))
    # Least is kept near the square root of the number of layers.
    near = [n for n in range(2, model.num_layers) if model.num_layers % n == 0 and n * n <= model.num_layers]
    if near and model.layer_groups == 1:
        groups = f"model.layer_groups = {near[-1]}"
        changed.append((groups, dataclasses.replace(model, layer_groups=near[-1])))
        most = dataclasses.replace(model, layer_groups=near[-1], head_groups=heads)
        changed.append((f"{groups} and model.head_groups = {heads}", most))
    for settings, leaner in changed:
        yield settings, dataclasses.replace(config, model=leaner)
    if plan.device.is_host or config.optimizer.place == "host" or config.mesh.num_devices > 1:
        return
    yield 'optimizer.place = "host"', dataclasses.replace(config, optimizer=in_host)
    for settings, leaner in changed[-1:]:
        both = dataclasses.replace(config, model=leaner, optimizer=in_host)
        yield f'{settings} and optimizer.place = "host"', both


def _shorter(plan: Plan, level: Level, memory: int) -> str:
    """Returns the longest rows that fit."""
    work, data = plan.workload, plan.config.data
    tokens = longest_context(
        work, level.activations, memory, host_memory=plan.device.host_memory, num_rows=work.num_rows
    )
    steps = data.window or plan.rows.statistics.episode_steps
    count = tokens // (steps * LAYOUTS[plan.config.model.layout])
    if not count:
        return ""
    return f"Rows of at most {tokens:,} tokens hold data.num_trajectories = {count}, of {steps} steps each"


def _fewer(plan: Plan, level: Level, memory: int) -> str:
    """Returns the most rows that fit at a time, or the deepest model."""
    work, host = plan.workload, plan.device.host_memory
    shares = work.share.row_shares
    for num_rows in range(work.num_rows - shares, 0, -shares):
        fewer = dataclasses.replace(work, num_rows=num_rows, accumulation=2)
        if plan_memory(fewer, level.activations).fits(memory, host):
            chains = max(1, plan.config.data.batch_size * num_rows // work.num_rows)
            times = -(-plan.config.optimizer.accumulation * plan.config.data.batch_size // chains)
            return (
                f"At most {num_rows} of {work.num_rows} rows at a time: data.batch_size = {chains} with "
                f"optimizer.accumulation = {times}"
            )
    return "A smaller model (model.embed_dim, model.num_layers)"
