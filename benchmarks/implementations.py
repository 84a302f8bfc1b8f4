"""Do the implementations of attention train alike? Real steps on real episodes, and gradients against float64.

    JAX_PLATFORMS=cpu python benchmarks/implementations.py --out results/implementations_cpu.json

collects a few cartpole episodes, builds a store, and trains one small Agentic Transformer from the same parameters
on the same batches with every implementation that this device has (bfloat16 compute, no dropout). What a difference
of the loss curves may be is measured in the same run: the same implementation in other chunks and in float32 is the
same maths in another rounding. Exits with 1 if an implementation differs from `reference` by more than twice that,
in the mean over steps or anywhere, or if its gradients differ from a float64 reference by more than rounding.
Writes JSON with the curves, and beside it a PNG of them. Three to five minutes on two CPU cores, half of it the
reference. On a GPU, for instance:

    MUJOCO_GL=disable python benchmarks/implementations.py --heads 4 --head-dim 128 \\
      --out results/implementations_h100.json
"""

import argparse
import contextlib
import dataclasses
import functools
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bpt_rl.agents.registry import make_agent
from bpt_rl.collect_config import CollectConfig
from bpt_rl.config import BuildConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.sampling import ChainSampler
from bpt_rl.datasets.store import Store
from bpt_rl.nn.attention import cudnn_obstacle, dot_product_attention
from bpt_rl.run import records
from bpt_rl.run.collect import collect
from bpt_rl.run.step import init_state, make_optimizer, train_step
from bpt_rl.types import DataStatistics, PackedBatch

