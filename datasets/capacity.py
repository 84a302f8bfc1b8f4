"""Choosing where the episodes are kept: as near to the model as there is room."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from bpt_rl.config import Place

GIB = 2**30
"""Bytes."""
ACCELERATOR_SHARE = 0.2
"""Most of the accelerator's free memory that episodes take by themselves; parameters and activations come later."""
HOST_SHARE = 0.5
"""Most of the host's available memory that episodes take by themselves."""
PINNED_SHARE = 0.85
"""Most of the host's available memory that may be pinned for a GPU: no other process can get it back."""
MEMORY_INFORMATION = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use and the reclaimable part of it that containers have, in versions 2 and 1 of Linux's control groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Room for episodes, bytes."""

    accelerator: int | None
    """Free memory of the first device; None if there is no accelerator, or it does not tell."""
    host: int
    """Memory that processes can still get."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A place, and why it."""

    place: Place
    """Any but auto."""
    num_bytes: int
    """Of the episodes that may be drawn, were they in memory."""
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def choose(asked: Place, num_bytes: int, capacity: Capacity) -> Choice:
    """Returns where episodes of so many bytes are kept.

    Args:
      asked: One place, or auto for the first of accelerator, host and stream that has room to spare.
      num_bytes: Of all episodes that may be drawn.
      capacity: Room there is.

    Raises:
      ValueError: If the place asked for has no room.
    """
    # A device that tells no capacity shares the host's memory or is asked for at the user's risk.
    room = {"accelerator": capacity.accelerator or capacity.host, "host": capacity.host}
    if asked != "auto":
        if num_bytes > room.get(asked, num_bytes):
            raise ValueError(
                f"Episodes must fit into the memory of the place asked for; got data.place {asked!r}, "
                f"{_size(num_bytes)} of episodes and {_size(room[asked])} free. Use data.place stream, or auto."
            )
        return Choice(place=asked, num_bytes=num_bytes, reason=f"asked for; episodes of {_size(num_bytes)}")
    shares: list[tuple[Place, float, int | None]] = [
        ("accelerator", ACCELERATOR_SHARE, capacity.accelerator),
        ("host", HOST_SHARE, capacity.host),
    ]
    for place, share, free in shares:
        if free is not None and num_bytes <= share * free:
            reason = (
                f"episodes of {_size(num_bytes)} take at most {share:.0%} of the {_size(free)} free there"
            )
            return Choice(place=place, num_bytes=num_bytes, reason=reason)
    reason = (
        f"episodes of {_size(num_bytes)} take more than {HOST_SHARE:.0%} of the host's {_size(capacity.host)}"
    )
    return Choice(place="stream", num_bytes=num_bytes, reason=reason)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.3g} MiB"


def measure() -> Capacity:
    """Returns the room there is now on this machine."""
    import jax

    statistics = None if jax.default_backend() == "cpu" else jax.local_devices()[0].memory_stats()
    free = statistics["bytes_limit"] - statistics["bytes_in_use"] if statistics else None
    return Capacity(accelerator=free, host=host_memory())


def host_memory() -> int:
    """Returns the bytes that processes can still get of this machine's memory, or of this container's."""
    if MEMORY_INFORMATION.is_file():
        fields = dict(line.split(":") for line in MEMORY_INFORMATION.read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([available, *_container_memory(CGROUPS)])


def _container_memory(folder: Path) -> Iterator[int]:
    for limit, used, inactive in CGROUP_FILES:
        try:
            most = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            lines = (folder / used).with_name("memory.stat").read_text().splitlines()
            statistics = dict(line.split() for line in lines)
        except (OSError, ValueError):  # No such limit, or one that reads "max".
            continue
        # Files read once and not in use are the first that make room.
        yield max(0, most - taken + int(statistics.get(inactive, 0)))
