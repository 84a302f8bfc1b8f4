"""How much of what devices send to each other hides behind what they compute: read from a profile of one call."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

Interval = tuple[float, float]
"""Begin and end, in nanoseconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Communication:
    """Of one call, the mean over this process's devices."""

    seconds: float
    """While a device sends or receives, waiting for the others included."""
    hidden_seconds: float
    """Of those, while it computes too."""


def communication_of(call: Callable[[], Any]) -> Communication | None:
    """Returns what one call sends and hides; None if its profile has no GPU in it.

    Args:
      call: Compiled and run before; its result is waited for.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        profiles = [
            jax.profiler.ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")
        ]
    planes = [
        plane for profile in profiles for plane in profile.planes if plane.name.startswith("/device:GPU")
    ]
    found = []
    for plane in planes:
        events = [event for line in plane.lines if line.name.startswith("Stream") for event in line.events]
        kernels = [(event.name, event.start_ns, event.duration_ns) for event in events]
        if kernels:
            found.append(_of_device(kernels))
    if not found:
        return None
    return Communication(
        seconds=sum(each.seconds for each in found) / len(found),
        hidden_seconds=sum(each.hidden_seconds for each in found) / len(found),
    )


def _of_device(kernels: Iterable[tuple[str, float, float]]) -> Communication:
    """Returns what one device sends and hides, from the name, begin and duration of each of its kernels."""
    sending: list[Interval] = []
    computing: list[Interval] = []
    for name, begin, duration in kernels:
        (sending if "nccl" in name.lower() else computing).append((begin, begin + duration))
    sent, computed = _union(sending), _union(computing)
    return Communication(seconds=_length(sent) / 1e9, hidden_seconds=_length(_common(sent, computed)) / 1e9)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns disjoint intervals, in order, that cover the same."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _common(left: list[Interval], right: list[Interval]) -> list[Interval]:
    """Returns what two lists of disjoint intervals, in order, both cover."""
    common, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            common.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