TASK, ACTION_REPEAT, NUM_EPISODES = "cartpole_swingup", 4, 16
"""Episodes of 250 agent steps, 1,000 tokens."""
GRADIENT_SHAPE = (2, 512, 4, 2, 64)
"""Rows, tokens, heads, key and value heads, their width."""
GRADIENT_BOUNDS = {"float32": 1e-5, "bfloat16": 2**-6}
"""Largest error of an array as a share of its largest entry: 84 roundings of float32, sums of 512 terms being in
another order, and four of bfloat16, which rounds weights, logit gradients and results."""
COLOURS = {"reference": "#1b1f24", "blockwise": "#d55e00", "cudnn": "#0072b2"}
NOISE_COLOURS = ("#6b7280", "#a8467f", "#b07c00")
SLACK = 2
"""A difference is like the noise up to this factor: of a few draws of the same noise, one is always the largest."""
SMOOTHED = 10
"""Gradient steps over which the plot averages differences."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """The losses of one training run."""

    name: str
    implementation: str
    compute_dtype: str
    chunk_sizes: tuple[int, int]
    """Of queries and keys, for blockwise."""
    loss: list[float]
    """Of each gradient step."""
    seconds: float
    """Of the steps and their compilation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Two curves, step by step."""

    name: str
    of: str
    """The other curve."""
    mean: float
    maximum: float


def implementations(dtype: str, head_dim: int) -> tuple[str, ...]:
    """Returns those that this device has, the yardstick first."""
    kind = jax.devices()[0].device_kind
    obstacle = cudnn_obstacle(device_kind=kind, dtype=dtype, head_dim=head_dim, has_segments=False)
    return ("reference", "blockwise", *([] if obstacle else ["cudnn"]))


def training_config(options: argparse.Namespace, store: Path) -> TrainConfig:
    return TrainConfig(
        seed=options.seed,
        data=DataConfig(
            store=str(store),
            task=TASK,
            num_trajectories=options.trajectories,
            batch_size=options.rows,
            place="host",
        ),
        model=ModelConfig(
            embed_dim=options.heads * options.head_dim,
            num_layers=options.layers,
            num_heads=options.heads,
            activation="gelu",
            dropout=0.0,
            activations="keep",
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(
            num_steps=options.steps,
            # Falls with the width: an unstable run would make any rounding large.
            learning_rate=0.064 / (options.heads * options.head_dim),
            warmup_steps=min(20, options.steps - 1),
            clip_norm=1.0,
        ),
    )


def make_store(folder: Path, seed: int) -> Path:
    """Collects episodes with correlated noise, and relabels them."""
    collection = CollectConfig(
        task=TASK,
        num_steps=1000 * NUM_EPISODES,
        action_repeat=ACTION_REPEAT,
        noise_decay=0.08,
        seed=seed,
        out=str(folder / "exorl"),
    )
    buffer = collect(collection)
    build = BuildConfig(
        source=(str(buffer),), out=str(folder / "store.h5"), tasks=(TASK,), action_repeat=ACTION_REPEAT
    )
    return build_store(build)


def draw_batches(config: TrainConfig, store: Store) -> list[PackedBatch]:
    """Returns the batch of each gradient step, one chain a row, with the leading axis of micro-batches."""
    sampler = ChainSampler(store, config.data, config.model.layout, config.seed)
    if not sampler.is_one_chain_a_row:
        raise ValueError(
            "Rows must hold one chain each, since cudnn knows no segments; got room for more. "
            "Use episodes of one length."
        )
    drawn = [sampler.batch(i)._replace(segment_ids=None) for i in range(config.optimizer.num_steps)]
    return [jax.tree.map(lambda array: array[None], batch) for batch in drawn]


def train_curve(
    name: str, config: TrainConfig, statistics: DataStatistics, drawn: Sequence[PackedBatch]
) -> Curve:
    """Trains from the parameters of the seed."""
    agent, optimizer = make_agent(config, statistics), make_optimizer(config.optimizer)
    state, key = init_state(agent, optimizer, config.seed), jax.random.key(config.seed)
    step = jax.jit(functools.partial(train_step, agent, optimizer), donate_argnums=0)
    losses, model, began = [], config.model, time.perf_counter()
    with full_products() if model.compute_dtype == "float32" else contextlib.nullcontext():
        for batch in drawn:
            state, metrics = step(state, batch, key)
            losses.append(metrics["loss"])
    loss = np.asarray(jnp.stack(losses), np.float64).tolist()
    print(f"  {name:<28}final loss {loss[-1]:.5f}   {time.perf_counter() - began:6.1f} s", flush=True)
    return Curve(
        name=name,
        implementation=model.implementation,
        compute_dtype=model.compute_dtype,
        chunk_sizes=(model.query_chunk_size, model.key_chunk_size),
        loss=loss,
        seconds=time.perf_counter() - began,
    )


def train_all(options: argparse.Namespace) -> tuple[TrainConfig, list[Curve], list[Curve]]:
    """Returns the configuration, the curves of the implementations, and those that the noise is taken from."""
    with tempfile.TemporaryDirectory() as folder:
        config = training_config(options, make_store(Path(folder), options.seed))
        with Store.open(config.data.store) as store:
            statistics, drawn = store.statistics(TASK), draw_batches(config, store)
    print(f"{len(drawn)} steps of {drawn[0].step.size * 4:,} tokens on {jax.default_backend()}:", flush=True)

    def train(name: str, **changes: Any) -> Curve:
        model = dataclasses.replace(config.model, **changes)
        return train_curve(name, dataclasses.replace(config, model=model), statistics, drawn)

    names = implementations(config.model.compute_dtype, options.head_dim)
    curves = [train(name, implementation=name) for name in names]
    rest = [
        train(
            f"blockwise, chunks {size}",
            implementation="blockwise",
            query_chunk_size=size,
            key_chunk_size=size,
        )
        for size in (96, 1024)
    ]
    rest.append(train("blockwise, float32", implementation="blockwise", compute_dtype="float32"))
    return config, curves, rest


def difference(curve: Curve, other: Curve) -> Difference:
    gap = np.abs(np.subtract(curve.loss, other.loss))
    return Difference(name=curve.name, of=other.name, mean=float(gap.mean()), maximum=float(gap.max()))


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """GPUs round the operands of float32 products to 10 bits unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def attend_and_differentiate(
    operands: Sequence[np.ndarray], dtype: Any, implementation: str
) -> list[np.ndarray]:
    """Returns output and gradients of query, key and value in float64, computed in `dtype`."""
    query, key, value, cotangent = (jnp.asarray(array, dtype) for array in operands)

    @jax.jit
    def both(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> Any:
        attend = functools.partial(dot_product_attention, implementation=implementation)
        out, pullback = jax.vjp(attend, query, key, value)
        return out, *pullback(cotangent)

    return [np.asarray(array, np.float64) for array in both(query, key, value, cotangent)]


def gradient_errors(seed: int) -> list[dict[str, Any]]:
    """Returns, of each implementation and type, the errors against a float64 reference on the same operands."""
    B, S, H, H_kv, K = GRADIENT_SHAPE
    generator = np.random.default_rng(seed)
    drawn = [generator.normal(size=(B, S, heads, K)) for heads in (H, H_kv, H_kv, H)]
    found = []
    for dtype, bound in GRADIENT_BOUNDS.items():
        operands = [np.asarray(jnp.asarray(array, dtype), np.float64) for array in drawn]
        with jax.enable_x64(True):
            expected = attend_and_differentiate(operands, jnp.float64, "reference")
        for implementation in implementations(dtype, K):
            with full_products():
                got = attend_and_differentiate(operands, dtype, implementation)
            pairs = zip(("output", "query", "key", "value"), got, expected, strict=True)
            errors = {name: float(np.abs(g - e).max() / np.abs(e).max()) for name, g, e in pairs}
            found.append({"implementation": implementation, "dtype": dtype, "bound": bound} | errors)
    return found


def plot(curves: Sequence[Curve], rest: Sequence[Curve], noise: Difference, path: Path) -> None:
    """Draws the curves over each other, and below their differences on a logarithmic scale."""
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = np.arange(1, len(curves[0].loss) + 1)
    for width, curve in zip((5, 2.6, 1.2), curves, strict=False):
        above.plot(steps, curve.loss, color=COLOURS[curve.name], linewidth=width, label=curve.name)
    above.set(ylabel="training loss", title="One small agent, the same batches, each attention")
    above.legend(frameon=False)
    pairs = [(c, curves[0], COLOURS[c.name], 2.2) for c in curves[1:]]
    pairs += [(c, curves[1], colour, 1.0) for c, colour in zip(rest, NOISE_COLOURS, strict=True)]
    for curve, other, colour, width in pairs:
        gap = np.abs(np.subtract(curve.loss, other.loss))
        smooth = np.convolve(gap, np.ones(SMOOTHED)) / np.convolve(np.ones(len(gap)), np.ones(SMOOTHED))
        label = f"{curve.name} - {other.name}"
        below.semilogy(steps, smooth[: len(gap)], color=colour, linewidth=width, label=label)
    below.axhline(noise.mean, color="#5b6470", linestyle=":", label="noise, mean over all steps")
    below.set(xlabel="gradient step", ylabel=f"|difference|, mean of {SMOOTHED} steps")
    below.legend(frameon=False, ncols=2, fontsize=8)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, color="#dcdfe4")
    figure.savefig(path, dpi=130)


