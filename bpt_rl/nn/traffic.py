"""What a device sends in a training step that several share, counted as the code sends it.

Left out: the loss, norms and other single numbers, segment ids, and the batch itself, a thousandth of the rest.
"""

import dataclasses
from typing import Literal

from bpt_rl.config import Activations
from bpt_rl.nn.device_mesh import AXES, Axis
from bpt_rl.nn.memory_plan import attention_passes
from bpt_rl.nn.workload import FLOAT32, Workload

MATRICES = 6
"""Of a layer: queries, keys, values, output, and the feedforward's two."""

Collective = Literal["collective-permute", "all-to-all", "all-gather", "reduce-scatter", "all-reduce"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """Messages of one kind in a gradient step."""

    purpose: str
    """What is sent."""
    collective: Collective
    """As XLA names it."""
    axes: tuple[Axis, ...]
    """Of the mesh, over which devices send it to each other."""
    num_devices: int
    """Along those axes together."""
    count: int
    """Calls in a step; arrays that go together are one."""
    num_bytes: int
    """Of a call: what the device passes on (permute), has before it (all-to-all, reduce-scatter, all-reduce), or has
    behind it (all-gather)."""

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step, where rings of devices do what is not sent directly."""
        others = self.num_devices - 1
        factor = {
            "collective-permute": 1.0,
            "all-to-all": others / self.num_devices,
            "all-gather": others / self.num_devices,
            "reduce-scatter": others / self.num_devices,
            "all-reduce": 2 * others / self.num_devices,
        }[self.collective]
        return int(self.count * self.num_bytes * factor)


def step_traffic(work: Workload, activations: Activations) -> tuple[Transfer, ...]:
    """Returns what each device sends in a gradient step; nothing where there is but one."""
    found = [*_attention(work, activations), *_matrices(work, activations), *_gradients(work)]
    return tuple(transfer for transfer in found if transfer.num_devices > 1 and transfer.count)


def _attention(work: Workload, activations: Activations) -> list[Transfer]:
    num_devices, model = work.share.context, work.model
    passes = attention_passes(model, activations)
    if work.share.method == "ulysses":
        return _heads(work, activations)
    calls = work.accumulation * model.num_layers * model.head_groups
    tokens = work.num_tokens * work.kv_dim // model.head_groups
    hops = num_devices - 1
    # The compiler sends keys off once for a layer's recomputation and its backward pass, which lie side by side.
    once = int(activations in ("recompute", "offload") and model.head_groups == 1 and num_devices > 1)

    def travelling(purpose: str, count: int, size: int) -> Transfer:
        return Transfer(
            purpose=purpose,
            collective="collective-permute",
            axes=("context",),
            num_devices=num_devices,
            count=calls * count,
            num_bytes=2 * tokens * size,
        )

    return [
        travelling("keys and values", hops * (passes + 1) - once, work.item_bytes),
        travelling("their gradients, summed", hops, FLOAT32),
        travelling("their gradients, home", 1, work.item_bytes),
    ]


def _heads(work: Workload, activations: Activations) -> list[Transfer]:
    """Returns what turns shares of tokens into shares of heads and back; gradients go the other way round."""
    model = work.model
    # Whatever is kept is kept by heads, but the projection behind reads it by tokens, so that it is sent again.
    passes = 2 + (activations != "keep") + (model.layer_groups > 1)

    def turned(purpose: str, entries: int) -> Transfer:
        return Transfer(
            purpose=purpose,
            collective="all-to-all",
            axes=("context",),
            num_devices=work.share.context,
            count=work.accumulation * model.num_layers * model.head_groups * passes,
            num_bytes=work.num_tokens * work.item_bytes * entries // model.head_groups,
        )

    return [
        turned("queries, keys and values", model.embed_dim + 2 * work.attended_kv_dim),
        turned("results of heads", model.embed_dim),
    ]


def _matrices(work: Workload, activations: Activations) -> list[Transfer]:
    """Returns what devices that split matrices need of each other's layers, float32."""
    model = work.model
    layers = work.accumulation * model.num_layers
    passes = 1 + (activations != "keep") + (model.layer_groups > 1)

    def split(purpose: str, collective: Collective, num_layers: int) -> Transfer:
        return Transfer(
            purpose=purpose,
            collective=collective,
            axes=work.matrix_axes,
            num_devices=work.matrix_devices,
            count=num_layers * MATRICES,
            # On average.
            num_bytes=FLOAT32 * work.layer_parameters // MATRICES,
        )

    return [
        split("matrices of a layer", "all-gather", layers * passes),
        split("gradients of a layer", "reduce-scatter", layers),
    ]


def _gradients(work: Workload) -> list[Transfer]:
    """Returns the sums of gradients that are left when each micro-batch is done."""
    share, matrices = work.share, work.matrix_parameters
    others = work.num_parameters - matrices

    def summed(purpose: str, axes: tuple[Axis, ...], num_parameters: int) -> Transfer:
        return Transfer(
            purpose=purpose,
            collective="all-reduce",
            axes=axes,
            num_devices=share.devices_along(axes),
            count=work.accumulation,
            num_bytes=FLOAT32 * num_parameters,
        )

    if not work.matrix_axes:
        return [summed("gradients", AXES, work.num_parameters)]
    copies = tuple(axis for axis in AXES if axis not in work.matrix_axes)
    return [
        summed("gradients of matrices", copies, matrices // work.matrix_devices),
        summed("gradients of the rest", AXES, others),
    ]
