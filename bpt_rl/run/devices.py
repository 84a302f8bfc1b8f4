"""Accelerators, as far as a plan needs them."""

import dataclasses

import jax

from bpt_rl.datasets import capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations a second of a card's kernels, and bytes a second in its memory and between it and its host."""

    attention_forward: float
    """cuDNN's causal attention, heads of 128: two products of the causal half."""
    attention_backward: float
    """Its gradients: five products."""
    blockwise: float
    """Attention in plain JAX, of the same products."""
    matrices: float
    """A large bfloat16 matrix product."""
    host: float
    """Bytes of activations moved there and back, by the seconds that a step takes longer for it: they hide in part."""
    memory: float
    """Bytes read and written in the card's own memory, together, by a copy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """Bytes a second that a device sends to others, in large transfers, each counted as `bpt_rl.nn.traffic` does."""

    devices_per_host: int
    """Devices that reach each other without the network; each has a network card of its own."""
    permute: float
    """To its neighbour in a ring, inside a host, while it receives as much."""
    all_to_all: float
    """To all others of its host at once."""
    all_gather: float
    """Inside a host, as all below but the network."""
    reduce_scatter: float
    all_reduce: float
    network: float
    """Through its card to another host."""
    latency: float
    """Seconds that a message inside a host takes at least."""
    network_latency: float
    """Between hosts."""


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
    links: Links | None = None
    """None if they are not known."""

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

    def one_of(self, num_devices: int) -> "Device":
        """Returns one of so many of its kind that train together, with its share of the host that they share."""
        if self.is_host:
            return self.share(num_devices)
        if self.host_memory is None:
            return self
        here = min(num_devices, self.links.devices_per_host if self.links else num_devices)
        return dataclasses.replace(self, host_memory=self.host_memory // here)


H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    # 81,559 MiB as nvidia-smi counts them, at XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
    memory=int(0.95 * 81_559 * 2**20),
    # Measured by this project on one card; attention at 131,072 and 524,288 tokens beside five steps (means of 513 to
    # 589 and 508 to 545 TFLOP/s; the gradients of 32,768 tokens ran at 585); transfers in steps of 32,768 and 131,072;
    # blockwise in a step of 65,536, where it does 9 products of 10; memory by copies of a GiB beside decoding, 2.87 to
    # 2.92 TB/s.
    rates=Rates(
        attention_forward=569e12,
        attention_backward=520e12,
        blockwise=31e12,
        matrices=790e12,
        host=75e9,
        memory=2.9e12,
    ),
    # Inside a host measured by this project between two cards (`benchmarks/links.py`): rates of arrays of 512 MiB, and
    # what one of 16 MiB takes longer; NVLink 4 has 450 GB/s each way. Between hosts not measured: InfiniBand NDR has
    # 400 Gb/s a card, of which nine tenths are taken.
    links=Links(
        devices_per_host=8,
        permute=277e9,
        all_to_all=195e9,
        all_gather=210e9,
        reduce_scatter=203e9,
        all_reduce=310e9,
        network=45e9,
        latency=55e-6,
        network_latency=75e-6,
    ),
)


def this_device() -> Device:
    """Returns the first device of this machine; its rates are known only for the cards in this file.

    A processor's memory is what processes can still get of the machine's, down to a whole GiB, so that what else
    runs there seldom changes a choice.
    """
    device, room = jax.local_devices()[0], capacity.measure()
    if jax.default_backend() == "cpu":
        memory = room.host if room.host < capacity.GIB else room.host - room.host % capacity.GIB
        return Device(name=device.device_kind, memory=memory, is_host=True)
    statistics = device.memory_stats()
    memory = statistics["bytes_limit"] if statistics else room.host
    known = H100 if device.device_kind == H100.name else None
    pinned = int(capacity.PINNED_SHARE * room.host)
    return Device(
        name=device.device_kind,
        memory=memory,
        host_memory=pinned,
        rates=known.rates if known else None,
        links=known.links if known else None,
    )