def show(
    curves: Sequence[Curve], judged: Sequence[Difference], noises: Sequence[Difference], errors: Any
) -> None:
    final = {curve.name: curve.loss[-1] for curve in curves}
    table = Table(title="Loss curves")
    for heading in ("run", "final loss", "against", "mean |difference|", "max |difference|"):
        table.add_column(heading, justify="right" if "|" in heading or "final" in heading else "left")
    table.add_row(curves[0].name, f"{final[curves[0].name]:.5f}", "", "", "")
    for row in (*judged, *noises):
        table.add_row(row.name, f"{final[row.name]:.5f}", row.of, f"{row.mean:.2e}", f"{row.maximum:.2e}")
    gradients = Table(title="Errors against a float64 reference, of the largest entry")
    for heading in ("implementation", "dtype", "output", "query", "key", "value", "bound"):
        gradients.add_column(heading)
    for row in errors:
        numbers = (f"{row[name]:.1e}" for name in ("output", "query", "key", "value", "bound"))
        gradients.add_row(row["implementation"], row["dtype"], *numbers)
    Console(width=110).print(table, gradients)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trajectories", type=int, default=2, help="of a chain, 1,000 tokens each")
    parser.add_argument("--rows", type=int, default=1, help="chains a batch")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="gradient steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/implementations.json", help="JSON file to write, and its PNG")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    config, curves, rest = train_all(options)
    judged = [difference(curve, curves[0]) for curve in curves[1:]]
    noises = [difference(curve, curves[1]) for curve in rest]
    noise = Difference(
        name="noise",
        of="the largest of the noise runs",
        mean=max(row.mean for row in noises),
        maximum=max(row.maximum for row in noises),
    )
    errors = gradient_errors(options.seed)
    is_alike = all(
        row.mean <= SLACK * noise.mean and row.maximum <= SLACK * noise.maximum for row in judged
    ) and all(
        max(row[name] for name in ("output", "query", "key", "value")) <= row["bound"] for row in errors
    )
    show([*curves, *rest], judged, noises, errors)
    print(f"Noise: {noise.mean:.2e} in the mean, {noise.maximum:.2e} at most. Alike: {is_alike}.")
    out = Path(options.out)
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    records.write_json(
        out,
        {
            "command": shlex.join(["python", "benchmarks/implementations.py", *sys.argv[1:]]),
            "device": device,
            **records.versions(),
            "config": dataclasses.asdict(config),
            "is_alike": is_alike,
            "noise": dataclasses.asdict(noise),
            "differences": [dataclasses.asdict(row) for row in (*judged, *noises)],
            "gradient_errors": errors,
            "curves": [dataclasses.asdict(curve) for curve in (*curves, *rest)],
        },
    )
    plot(curves, rest, noise, out.with_suffix(".png"))
    sys.exit(not is_alike)


if __name__ == "__main__":
    main()
