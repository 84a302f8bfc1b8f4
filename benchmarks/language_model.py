"""The backbone as a language model: a tiny example that learns, and GPT's shapes on an accelerator.

    JAX_PLATFORMS=cpu python benchmarks/language_model.py

trains a small model of bytes on the help texts that ship with Python, on a CPU, and prints the bits a byte of
texts that it was not trained on, beside those of byte frequencies alone.

    python benchmarks/language_model.py --shape 1.3B --tokens 262144 --activations recompute --compile-only

compiles the whole training step (bfloat16 compute, AdamW in float32) of one row of random tokens and prints its
memory; without `--compile-only` it also runs a warm-up step and a timed one. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
to run near the limit. What the parameters alone need: `bpt_rl.nn.language_model.GPT_SHAPES`.
"""

import argparse
import dataclasses
import functools
import time
import typing
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bpt_rl.config import Activations, ModelConfig, OptimizerConfig
from bpt_rl.nn.language_model import GPT_SHAPES, GPT_VOCABULARY_SIZE, LanguageModel
from bpt_rl.run import records
from bpt_rl.run.step import make_optimizer

BYTE_MODEL = ModelConfig(
    embed_dim=128, num_layers=3, num_heads=4, activation="gelu", dropout=0.0, activations="keep"
)
ROWS, CONTEXT = 8, 256
"""Windows of text a batch, and their bytes."""

State = tuple[Any, Any]
"""Parameters and the optimizer's state."""
Step = Callable[[State, jax.Array], tuple[State, jax.Array]]


def make_model(config: ModelConfig, vocabulary_size: int) -> tuple[Callable[[jax.Array], Any], Any]:
    """Returns a function that draws parameters, and one from parameters and texts [B, S + 1] to a mean loss."""

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(config, vocabulary_size, nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def mean_loss(params: Any, text: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).losses(text[:, :-1], text[:, 1:]).mean()

    return lambda key: nnx.to_pure_dict(nnx.state(make(key))), mean_loss


def make_step(mean_loss: Callable[..., jax.Array], optimizer: optax.GradientTransformation) -> Step:
    def step(state: State, text: jax.Array) -> tuple[State, jax.Array]:
        params, optimizer_state = state
        loss, gradient = jax.value_and_grad(mean_loss)(params, text)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    return step


def init_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, key: jax.Array
) -> State:
    params = init(key)
    return params, optimizer.init(params)


def read_texts() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of nine tenths of Python's help texts, and those of the rest."""
    texts = [topics.topics[name].encode() for name in sorted(topics.topics)]
    held_out = b"".join(texts[::10])
    learnt = b"".join(text for i, text in enumerate(texts) if i % 10)
    return np.frombuffer(learnt, np.uint8), np.frombuffer(held_out, np.uint8)


def windows(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)


def frequency_bits(learnt: np.ndarray, held_out: np.ndarray) -> float:
    """Returns the bits a byte of a code that knows how often each byte occurs, and nothing else."""
    counts = np.bincount(learnt, minlength=256) + 1
    return float(-np.log2(counts / counts.sum())[held_out].mean())


def learn_bytes(num_steps: int, seed: int) -> dict[str, Any]:
    """Trains on bytes; prints and returns the course of the losses, in bits a byte."""
    learnt, held_out = read_texts()
    init, mean_loss = make_model(BYTE_MODEL, 256)
    optimizer = make_optimizer(
        OptimizerConfig(
            num_steps=num_steps, learning_rate=3e-3, warmup_steps=min(20, num_steps - 1), clip_norm=1.0
        )
    )
    state = jax.jit(functools.partial(init_state, init, optimizer))(jax.random.key(seed))
    step, evaluate = jax.jit(make_step(mean_loss, optimizer), donate_argnums=0), jax.jit(mean_loss)
    test = windows(held_out, np.arange(0, len(held_out) - CONTEXT, CONTEXT))
    generator = np.random.default_rng(seed)
    course = []
    print(f"{len(learnt):,} bytes to learn, {len(held_out):,} held out; bits a byte:")
    print(f"  byte frequencies alone{frequency_bits(learnt, held_out):20.3f} held out")
    for i in range(num_steps + 1):
        if i % max(1, num_steps // 6) == 0 or i == num_steps:
            bits = float(evaluate(state[0], test)) / np.log(2)
            course.append({"step": i, "held_out_bits": bits})
            print(f"  after {i:4d} steps        {bits:20.3f} held out", flush=True)
        if i < num_steps:
            starts = generator.integers(len(learnt) - CONTEXT, size=ROWS)
            state, _ = step(state, windows(learnt, starts))
    return {"frequency_bits": frequency_bits(learnt, held_out), "course": course}


def measure_step(config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles one training step, and runs it unless told otherwise; returns bytes, seconds and losses."""
    init, mean_loss = make_model(config, GPT_VOCABULARY_SIZE)
    # Without warm-up, which would make the first step an idle one.
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0))
    start = functools.partial(init_state, init, optimizer)
    text = jax.ShapeDtypeStruct((1, options.tokens + 1), jnp.int32)
    step = jax.jit(make_step(mean_loss, optimizer), donate_argnums=0)
    began = time.perf_counter()
    compiled = step.lower(jax.eval_shape(start, jax.random.key(0)), text).compile()
    found: dict[str, Any] = {"compile_seconds": time.perf_counter() - began}
    analysis = compiled.memory_analysis()
    for kind in ("argument", "temp", "output", "alias", "host_temp"):
        found[f"{kind}_bytes"] = getattr(analysis, f"{kind}_size_in_bytes")
    for name, value in found.items():
        print(f"  {name:<18}{value / 2**30:9.2f} GiB" if "bytes" in name else f"  {name:<18}{value:9.1f}")
    if options.compile_only:
        return found
    tokens = jax.random.randint(jax.random.key(1), text.shape, 0, GPT_VOCABULARY_SIZE)
    state = jax.jit(start)(jax.random.key(options.seed))
    for name in ("warm-up", "timed"):
        jax.block_until_ready((state, tokens))
        began = time.perf_counter()
        state, loss = compiled(state, tokens)
        found |= {"loss": float(loss), "step_seconds": time.perf_counter() - began}
        print(f"  {name:<18}{found['step_seconds']:9.3f} s    loss {found['loss']:.4f}", flush=True)
    statistics = jax.devices()[0].memory_stats() or {}
    return found | {"peak_bytes": statistics.get("peak_bytes_in_use")}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=GPT_SHAPES, help="without it, the example of bytes")
    parser.add_argument("--tokens", type=int, default=131_072, help="of the one row of a step")
    parser.add_argument("--activations", choices=typing.get_args(Activations), default="recompute")
    parser.add_argument("--implementation", default="auto", help="of attention")
    parser.add_argument("--layers", type=int, help="of a smaller stack of that shape, to try the script")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--steps", type=int, default=300, help="of the example")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    print(f"On {device}:")
    if options.shape:
        changes = {"activations": options.activations, "implementation": options.implementation}
        shape = GPT_SHAPES[options.shape]
        changes["num_layers"] = options.layers or shape.num_layers
        found = measure_step(dataclasses.replace(shape, **changes), options)
    else:
        found = learn_bytes(options.steps, options.seed)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        records.write_json(
            Path(options.out), {"device": device, **records.versions(), **vars(options), **found}
        )


if __name__ == "__main__":
    main()
