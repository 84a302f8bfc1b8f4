"""Gradient steps a second of the agents that learn from single transitions, on random data of walker's sizes.

    python benchmarks/td_updates.py --hidden-dim 64 --batch-size 256 --num-updates 500

The floor is the time that an update's matrix products take at the rate of a product [batch, hidden] times [hidden,
hidden], one after another in one compiled call of the same run. It leaves out everything else that an update does.
"""

import argparse
import functools
import json
import math
import time

import jax
import numpy as np

from bpt_rl.agents.registry import make_learner
from bpt_rl.datasets.transitions import TransitionBatch, TransitionDraw, Transitions, index_arrays
from bpt_rl.run.train_td import compile_updates
from bpt_rl.td_config import TD_AGENTS, TDConfig

OBSERVATION, ACTION, STEPS = 24, 6, 1000
"""Walker's."""


def random_transitions(num_episodes):
    generator = np.random.default_rng(0)
    rows = num_episodes * (STEPS + 1)
    arrays = Transitions(
        generator.standard_normal((rows, OBSERVATION), np.float32),
        generator.uniform(-1, 1, (rows, ACTION)).astype(np.float32),
        generator.random(rows, np.float32),
        *index_arrays(np.full(num_episodes, STEPS)),
    )
    return jax.tree.map(jax.device_put, arrays)


def product_operations(jaxpr):
    """Returns the additions and multiplications of the matrix products in a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            length = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * length
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += product_operations(inner) if hasattr(inner, "eqns") else 0
    return total


def update_operations(name, config):
    learner = make_learner(name, config, OBSERVATION, ACTION)
    rows = config.batch_size
    observation = jax.ShapeDtypeStruct((rows, OBSERVATION), np.float32)
    number = jax.ShapeDtypeStruct((rows,), np.float32)
    action = jax.ShapeDtypeStruct((rows, ACTION), np.float32)
    batch = TransitionBatch(observation, action, number, number, observation)
    key = jax.random.key(0)
    return product_operations(
        jax.make_jaxpr(learner.update)(jax.eval_shape(learner.init, key), batch, key).jaxpr
    )


def product_rate(config, num_products=2000):
    """Returns operations a second of products one after another."""
    rows, width = config.batch_size, config.hidden_dim
    kernel = jax.random.normal(jax.random.key(0), (width, width)) / width**0.5

    @jax.jit
    def run(x):
        return jax.lax.scan(lambda x, _: (x @ kernel, None), x, length=num_products)[0]

    x = jax.block_until_ready(run(jax.random.normal(jax.random.key(1), (rows, width))))
    began = time.perf_counter()
    jax.block_until_ready(run(x))
    return num_products * 2 * rows * width**2 / (time.perf_counter() - began)


def make_call(name, config, transitions):
    """Returns a function that makes `num_updates` steps and waits for them."""
    learner = make_learner(name, config, OBSERVATION, ACTION)
    draw = TransitionDraw(batch_size=config.batch_size, discount=config.discount)
    run, states = compile_updates(learner, draw), [jax.jit(learner.init)(jax.random.key(0))]
    call = functools.partial(run, key=jax.random.key(1), num_updates=config.num_updates)

    def step():
        states[0], metrics = call(states[0], transitions, np.int32(0))
        jax.block_until_ready(metrics)

    step()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-dim", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--num-updates", type=int, default=500, help="of a compiled call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=1000)
    options = parser.parse_args()
    config = TDConfig(
        hidden_dim=options.hidden_dim, batch_size=options.batch_size, num_updates=options.num_updates
    )
    transitions = random_transitions(options.episodes)
    calls = {name: make_call(name, config, transitions) for name in TD_AGENTS}
    seconds = {name: [] for name in calls}
    # In turns, so that whatever else the machine does falls on all of them.
    for _ in range(options.repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: options.num_updates / float(np.median(values)) for name, values in seconds.items()}
    products = product_rate(config)
    floors = {name: products / update_operations(name, config) for name in calls}
    found = {
        "device": jax.devices()[0].device_kind,
        **vars(options),
        "updates_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "product_operations_per_second": round(products),
        "floor_updates_per_second": {name: round(floor, 1) for name, floor in floors.items()},
        "share_of_floor": {name: round(rate / floors[name], 3) for name, rate in rates.items()},
        "share_of_td3": {name: round(rate / rates["td3"], 3) for name, rate in rates.items()},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
