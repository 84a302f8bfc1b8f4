"""Decoding one step against a filled key-value cache, beside the bandwidth of copying on the same device.

That is the last step of a chain. The steps before it read less: a played chain's cache doubles as it fills
(`bpt_rl.nn.cached_policy`), so that 32 episodes read two thirds of what a cache of their whole length would.

Of devices that share the cache (`train.mesh`), all bytes are those of one device, and so is the bandwidth of copying.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float

from bpt_rl.bench_config import DecodeBenchConfig
from bpt_rl.config import ModelConfig
from bpt_rl.nn.chain_cache import CACHE_SPEC, CACHE_SPECS, ROWS_SPEC, CacheDevices
from bpt_rl.nn.transformer import KeyValueCache, Transformer
from bpt_rl.run.bench_measurement import (
    FAILURES,
    compiled_bytes,
    copy_bandwidth,
    failure_of,
    median_seconds,
)
from bpt_rl.run.bench_record import Column
from bpt_rl.types import LAYOUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One measurement. None: not measured, for the reason in `failure`."""

    tokens: int
    """Capacity of the cache, a row."""
    num_rows: int
    num_kv_heads: int
    copy_bytes_per_second: float
    """Read and written together, by copying in the same run."""
    mesh: str = ""
    """Devices that share the cache; empty for one."""
    cache_bytes: int | None = None
    """Keys and values of all layers on a device: every step must read them."""
    parameter_bytes: int | None = None
    """Of the transformer, as they are kept (float32): every step must read them too."""
    temporary_bytes: int | None = None
    """Temporaries, as the compiler plans them."""
    result_bytes: int | None = None
    """Results outside the donated cache: one that is not written in place would show here."""
    step_seconds: float | None = None
    """Median over calls, each waited for."""
    bytes_per_second: float | None = None
    """Cache and parameters over the time of a step."""
    copy_share: float | None = None
    """Of `copy_bytes_per_second`."""
    failure: str = ""


DECODE_COLUMNS = (
    Column(heading="tokens", field="tokens"),
    Column(heading="rows", field="num_rows"),
    Column(heading="mesh", field="mesh"),
    Column(heading="kv heads", field="num_kv_heads"),
    Column(heading="step ms", field="step_seconds", divisor=1e-3, digits=3),
    Column(heading="cache MiB", field="cache_bytes", divisor=2**20, digits=1),
    Column(heading="parameters MiB", field="parameter_bytes", divisor=2**20, digits=1),
    Column(heading="temporary MiB", field="temporary_bytes", divisor=2**20, digits=1),
    Column(heading="read TB/s", field="bytes_per_second", divisor=1e12, digits=3),
    Column(heading="copy TB/s", field="copy_bytes_per_second", divisor=1e12, digits=3),
    Column(heading="% of copy", field="copy_share", divisor=0.01, digits=1),
    Column(heading="failure", field="failure"),
)


def decode_variants(config: DecodeBenchConfig) -> list[tuple[int, int, ModelConfig]]:
    """Returns what is to be measured, in order: capacity, rows and model.

    Raises:
      ValueError: If a cache cannot hold the tokens of all calls, heads do not fit the model, or devices cannot share
        rows or tokens equally.
    """
    model, mesh = config.train.model, config.train.mesh
    needed = (config.num_calls + mesh.context) * LAYOUTS[model.layout]
    if min(config.tokens) < needed:
        raise ValueError(
            f"A cache must hold the tokens of every call; got {min(config.tokens)} tokens, and {config.num_calls} "
            f"calls after a first one write {needed}. Use longer caches or a smaller num_calls."
        )
    devices, multiple = CacheDevices(model=model, mesh=mesh), mesh.context * LAYOUTS[model.layout]
    for num_rows in config.num_rows:
        devices.check_rows(num_rows)
    if devices.stripes and any(tokens % multiple for tokens in config.tokens):
        raise ValueError(
            "Devices of mesh.context each hold equally many steps of a cache; got "
            f"{config.tokens} tokens for {mesh.context} devices and {LAYOUTS[model.layout]} tokens a step. Use "
            f"multiples of {multiple}."
        )
    heads = config.num_kv_heads or (model.num_kv_heads or model.num_heads,)
    grid = itertools.product(config.tokens, config.num_rows, heads)
    return [(tokens, rows, dataclasses.replace(model, num_kv_heads=h)) for tokens, rows, h in grid]


