"""A tiny language model on the same backbone, of the bytes of texts that ship with Python.

    JAX_PLATFORMS=cpu python benchmarks/language_model.py

trains it on Python's help texts, on a CPU, and prints the bits a byte of texts that it was not trained on, beside
those of byte frequencies alone. What GPT's shapes take of an accelerator: `bpt-rl bench context gpt_1.3B`.
"""

import argparse
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import numpy as np

from bpt_rl.config import ModelConfig, OptimizerConfig
from bpt_rl.run import records
from bpt_rl.run.language_agent import LanguageAgent, text_batch
from bpt_rl.run.step import compile_step, placed_state

MODEL = ModelConfig(
    embed_dim=128, num_layers=3, num_heads=4, activation="gelu", dropout=0.0, activations="keep"
)
ROWS, CONTEXT = 8, 256
"""Windows of text a batch, and their bytes."""


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
    generator = np.random.default_rng(seed)
    agent, key = LanguageAgent(MODEL, 256), jax.random.key(seed)
    optimizer = OptimizerConfig(
        num_steps=num_steps, learning_rate=3e-3, warmup_steps=min(20, num_steps - 1), clip_norm=1.0
    )

    def draw() -> Any:
        starts = generator.integers(len(learnt) - CONTEXT, size=ROWS)
        return text_batch(windows(learnt, starts)[None])

    state = placed_state(agent, optimizer, seed)
    step = compile_step(agent, optimizer, draw(), key)
    test = text_batch(windows(held_out, np.arange(0, len(held_out) - CONTEXT, CONTEXT)))
    evaluate = jax.jit(lambda params: agent.loss(params, test, None)[0])
    course = []
    print(f"{len(learnt):,} bytes to learn, {len(held_out):,} held out; bits a byte:")
    print(f"  byte frequencies alone{frequency_bits(learnt, held_out):20.3f} held out")
    for i in range(num_steps + 1):
        if i % max(1, num_steps // 6) == 0 or i == num_steps:
            bits = float(evaluate(state.params)) / np.log(2)
            course.append({"step": i, "held_out_bits": bits})
            print(f"  after {i:4d} steps        {bits:20.3f} held out", flush=True)
        if i < num_steps:
            state, _ = step(state, draw(), key)
    return {"frequency_bits": frequency_bits(learnt, held_out), "course": course}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="JSON file to write")
    options = parser.parse_args()
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    print(f"On {device}:")
    found = learn_bytes(options.steps, options.seed)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        records.write_json(
            Path(options.out), {"device": device, **records.versions(), **vars(options), **found}
        )


if __name__ == "__main__":
    main()
