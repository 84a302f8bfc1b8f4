"""What is left of the known bugs of Decision and Agentic Transformers: docs/agents.md names the test of each."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from bpt_rl.config import ModelConfig
from bpt_rl.nn import chain_cache
from bpt_rl.nn.hashed_graph import hashed_graph
from bpt_rl.nn.step_packing import num_columns
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.types import PackedBatch

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(embed_dim=32, num_layers=2, dropout=0.0, implementation="reference", activations="keep")


def num_operations(function, *arguments):
    """Floating-point operations, of which nothing is run."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_a_step_costs_what_its_own_tokens_cost_and_not_the_whole_context_again():
    graph, state = nnx.split(nnx.eval_shape(lambda: TrajectoryModel(MODEL, 3, 2, 1000, rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(state)

    def steps(num_steps):
        shapes = {"observation": (3,), "action": (2,)}
        kinds = {"step": np.int32, "episode": np.int32, "segment_ids": np.int32}
        return PackedBatch(
            *(
                jax.ShapeDtypeStruct((1, num_steps, *shapes.get(name, ())), kinds.get(name, np.float32))
                for name in PackedBatch._fields
            )
        )

    def of_a_step(num_steps):
        cache = jax.eval_shape(lambda: nnx.merge(graph, params).init_cache(1, num_steps))
        packed = np.zeros((1, num_columns(3, 2)), np.int32)
        alone = chain_cache.CacheDevices(model=MODEL)
        lowered = chain_cache.decode.lower(hashed_graph(graph), alone, params, cache, packed, None)
        return lowered.cost_analysis()["flops"]

    def of_the_whole(num_steps):
        return num_operations(lambda params, batch: nnx.merge(graph, params)(batch), params, steps(num_steps))

    # A thousand times the tokens, and as many keys for each; XLA counts one layer of its two.
    assert of_the_whole(1000) > 300 * of_a_step(1000)
    # Twice the context doubles what its keys cost; a whole pass quadruples that.
    assert of_a_step(2000) < 2.1 * of_a_step(1000)
    assert of_the_whole(2000) > 3 * of_the_whole(1000)


def test_the_table_of_bugs_names_tests_that_there_are():
    text = (ROOT / "docs" / "agents.md").read_text()
    table = text[text.index("## Known bugs") :].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "test_" in line]
    assert len(rows) >= 10
    named = re.findall(r"`(tests/\w+/test_\w+\.py)::(test_\w+)`", "\n".join(rows))
    assert len(named) >= len(rows)
    for path, name in named:
        functions = {
            f.name for f in ast.parse((ROOT / path).read_text()).body if isinstance(f, ast.FunctionDef)
        }
        assert name in functions, f"{path} has no {name}"
