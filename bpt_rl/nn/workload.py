"""A gradient step as a plan sees it: the model, the rows, and the devices that share them."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Literal

from bpt_rl.config import ModelConfig
from bpt_rl.nn.context_parallel import Method, key_repeats
from bpt_rl.nn.device_mesh import AXES, Axis, matrix_axes, matrix_widths
from bpt_rl.types import LAYOUTS

FLOAT32 = 4
"""Bytes of a number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShare:
    """How many devices share a step along each axis of the mesh, and how attention crosses them."""

    data: int = 1
    fsdp: int = 1
    context: int = 1
    method: Method = "ulysses"
    """Of no meaning to one device along `context`."""

    @property
    def num_devices(self) -> int:
        """Devices that train together."""
        return self.data * self.fsdp * self.context

    def devices_along(self, axes: Iterable[Axis]) -> int:
        """Returns how many devices there are along these axes together."""
        sizes = dict(zip(AXES, (self.data, self.fsdp, self.context), strict=True))
        return math.prod(sizes[axis] for axis in axes)

    @property
    def row_shares(self) -> int:
        """What the rows of a micro-batch must be a multiple of."""
        return self.data * self.fsdp

    @property
    def num_chunks(self) -> int:
        """What the steps of a row are padded to a multiple of: two chunks a device, which zigzag placement needs."""
        return 2 * self.context if self.context > 1 else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A gradient step of a model."""

    model: ModelConfig
    """Its `activations` are not read: each level is asked for by name."""
    implementation: Literal["cudnn", "blockwise"]
    """Attention that will run."""
    num_parameters: int
    num_rows: int = 1
    """Of a micro-batch, of all devices together."""
    context_length: int
    """Tokens a row, whole."""
    accumulation: int = 1
    """Micro-batches."""
    optimizer_in_host: bool = False
    """Whether parameters and AdamW's moments lie in the host's memory but for the update, and the device has a copy
    whose kernels are of the compute type."""
    share: StepShare = StepShare()
    """Of one device in the step."""
    is_on_processor: bool = False
    """Whether XLA compiles for a processor."""

    @property
    def local_rows(self) -> int:
        """Rows of a micro-batch that a device has, or has a part of."""
        return -(-self.num_rows // self.share.row_shares)

    @functools.cached_property
    def padded_length(self) -> int:
        """Tokens a row, with the padding that lets devices share its steps."""
        per_step, chunks = LAYOUTS[self.model.layout], self.share.num_chunks
        num_steps = -(-self.context_length // per_step)
        return self.context_length if chunks == 1 else -(-num_steps // chunks) * chunks * per_step

    @property
    def local_length(self) -> int:
        """Tokens of a row that a device has."""
        return self.padded_length // self.share.context

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of a micro-batch that a device has."""
        return self.local_rows * self.local_length

    @property
    def chunk_length(self) -> int:
        """Tokens of a row that go through a feedforward at once."""
        chunks = -(-self.local_length // self.model.feedforward_chunk_size)
        return -(-self.local_length // chunks)

    @property
    def is_chunked(self) -> bool:
        """Whether the feedforward goes chunk by chunk, and so is computed again in the backward pass."""
        return self.chunk_length < self.local_length

    @property
    def item_bytes(self) -> int:
        """Bytes of an activation."""
        return 2 if self.model.compute_dtype == "bfloat16" else 4

    @property
    def kv_dim(self) -> int:
        """Entries of a token's keys of all heads."""
        return (
            self.model.embed_dim // self.model.num_heads * (self.model.num_kv_heads or self.model.num_heads)
        )

    @property
    def attended_kv_dim(self) -> int:
        """Entries of a token's keys where it is attended to: ulysses may repeat heads, to give some to each device."""
        share, model = self.share, self.model
        if share.context == 1 or share.method == "ring":
            return self.kv_dim
        heads, kv_heads = (
            count // model.head_groups for count in (model.num_heads, model.num_kv_heads or model.num_heads)
        )
        return self.kv_dim * key_repeats(heads, kv_heads, share.context)

    @property
    def feedforward_dim(self) -> int:
        """Hidden entries of a token."""
        return self.model.feedforward_dim or 4 * self.model.embed_dim

    @property
    def projection_parameters(self) -> int:
        """Weights that make queries, keys and values of one layer."""
        return self.model.embed_dim * (self.model.embed_dim + 2 * self.kv_dim)

    @property
    def residual_parameters(self) -> int:
        """Weights behind the attention of one layer: its output and the feedforward."""
        return self.model.embed_dim * (self.model.embed_dim + 2 * self.feedforward_dim)

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer."""
        return self.projection_parameters + self.residual_parameters

    @property
    def matrix_axes(self) -> tuple[Axis, ...]:
        """Axes of the mesh whose devices split the matrices; none where each has them whole."""
        share = self.share
        return matrix_axes(matrix_widths(self.model), fsdp=share.fsdp, context=share.context)

    @property
    def matrix_devices(self) -> int:
        """Devices that split the matrices among them."""
        return self.share.devices_along(self.matrix_axes)

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices of all layers: what devices split."""
        return min(self.model.num_layers * self.layer_parameters, self.num_parameters)

    @property
    def local_parameters(self) -> int:
        """Parameters that a device has; all others are whole on each."""
        matrices = self.matrix_parameters
        return self.num_parameters - matrices + matrices // self.matrix_devices
