"""Taking a measurement: time, memory, rates of the device, and the reason why there is none."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FAILURES = (ValueError, MemoryError, NotImplementedError, jax.errors.JaxRuntimeError)
"""How a combination shows that it does not fit this device; a measurement reports them instead of ending."""


def failure_of(error: BaseException) -> str:
    """Returns the reason in one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def median_seconds(
    call: Callable[[], Any], num_calls: int, *, num_warmup: int = 1, enough: float = math.inf
) -> float:
    """Returns the median wall time of a call, each waited for until its result is there.

    A call of `enough` seconds or more is the last one, and stands for all: beside it, what a first call does in
    addition is small.
    """
    seconds: list[float] = []
    for _ in range(num_warmup + num_calls):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
        if seconds[-1] >= enough:
            return seconds[-1]
    return statistics.median(seconds[num_warmup:])


def copy_bandwidth(num_bytes: int) -> float:
    """Returns bytes read and written a second, by copying an array of `num_bytes` from end to end.

    The floor of whatever must read memory once. Ten copies are dispatched at a time, so that dispatching does not
    count.
    """
    copy = jax.jit(lambda x: x + 1)
    array = jnp.zeros(max(1, num_bytes // 4), jnp.float32)

    def ten_copies() -> jax.Array:
        copied = array
        for _ in range(10):
            copied = copy(copied)
        return copied

    return 10 * 2 * array.nbytes / median_seconds(ten_copies, 5)


def matrix_rate(dtype: str) -> float:
    """Returns operations a second of a large square matrix product, operands of a type as a model computes in.

    Of width 8192 on an accelerator, 512 on a CPU, and of normal numbers: a GPU multiplies zeros faster. Ten products
    are dispatched at a time, so that dispatching does not count.
    """
    width = 512 if jax.default_backend() == "cpu" else 8192
    # Scaled so that no product of products grows.
    matrix: jax.Array = width**-0.5 * jax.random.normal(jax.random.key(0), (width, width), dtype)
    multiply = jax.jit(lambda x: x @ matrix)

    def ten_products() -> jax.Array:
        product = matrix
        for _ in range(10):
            product = multiply(product)
        return product

    return 10 * 2 * width**3 / median_seconds(ten_products, 5)


class CompiledBytes(NamedTuple):
    """What a compiled program asks for beside its code; None where the compiler does not say."""

    argument: int | None
    """Of its arguments on the device, donated ones included."""
    result: int | None
    """Of results that do not lie in donated arguments."""
    temporary: int | None
    """Of everything else on the device, at the worst moment."""
    host: int | None
    """Of all that lies in the host's memory."""

    @property
    def device(self) -> int | None:
        """All that is on the device."""
        if self.argument is None or self.result is None or self.temporary is None:
            return None
        return self.argument + self.result + self.temporary


def compiled_bytes(*programs: jax.stages.Compiled) -> CompiledBytes:
    """Returns what programs that run one after another ask for, as their compiler plans it.

    Of several, what the one asks for that takes most of the device. Arguments in the host's memory lie there all the
    time; a CPU tells them from nothing else.
    """
    analyses = [memory for program in programs if (memory := program.memory_analysis()) is not None]
    if len(analyses) < len(programs):
        return CompiledBytes(None, None, None, None)
    largest = max(
        (
            CompiledBytes(
                argument=memory.argument_size_in_bytes,
                result=memory.output_size_in_bytes - memory.alias_size_in_bytes,
                temporary=memory.temp_size_in_bytes,
                host=None,
            )
            for memory in analyses
        ),
        key=lambda asked: asked.device or 0,
    )
    held = max(memory.host_argument_size_in_bytes for memory in analyses)
    results = [memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes for memory in analyses]
    temporary = [memory.host_temp_size_in_bytes for memory in analyses]
    return largest._replace(host=held + max(map(sum, zip(results, temporary, strict=True))))


def peak_bytes() -> int | None:
    """Returns the most bytes that this process ever held on the first device; None where it does not say.

    On a CPU, of all its resident memory: Python and its packages take some hundred MiB of it.
    """
    if jax.default_backend() == "cpu":
        # In bytes on macOS alone.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else int(peak)
