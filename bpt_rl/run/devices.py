"""Accelerators, as far as a plan needs them."""

import dataclasses

import jax

from bpt_rl.datasets import capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations a second of a card's kernels, and bytes a second between it and its host."""

    attention: float
    """cuDNN's causal attention, heads of 128, two products forward and five backward, of the causal half."""
    matrices: float
    """A large bfloat16 matrix product."""
    host: float
    """Bytes of activations moved there and back, by the seconds that a step takes longer for it: they hide in part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator."""

    name: str
    """Its kind, as JAX names it."""
    memory: int
    """Bytes that a step may take."""
    host_memory: int | None = None
    """Bytes of the host that a step may take; None for as many as it takes."""
    is_host: bool = False
    """Whether its memory is the host's, so that nothing can be moved out of it."""
    rates: Rates | None = None
    """None if they were not measured."""

    def less(self, *, device_bytes: int = 0, host_bytes: int = 0) -> "Device":
        """Returns the device with so much of its own and of the host's memory taken by something else."""
        if self.is_host:
            return dataclasses.replace(self, memory=max(0, self.memory - device_bytes - host_bytes))
        host = None if self.host_memory is None else max(0, self.host_memory - host_bytes)
        return dataclasses.replace(self, memory=max(0, self.memory - device_bytes), host_memory=host)

    def share(self, num_shares: int) -> "Device":
        """Returns one of so many equal shares of the device and of its host."""
        host = None if self.host_memory is None else self.host_memory // num_shares
        return dataclasses.replace(self, memory=self.memory // num_shares, host_memory=host)


H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    # 81,559 MiB as nvidia-smi counts them, at XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
    memory=int(0.95 * 81_559 * 2**20),
    # Measured by this project on one card; attention at 131,072 tokens, transfers in steps of 32,768 and 131,072.
    rates=Rates(attention=564e12, matrices=790e12, host=75e9),
)


def this_device() -> Device:
    """Returns the first device of this machine; its rates are known only for the cards in this file.

    A processor's memory is what processes can still get of the machine's, down to a whole GiB, so that what else
    runs there seldom changes a choice.
    """
    device, room = jax.local_devices()[0], capacity.measure()
    if jax.default_backend() == "cpu":
        memory = room.host if room.host < 2**30 else room.host - room.host % 2**30
        return Device(name=device.device_kind, memory=memory, is_host=True)
    statistics = device.memory_stats()
    memory = statistics["bytes_limit"] if statistics else room.host
    rates = H100.rates if device.device_kind == H100.name else None
    pinned = int(capacity.PINNED_SHARE * room.host)
    return Device(name=device.device_kind, memory=memory, host_memory=pinned, rates=rates)
