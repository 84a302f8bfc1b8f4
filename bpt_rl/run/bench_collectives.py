"""What a compiled program sends between devices, read out of its text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("collective-permute", "all-to-all", "all-gather", "reduce-scatter", "all-reduce")

FEWEST_BYTES = 256
"""What has no more is no array but a few numbers."""

_SIZES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1, "s64": 8}
_CALL = re.compile(rf" = (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)")
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+)")
_TURNS = re.compile(r"known_trip_count[^\d]*(\d+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """Calls of one collective."""

    collective: str
    calls: int
    """Of arrays in the text, loops not unrolled."""
    executed: int
    """Of arrays, loops unrolled."""
    num_bytes: int
    """Of all that is executed, as `bpt_rl.nn.traffic.Transfer.num_bytes` counts a call."""


def read_collectives(text: str, *, unknown_turns: int) -> dict[str, Sent]:
    """Returns what is sent of arrays, by collective; single numbers are left out.

    Args:
      text: Of the compiled program (`jax.stages.Compiled.as_text`).
      unknown_turns: Of loops whose turns the text does not say: those of a ring, which are traced.
    """
    computations = _computations(text)
    [entry] = re.findall(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    calls: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for name, num_bytes, times in _executed(computations, entry, 1, unknown_turns):
        calls[name].append((num_bytes, times))
    return {
        name: Sent(
            collective=name,
            calls=len(found),
            executed=sum(times for _, times in found),
            num_bytes=sum(num_bytes * times for num_bytes, times in found),
        )
        for name, found in calls.items()
    }


def _computations(text: str) -> dict[str, list[str]]:
    """Returns the lines of each computation, by name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = found.setdefault(head[1], [])
        elif line.startswith("  "):
            current.append(line)
    return found


def _executed(
    computations: dict[str, list[str]], name: str, times: int, unknown_turns: int
) -> Iterator[tuple[str, int, int]]:
    """Yields collective, bytes and times of each call of arrays in a computation and those that it calls."""
    for line in computations.get(name, []):
        if call := _CALL.search(line):
            num_bytes = _bytes(call[2], call[1], line)
            if num_bytes > FEWEST_BYTES and _group_size(line) > 1:
                yield call[2], num_bytes, times
        elif loop := _LOOP.search(line):
            turns = _TURNS.search(line)
            inside = times * (int(turns[1]) if turns else unknown_turns)
            yield from _executed(computations, loop[1], inside, unknown_turns)
        else:
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.-]+", branches)
            for other in called:
                yield from _executed(computations, other, times, unknown_turns)


def _bytes(collective: str, result: str, line: str) -> int:
    """Returns the bytes of a call by those of its result."""
    arrays = [_array_bytes(*array) for array in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)]
    if "-start(" in line:
        # Operands, then results.
        arrays = arrays[len(arrays) // 2 :]
    total = sum(arrays)
    if collective == "reduce-scatter":
        return total * _group_size(line)
    return total


def _group_size(line: str) -> int:
    """Returns how many devices a call is among, in any of the ways in which XLA writes groups; 2 of a permutation."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", found[2]))
    return 2


def _array_bytes(dtype: str, shape: str) -> int:
    size = _SIZES.get(dtype, 4)
    for length in filter(None, shape.split(",")):
        size *= int(length)
    return size
