"""The seconds of a training step at the rates of kernels, memory and links; of a ring, turn by turn.

Devices are numbered with the context axis innermost, then fsdp, then data, so that what is sent most often stays inside
a host. One array that a turn of a ring sends goes beside what the turn attends to, and is waited for where it takes
longer. All else is waited for: all-to-alls, gathered matrices, sums of gradients, and the second array of a turn.
"""

import dataclasses
import math
from collections.abc import Sequence

from bpt_rl.config import Activations
from bpt_rl.nn.device_mesh import Axis
from bpt_rl.nn.memory_plan import Flops, MemoryPlan, attention_passes
from bpt_rl.nn.traffic import Transfer
from bpt_rl.nn.workload import FLOAT32, StepShare, Workload
from bpt_rl.run.devices import Links, Rates
from bpt_rl.run.streamed_bytes import streamed_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step."""

    computing: float
    """Attention, matrix products, what passes through the device's memory beside them, and transfers to the host and
    back, one after another."""
    exposed: float
    """Waiting for other devices."""

    @property
    def total(self) -> float:
        """Of the step."""
        return self.computing + self.exposed


def computing_seconds(
    rates: Rates, work: Workload, activations: Activations, flops: Flops, memory: MemoryPlan
) -> float:
    """Returns the seconds of a device's kernels and of its transfers to the host and back."""
    parameters = FLOAT32 * work.local_parameters * work.optimizer_in_host
    state = 3 * parameters
    # There and back: what layers keep, for each micro-batch; parameters and moments for the update. Before it the
    # parameters come for the working copy.
    moved = 2 * work.accumulation * (memory.host - state) + 2 * state + parameters
    return (
        attention_seconds(rates, work, activations, flops)
        + flops.matrices / rates.matrices
        + streamed_bytes(work, activations) / rates.memory
        + moved / rates.host
    )


def attention_seconds(rates: Rates, work: Workload, activations: Activations, flops: Flops) -> float:
    """Returns the seconds of all attention, forward as often as the level asks for, and backward."""
    forward, backward = attention_rates(rates, work)
    products = 2 * attention_passes(work.model, activations)
    return flops.attention / (products + 5) * (products / forward + 5 / backward)


def attention_rates(rates: Rates, work: Workload) -> tuple[float, float]:
    """Returns the operations a second, forward and backward, of the attention that will run."""
    if work.implementation == "cudnn":
        return rates.attention_forward, rates.attention_backward
    return rates.blockwise, rates.blockwise


def exposed_seconds(
    links: Links, rates: Rates, work: Workload, activations: Activations, traffic: Sequence[Transfer]
) -> float:
    """Returns the seconds that a device waits for others, by `bpt_rl.nn.traffic.step_traffic`."""
    is_ring = any(transfer.collective == "collective-permute" for transfer in traffic)
    waited = sum(
        transfer.count * call_seconds(links, work.share, transfer)
        for transfer in traffic
        if transfer.collective != "collective-permute"
    )
    return waited + (_ring_seconds(links, rates, work, activations) if is_ring else 0.0)


def devices_in_host(links: Links, share: StepShare, axes: Sequence[Axis]) -> int:
    """Returns how many of the devices that a device meets along these axes are in one host, itself included."""
    count = 1
    for axis, stride, size in (
        ("context", 1, share.context),
        ("fsdp", share.context, share.fsdp),
        ("data", share.context * share.fsdp, share.data),
    ):
        if axis in axes:
            count *= max(1, min(size, links.devices_per_host // stride))
    return count


def call_seconds(links: Links, share: StepShare, transfer: Transfer) -> float:
    """Returns the seconds of one call of a collective.

    Inside a host at the rate of the collective. Between hosts, an all-to-all sends to both sorts of devices at once,
    and what goes around rings of all devices leaves a host through the cards of those that take part.
    """
    everyone, here = transfer.num_devices, devices_in_host(links, share, transfer.axes)
    is_inside = here == everyone
    inside = {
        "collective-permute": links.permute,
        "all-to-all": links.all_to_all,
        "all-gather": links.all_gather,
        "reduce-scatter": links.reduce_scatter,
        "all-reduce": links.all_reduce,
    }[transfer.collective]
    sent = transfer.sent / transfer.count
    if transfer.collective == "collective-permute":
        # The slowest hop sets the pace of all.
        return _latency(links, is_inside) + sent / (inside if is_inside else min(inside, links.network))
    # Rings of many devices take many hops, and trees as many as their depth.
    latency = _latency(links, is_inside) * math.ceil(math.log2(everyone))
    if transfer.collective == "all-to-all":
        near = sent * (here - 1) / (everyone - 1)
        return latency + max(near / inside, (sent - near) / links.network)
    return latency + sent / (inside if is_inside else min(inside, here * links.network))


def _latency(links: Links, is_inside: bool) -> float:
    return links.latency if is_inside else links.network_latency


def _ring_seconds(links: Links, rates: Rates, work: Workload, activations: Activations) -> float:
    """Returns the seconds that turns of a ring wait for what they send, in all layers."""
    num_devices, model = work.share.context, work.model
    calls = work.accumulation * model.num_layers * model.head_groups
    # Operations of a group's heads that one product of a turn's queries and keys has: each turn sees half of the pairs.
    product = work.num_tokens * work.local_length * model.embed_dim // model.head_groups
    forward_seconds, backward_seconds = (
        count * product / rate for count, rate in zip((2, 5), attention_rates(rates, work), strict=True)
    )

    def hop(size: int) -> float:
        transfer = Transfer(
            purpose="keys and values",
            collective="collective-permute",
            axes=("context",),
            num_devices=num_devices,
            count=1,
            num_bytes=2 * work.num_tokens * work.kv_dim * size // model.head_groups,
        )
        return call_seconds(links, work.share, transfer)

    keys, gradients = hop(work.item_bytes), hop(FLOAT32)
    has_keys = activations in ("recompute", "offload") and model.head_groups == 1
    forward = (num_devices - 1) * max(0.0, keys - forward_seconds)
    # Turns send keys but for the last, and gradients but for the first; of two arrays at a time XLA hides one.
    hiding = [0.0 if has_keys else keys, *[keys] * (num_devices - 2), gradients]
    waited = sum(max(0.0, sent - backward_seconds) for sent in hiding)
    waited += (num_devices - 2) * gradients + hop(work.item_bytes)
    return calls * (attention_passes(model, activations) * forward + waited)
