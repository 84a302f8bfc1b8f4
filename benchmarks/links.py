"""Bytes a second that each of N devices of this machine sends, collective by collective, at sizes a step sends.

What a device sends of an array of B bytes that it holds: all of it around a ring (ppermute); (N - 1) / N of it in an
all-to-all; of an all-gather and a reduce-scatter (N - 1) times a part; of an all-reduce twice (N - 1) / N.

python benchmarks/links.py --devices 2 --out links.json
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "context"
REPEATS = 10


def collectives(num_devices):
    """Returns of each collective: what it does to a device's array, and the share of the array that a device sends."""
    hops = [(i, (i + 1) % num_devices) for i in range(num_devices)]
    share = (num_devices - 1) / num_devices
    return {
        "collective-permute": (lambda x: jax.lax.ppermute(x, AXIS, hops), 1.0),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True), share),
        "all-gather": (lambda x: jax.lax.all_gather(x[: len(x) // num_devices], AXIS, tiled=True), share),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, AXIS, tiled=True), share),
        "all-reduce": (lambda x: jax.lax.psum(x, AXIS), 2 * share),
    }


def seconds_of(call, mesh, x):
    """Returns the median seconds of one collective, of programs that run it `REPEATS` times, one behind another."""

    def repeated(x):
        def body(_, x):
            found = call(x)
            # What comes back must be needed, and of the shape that went in.
            return jax.lax.dynamic_update_slice_in_dim(x, found, 0, axis=0)

        return jax.lax.fori_loop(0, REPEATS, body, x)

    program = jax.jit(
        jax.shard_map(
            repeated, mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(AXIS), check_vma=False
        ),
        donate_argnums=0,
    )
    times = []
    for _ in range(4):
        began = time.perf_counter()
        x = jax.block_until_ready(program(x))
        times.append((time.perf_counter() - began) / REPEATS)
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=jax.device_count())
    parser.add_argument("--mib", type=int, nargs="+", default=[16, 128, 512], help="of a device's array")
    parser.add_argument("--out", type=Path, default=Path("links.json"))
    options = parser.parse_args()
    mesh = Mesh(np.array(jax.devices()[: options.devices]), (AXIS,))
    rows = []
    for mib in options.mib:
        for name, (call, share) in collectives(options.devices).items():
            make = functools.partial(jnp.zeros, (options.devices * mib * 2**19,), jnp.bfloat16)
            x = jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec(AXIS)))()
            seconds = seconds_of(call, mesh, x)
            sent = share * mib * 2**20
            rows.append(
                {"collective": name, "mib": mib, "seconds": seconds, "gb_per_second": sent / seconds / 1e9}
            )
            print(
                f"{name:20} {mib:5} MiB  {1e3 * seconds:8.3f} ms  {sent / seconds / 1e9:7.1f} GB/s",
                flush=True,
            )
    record = {
        "command": f"python benchmarks/links.py --devices {options.devices}",
        "device": jax.devices()[0].device_kind,
        "num_devices": options.devices,
        "jax": jax.__version__,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
