"""A gradient step: pure functions, and the programs compiled of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bpt_rl.agents.base import Agent, Params
from bpt_rl.config import OptimizerConfig
from bpt_rl.nn.device_mesh import parameter_shardings
from bpt_rl.nn.working_copy import slots_of, with_slots
from bpt_rl.run.host_state import updated_in_parts, working_copy_of
from bpt_rl.run.seed_axis import over_seeds, shapes_over_seeds
from bpt_rl.types import PackedBatch

Metrics = dict[str, jax.Array]


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


def make_optimizer(
    config: OptimizerConfig, gradient_norm: jax.Array | None = None
) -> optax.GradientTransformation:
    """Returns AdamW behind clipping by the global norm; only matrices of linear layers decay.

    Args:
      config: Rates, decay, and the norm to clip to.
      gradient_norm: Of the whole gradient, for an optimizer that is to be given parts of it, one after another.
    """

    def is_decayed(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "key", "") == "kernel", params
        )

    clip = optax.clip_by_global_norm(config.clip_norm)
    if gradient_norm is not None:
        clip = optax.stateless(lambda part, _: clipped(part, gradient_norm, config.clip_norm))
    adamw = optax.adamw(
        make_schedule(config), b2=config.beta2, weight_decay=config.weight_decay, mask=is_decayed
    )
    return optax.chain(clip, adamw)


def clipped(part: Params, gradient_norm: jax.Array, clip_norm: float) -> Params:
    """Returns a part of a gradient, scaled down as `optax.clip_by_global_norm` scales the whole."""
    return jax.tree.map(
        lambda leaf: jax.lax.select(gradient_norm < clip_norm, leaf, leaf / gradient_norm * clip_norm), part
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
) -> tuple[TrainState, Metrics]:
    """Returns the state after one gradient step and its metrics.

    Args:
      agent: Gives the loss.
      optimizer: Turns its gradient into an update.
      state: Before the step.
      batch: Micro-batches stacked on a leading axis; the gradient of each step that counts weighs the same.
      key: Draws dropout; the step number is folded in here.
    """
    gradient, metrics = step_gradient(agent, state.params, batch, jax.random.fold_in(key, state.step))
    state = updated(optimizer, state, gradient)
    return state, metrics | _norms(optax.tree.norm(gradient), optax.tree.norm(state.params))


def step_gradient(
    agent: Agent, params: Params, batch: PackedBatch, step_key: jax.Array
) -> tuple[Params, Metrics]:
    """Returns the gradient of all micro-batches together, float32, and the agent's metrics.

    Args:
      agent: Gives the loss.
      params: float32, or their working copy (`bpt_rl.nn.working_copy`).
      batch: As for `train_step`.
      step_key: Draws this step's dropout.
    """

    def loss(
        slots: Params, micro_batch: PackedBatch, key: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        # Weighed here: a weight on gradients has every large one held twice.
        loss, metrics = agent.loss(with_slots(params, slots), micro_batch, key)
        return weight * loss, {name: weight * value for name, value in metrics.items()}

    def micro(total: Params, inputs: tuple[PackedBatch, jax.Array]) -> tuple[Params, Metrics]:
        micro_batch, index = inputs
        weight = micro_batch.loss_mask.sum() / jnp.maximum(batch.loss_mask.sum(), 1)
        micro_key = jax.random.fold_in(step_key, index)
        gradient, metrics = jax.grad(loss, has_aux=True)(slots, micro_batch, micro_key, weight)
        return jax.tree.map(jnp.add, total, gradient), metrics

    slots = slots_of(params)
    indices = jnp.arange(len(batch.loss_mask))
    gradient, metrics = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, slots), (batch, indices))
    return gradient, {name: values.sum() for name, values in metrics.items()}


def updated(optimizer: optax.GradientTransformation, state: TrainState, gradient: Params) -> TrainState:
    """Returns the state after an update."""
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state)


def _norms(gradient_norm: jax.Array, parameter_norm: jax.Array) -> Metrics:
    # Not finite at the step that breaks the parameters, where the loss is so only at the next.
    return {"gradient_norm": gradient_norm, "parameter_norm": parameter_norm}


def state_layout(
    state: TrainState, config: OptimizerConfig, mesh: jax.sharding.Mesh | None = None
) -> TrainState:
    """Returns shape, type and place of each array of a state, as `optimizer.place` or the mesh says."""
    if mesh:
        shared: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            parameter_shardings(state, mesh),
        )
        return shared

    def layout(leaf: Any) -> jax.ShapeDtypeStruct:
        # Counts of steps are nothing to move.
        kind = "pinned_host" if config.place == "host" and leaf.ndim else None
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    layouts: TrainState = jax.tree.map(layout, state)
    return layouts


def placed_state(
    agent: Agent, config: OptimizerConfig, seed: int, mesh: jax.sharding.Mesh | None = None
) -> TrainState:
    """Returns the state before the first step, each array in its place; over a mesh, made there, nowhere whole."""
    optimizer = make_optimizer(config)
    make = functools.partial(init_state, agent, optimizer, seed)
    if config.place == "device" and not mesh:
        return make()
    placed = _shardings(state_layout(jax.eval_shape(make), config, mesh))
    if mesh:
        shared: TrainState = jax.jit(make, out_shardings=placed)()
        return shared
    # Of the state only the parameters are ever whole on the device.
    params = jax.device_put(agent.init(jax.random.key(seed)), placed.params)
    moments = jax.jit(optimizer.init, out_shardings=placed.optimizer_state)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, moments)


def _shardings(layouts: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, layouts)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A gradient step as compiled programs: a function of state, inputs and key; the state it is given is gone."""

    programs: tuple[jax.stages.Compiled, ...]
    """One; or three, working copy, gradient and update, of which only the last has the state on the device."""

    def __call__(self, state: TrainState, inputs: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        """Returns the next state and metrics, "learning_rate" among them."""
        if len(self.programs) == 1:
            next_state, metrics = self.programs[0](state, inputs, key)
            return next_state, metrics
        copy, gradient_of, update = self.programs
        gradient, metrics = gradient_of(copy(state.params), state.step, inputs, key)
        next_state, more = update(state, gradient)
        return next_state, metrics | more


def compile_step(
    agent: Agent,
    config: OptimizerConfig,
    inputs: Any,
    key: jax.Array,
    *,
    kernel_dtype: str = "float32",
    make_batch: Callable[[Any], PackedBatch] = lambda batch: batch,
    num_seeds: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> CompiledStep:
    """Returns the gradient step that training and benchmarks run.

    With `optimizer.place = "host"` parameters and moments lie in pinned memory of the host; the gradient is taken of
    a working copy, and both come to the device for the update, when activations are gone.

    Args:
      agent: Gives the loss.
      config: Of the optimizer.
      inputs: Arrays, or their shapes.
      key: As for `train_step`.
      kernel_dtype: Type in which the layers compute (`model.compute_dtype`): that of a working copy's kernels.
      make_batch: Makes the batch of inputs, in the same program.
      num_seeds: States, batches and keys of several are stacked (`bpt_rl.run.seed_axis`), and the state lies on the
        device.
      mesh: Devices that share the step, if there are several: parameters and moments lie as
        `bpt_rl.nn.device_mesh` says, inputs as they are given, and the key on each.
    """
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    shapes = state_layout(jax.eval_shape(lambda: init_state(agent, optimizer, 0)), config, mesh)

    def one(state: TrainState, batch: PackedBatch, key: jax.Array) -> tuple[TrainState, Metrics]:
        next_state, metrics = train_step(agent, optimizer, state, batch, key)
        return next_state, metrics | {"learning_rate": schedule(state.step)}

    def whole(states: TrainState, inputs: Any, keys: jax.Array) -> tuple[TrainState, Metrics]:
        stepped: tuple[TrainState, Metrics] = over_seeds(one, num_seeds)(states, make_batch(inputs), keys)
        return stepped

    def gradient(working: Params, step: jax.Array, inputs: Any, key: jax.Array) -> tuple[Params, Metrics]:
        return step_gradient(agent, working, make_batch(inputs), jax.random.fold_in(key, step))

    if config.place == "device":
        states = shapes_over_seeds(shapes, num_seeds)
        # Left to the compiler, a state could come back lying otherwise than the next step takes it.
        kept = (_shardings(shapes), None) if mesh else None
        step = jax.jit(whole, donate_argnums=0, out_shardings=kept)
        return CompiledStep((step.lower(states, inputs, key).compile(),))
    copy, update = _lowered_transfers(config, shapes, kernel_dtype)
    lowered = (copy, jax.jit(gradient).lower(copy.out_info, shapes.step, inputs, key), update)
    return CompiledStep(tuple(program.compile() for program in lowered))


def _lowered_transfers(
    config: OptimizerConfig, shapes: TrainState, kernel_dtype: str
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Returns what goes before and after the gradient of a state in the host: the working copy, and the update."""
    schedule, placed = make_schedule(config), _shardings(shapes)

    def copy(params: Params) -> Params:
        return working_copy_of(params, kernel_dtype)

    def update(state: TrainState, gradient: Params) -> tuple[TrainState, Metrics]:
        gradient_norm = optax.tree.norm(gradient)
        optimizer = make_optimizer(config, gradient_norm)
        next_state, parameter_norm = updated_in_parts(functools.partial(updated, optimizer), state, gradient)
        norms = _norms(gradient_norm, parameter_norm)
        return next_state, norms | {"learning_rate": schedule(state.step)}

    gradient = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes.params)
    into_host = jax.jit(update, donate_argnums=0, out_shardings=(placed, None))
    return jax.jit(copy).lower(shapes.params), into_host.lower(shapes, gradient)
