"""Configuration of the devices that share a training step, and of the processes that have them."""

import dataclasses
from typing import Literal

from bpt_rl.config_checks import positive

CLUSTER = "auto"
"""As coordinator: whichever the cluster names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is how many train together."""

    data: int = 1
    """Devices that share the rows of a batch, each with all parameters."""
    fsdp: int = 1
    """Devices that share the rows of a batch and the matrices of the layers, each gathered where it is used; must
    divide model.embed_dim and model.feedforward_dim."""
    context: int = 1
    """Devices that share each row's tokens, and with those of fsdp the matrices of the layers; where both together do
    not divide these widths, fsdp alone splits them."""
    attention: Literal["auto", "ring", "ulysses"] = "auto"
    """How attention crosses the devices of `context`. ring: keys and values go around; any number of heads. ulysses:
    each device gets the whole row for its share of the heads, which they must divide. auto: by heads, devices and
    length; the log says why."""
    coordinator: str = ""
    """Where several processes meet that train together: HOST:PORT of the first, the same for all. auto: the cluster
    (Slurm, Open MPI, Kubernetes) tells, and how many there are and which is which. None for one process."""
    num_processes: int = 1
    """Processes that meet at HOST:PORT; each has an equal share of the mesh's devices."""
    process_id: int = 0
    """Which of them this one is, from 0; the first writes the run folder."""

    def __post_init__(self) -> None:
        positive(self, "data", "fsdp", "context", "num_processes")
        is_named = self.coordinator not in ("", CLUSTER)
        if is_named != (self.num_processes > 1) or not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                "Several processes meet at an address, and each has a number of its own; got mesh.coordinator "
                f"{self.coordinator!r}, mesh.num_processes {self.num_processes} and mesh.process_id {self.process_id}. "
                "Give HOST:PORT, how many there are, and which this one is, from 0; or, in a cluster that tells, "
                f"{CLUSTER!r} alone."
            )
        if is_named and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(
                f"mesh.coordinator must be HOST:PORT or {CLUSTER!r}; got {self.coordinator!r}. Name the first "
                "process's host as the others reach it, and a free port of it."
            )
        check_shares(self.num_devices, self.num_processes)

    def __str__(self) -> str:
        """Names the axes of more than one device, and the way of attention where it is not left open."""
        axes = ", ".join(
            f"{name} {getattr(self, name)}" for name in ("data", "fsdp", "context") if getattr(self, name) > 1
        )
        is_named = self.context > 1 and self.attention != "auto"
        return f"{axes} ({self.attention})" if is_named else axes or "one device"

    @property
    def num_devices(self) -> int:
        """Devices that train together."""
        return self.data * self.fsdp * self.context

    @property
    def without_processes(self) -> "MeshConfig":
        """The same devices, whoever has them."""
        return dataclasses.replace(self, coordinator="", num_processes=1, process_id=0)


def check_shares(num_devices: int, num_processes: int) -> None:
    """Refuses devices that processes cannot share equally.

    Raises:
      ValueError: If they cannot.
    """
    if num_devices % num_processes:
        raise ValueError(
            "Processes must have equally many devices of a mesh; got "
            f"{num_devices} devices for {num_processes} processes. Raise mesh.context, mesh.fsdp or mesh.data."
        )
