"""Several seeds in one program against as many runs one after another: updates a second, and tokens a second.

The agents that learn from single transitions make their updates on random transitions of walker's sizes; the Agentic
Transformer its gradient steps on random chains of the fused layout. A run of one seed is what `bpt-rl train` runs;
k runs one after another take k times as long, so that their rate is that of one.

python benchmarks/seeds.py --out seeds.json
python benchmarks/seeds.py --hidden-dim 1024 --td-batch-size 1024 --num-updates 500 \
    --embed-dim 256 --num-layers 4 --num-heads 4 --context 4000 --rows 16 --compute-dtype bfloat16 --num-steps 50
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from td_updates import ACTION, OBSERVATION, random_transitions

from bpt_rl.agents.registry import make_learner
from bpt_rl.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.datasets.transitions import TransitionDraw
from bpt_rl.run.bench_subject import agent_subject
from bpt_rl.run.seed_axis import stacked
from bpt_rl.run.step import compile_step, placed_state
from bpt_rl.run.train_td import compile_updates
from bpt_rl.td_config import TD_AGENTS, TDConfig


def stacked_keys(num_seeds):
    return stacked([jax.random.key(seed) for seed in range(num_seeds)])


def td_call(name, options, transitions, num_seeds):
    """Returns a function that makes `num_updates` updates of each seed and waits for them."""
    config = TDConfig(hidden_dim=options.hidden_dim, batch_size=options.td_batch_size)
    learner = make_learner(name, config, OBSERVATION, ACTION)
    draw = TransitionDraw(batch_size=config.batch_size, discount=config.discount)
    run, init = compile_updates(learner, draw, num_seeds), jax.jit(learner.init)
    states = [stacked([init(jax.random.key(seed)) for seed in range(num_seeds)])]
    keys = stacked_keys(num_seeds)

    def call():
        states[0], metrics = run(
            states[0], transitions, np.int32(0), key=keys, num_updates=options.num_updates
        )
        jax.block_until_ready(metrics)

    return call


def at_call(options, num_seeds):
    """Returns a function that makes `num_steps` gradient steps of each seed and waits for them."""
    model = ModelConfig(
        layout="fused",
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        activation="gelu",
        compute_dtype=options.compute_dtype,
        activations="keep",
    )
    optimizer = OptimizerConfig(num_steps=1_000_000)
    train = TrainConfig(data=DataConfig(task="walker_run"), model=model, optimizer=optimizer)
    subject = agent_subject(train, options.context, options.rows)
    batches, keys = (
        tuple(jax.device_put(subject.make_batch()) for _ in range(num_seeds)),
        stacked_keys(num_seeds),
    )
    step = compile_step(
        subject.agent,
        optimizer,
        batches,
        keys,
        kernel_dtype=options.compute_dtype,
        make_batch=stacked,
        num_seeds=num_seeds,
    )
    states = [stacked([placed_state(subject.agent, optimizer, seed) for seed in range(num_seeds)])]

    def call():
        for _ in range(options.num_steps):
            states[0], metrics = step(states[0], batches, keys)
        jax.block_until_ready(metrics)

    return call


def rates(make_call, amount, options):
    """Returns, for each number of seeds, what all of them together do a second; the calls take turns."""
    calls, seconds = {}, {}
    for num_seeds in options.seeds:
        calls[num_seeds], seconds[num_seeds] = make_call(num_seeds), []
        calls[num_seeds]()
    for _ in range(options.repeats):
        for num_seeds, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[num_seeds].append(time.perf_counter() - began)
    return {str(k): k * amount / float(np.median(values)) for k, values in seconds.items()}


def table(rows, seeds):
    heading = "".join(f"{f'{k} seeds' if k > 1 else 'alone':>24}" for k in seeds)
    lines = [f"{'agent':10}{heading}"]
    for name, row in rows.items():
        alone = row["rates"][str(seeds[0])]
        cells = (f"{rate:,.0f} {row['unit']} (x{rate / alone:.2f})" for rate in row["rates"].values())
        lines.append(f"{name:10}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", nargs="*", default=["td3", "at"], choices=[*TD_AGENTS, "at"])
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[1, 2, 4, 8], help="the first is the measure: 1"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-dim", type=int, default=64, help="of the agents of single transitions")
    parser.add_argument("--td-batch-size", type=int, default=64)
    parser.add_argument("--num-updates", type=int, default=200, help="of a compiled call")
    parser.add_argument("--episodes", type=int, default=100, help="of 1000 transitions")
    parser.add_argument("--embed-dim", type=int, default=32, help="of the Agentic Transformer")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=1)
    parser.add_argument("--context", type=int, default=256, help="tokens of a row; one a step")
    parser.add_argument("--rows", type=int, default=2, help="of a batch")
    parser.add_argument("--compute-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args()


def main():
    options = parse()
    transitions = random_transitions(options.episodes)
    rows = {}
    for name in options.agents:
        if name == "at":
            amount = options.num_steps * options.rows * options.context
            found, unit = rates(lambda k: at_call(options, k), amount, options), "tokens/s"
        else:
            made = lambda k, name=name: td_call(name, options, transitions, k)  # noqa: E731
            found, unit = rates(made, options.num_updates, options), "updates/s"
        rows[name] = {"unit": unit, "rates": found}
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "options": {name: str(value) if name == "out" else value for name, value in vars(options).items()},
        "agents": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    else:
        print(json.dumps(record))
    print(table(rows, options.seeds))


if __name__ == "__main__":
    main()