def measure_decoding(config: DecodeBenchConfig) -> Iterator[DecodeRow]:
    """Yields a row for each of `decode_variants`, as soon as it is measured."""
    variants = decode_variants(config)
    bandwidth = copy_bandwidth(config.copy_bytes)
    for num_tokens, num_rows, model in variants:
        row = DecodeRow(
            tokens=num_tokens,
            num_rows=num_rows,
            num_kv_heads=model.num_kv_heads,
            copy_bytes_per_second=bandwidth,
            mesh=str(config.train.mesh) if config.train.mesh.num_devices > 1 else "",
        )
        try:
            devices = CacheDevices(model=model, mesh=config.train.mesh)
            yield _measure(row, devices, config.num_calls)
        except FAILURES as error:
            yield dataclasses.replace(row, failure=failure_of(error))


def _measure(row: DecodeRow, devices: CacheDevices, num_calls: int) -> DecodeRow:
    model = devices.model
    transformer = Transformer(model, nnx.Rngs(0))
    graph, params = nnx.split(transformer)
    new_tokens = LAYOUTS[model.layout]
    # Devices that share a cache leave a turn of steps free: see `bpt_rl.nn.cached_attention.Stripes`.
    num_free = num_calls + devices.mesh.context
    cache = _nearly_full(transformer, row, num_free * new_tokens, devices)
    x = jax.random.normal(jax.random.key(1), (row.num_rows, new_tokens, model.embed_dim))
    if devices.devices:
        params = jax.device_put(params, devices.sharding(PartitionSpec()))
        x = jax.device_put(x, devices.sharding(ROWS_SPEC))
    cache_bytes, parameter_bytes = _bytes((cache.keys, cache.values)), _bytes(params)

    def local(params: Any, x: Float[jax.Array, "B S D"], cache: KeyValueCache) -> tuple[Any, KeyValueCache]:
        return nnx.merge(graph, params).decode(x, cache, stripes=devices.stripes)

    decode = devices.over(local, (PartitionSpec(), ROWS_SPEC, CACHE_SPECS), (ROWS_SPEC, CACHE_SPECS))
    compiled = jax.jit(decode, donate_argnums=2).lower(params, x, cache).compile()

    def step() -> Any:
        nonlocal cache
        out, cache = compiled(params, x, cache)
        return out, cache

    asked = compiled_bytes(compiled)
    seconds = median_seconds(step, num_calls)
    rate = (cache_bytes + parameter_bytes) / seconds
    return dataclasses.replace(
        row,
        cache_bytes=cache_bytes,
        parameter_bytes=parameter_bytes,
        temporary_bytes=asked.temporary,
        result_bytes=asked.result,
        step_seconds=seconds,
        bytes_per_second=rate,
        copy_share=rate / row.copy_bytes_per_second,
    )


def _nearly_full(
    transformer: Transformer, row: DecodeRow, num_free: int, devices: CacheDevices
) -> KeyValueCache:
    """Returns a cache of random keys and values, with room for `num_free` more tokens."""
    empty = jax.eval_shape(lambda: transformer.init_cache(row.num_rows, row.tokens))
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(empty.keys)))
    # Each device draws its own part: the whole of a layer may not fit one.
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=devices.sharding(CACHE_SPEC))
    filled_keys, filled_values = jax.tree.map(
        lambda leaf: draw(next(keys), leaf.shape, leaf.dtype), (empty.keys, empty.values)
    )
    length = jnp.full(row.num_rows, row.tokens - num_free, jnp.int32, device=devices.sharding(ROWS_SPEC))
    return KeyValueCache(filled_keys, filled_values, length)


def _bytes(tree: Any) -> int:
    """Returns the bytes of arrays on one of the devices that share them."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
