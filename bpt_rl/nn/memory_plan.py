"""What a training step holds and computes, counted from what the code keeps, before anything is compiled.

Every term is an array that the step needs at one time, in bytes a token times tokens. Left out: the batch
itself, about a thousandth, and whatever the compiler adds. Where devices share the step, all is of one of them.
"""

import dataclasses

from bpt_rl.config import Activations, ModelConfig
from bpt_rl.nn.rematerialisation import is_unrolled
from bpt_rl.nn.workload import FLOAT32, Workload
from bpt_rl.types import LAYOUTS

LEVELS: tuple[Activations, ...] = ("keep", "save_attention", "offload_attention", "recompute", "offload")
"""What a layer may keep, fastest first: each computes or moves more than the one before it."""

IN_HOST: tuple[Activations, ...] = ("offload_attention", "offload")
"""Levels that keep it in the host's memory."""

ACTIVATION_COPIES = {"relu": 1, "gelu": 5, "silu": 4}
"""Hidden tensors that the derivative of the activation and the product behind it read; relu adds a mask of bytes, and
gelu reads a sixth before JAX 0.11."""

UNROLLED_COPIES = {"relu": 1, "gelu": 3, "silu": 2}
"""The same where layers are compiled one by one: XLA then makes what is cheap again in place of keeping it."""

PROCESSOR_COPIES = {"relu": 2, "gelu": 3, "silu": 3}
"""The same of float32 tensors on a processor, which XLA widens everything to."""

PROCESSOR_STREAMS = 6
"""float32 tensors of the stream's size that XLA holds on a processor beside what is counted here, measured: rotary
tables of queries and keys, made for all layers at once, and two more of what loops begin from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes at the peak of a step: the backward pass of the last layer, when all layers' results are still kept."""

    parameters: int
    """float32; where they lie in the host's memory, the layers' kernels are of the compute type."""
    optimizer: int
    """AdamW: two float32 moments a parameter; 0 where they lie in the host's memory."""
    gradients: int
    """float32; twice with accumulation, the sum and the micro-batch's."""
    kept: int
    """On the device from the forward pass to the backward pass, all layers."""
    embeddings: int
    """float32 token embeddings, which the norm behind them reads at the very end of the backward pass; 0 where they
    are made chunk by chunk."""
    layer: int
    """The largest temporary: what the backward pass of one layer holds at once."""
    update: int
    """All that the optimizer's update holds, when activations are gone: gradients, parameters and both moments; of
    those that lie in the host's memory two layers, and what is no layer's."""
    host: int
    """Pinned memory of the host."""

    @property
    def temporary(self) -> int:
        """Device bytes beyond parameters and optimiser: what a compiled step reports as temporary."""
        return self.gradients + self.kept + self.embeddings + self.layer

    @property
    def device(self) -> int:
        """Device bytes in all, at the worst moment."""
        return max(self.parameters + self.optimizer + self.temporary, self.update)

    def fits(self, memory: int, host_memory: int | None) -> bool:
        """Whether device and host have the bytes; a host of None has."""
        return self.device <= memory and (host_memory is None or self.host <= host_memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of a gradient step; a multiplication and an addition are two."""

    attention: int
    """Products of queries, keys and values, the causal half only; the backward pass computes the logits anew."""
    matrices: int
    """Products with the weights of the layers; embeddings and head, a thousandth of them, are left out."""


def plan_memory(work: Workload, activations: Activations) -> MemoryPlan:
    """Returns the bytes that a gradient step holds at its peak, by kind."""
    model, tokens = work.model, work.num_tokens
    stream = work.item_bytes * model.embed_dim
    kept = tokens * _kept_layers(work, activations)
    dropped = model.embed_dim if model.dropout else 0  # a mask of bytes
    transient = max(_attention_bytes(work, activations) * tokens, _residual_bytes(work, activations))
    if activations in IN_HOST:
        transient += tokens * stream  # the next layer's input, on its way from the host
    if work.is_on_processor and not is_unrolled(model, activations):
        transient += tokens * PROCESSOR_STREAMS * FLOAT32 * model.embed_dim
    parameters = FLOAT32 * work.local_parameters
    in_host = work.optimizer_in_host
    updated = parameters
    if in_host:
        updated += FLOAT32 * (2 * work.layer_parameters - work.matrix_parameters)
    return MemoryPlan(
        parameters=parameters - in_host * work.matrix_parameters * (FLOAT32 - work.item_bytes),
        optimizer=0 if in_host else 2 * parameters,
        gradients=parameters * min(work.accumulation, 2),
        kept=(0 if activations in IN_HOST else kept) + _kept_matrices(work, activations),
        embeddings=0 if work.is_chunked else tokens * (FLOAT32 * model.embed_dim + dropped),
        layer=transient + _layer_weights(work),
        update=parameters + 3 * updated,
        host=in_host * 3 * parameters + (kept if activations in IN_HOST else 0),
    )


def _layer_weights(work: Workload) -> int:
    """Returns the bytes of one layer's weights and their gradients, which stand beside its activations.

    Both are of the compute type. Where devices split them, they are gathered before they are cast, and summed after.
    """
    cast = 2 * work.item_bytes * work.layer_parameters
    is_gathered = work.matrix_devices > 1 and work.item_bytes < FLOAT32
    return cast + is_gathered * 2 * FLOAT32 * work.layer_parameters


def _kept_matrices(work: Workload, activations: Activations) -> int:
    """Returns the bytes of gathered matrices, in the compute type, that are kept until the backward pass."""
    is_kept = work.matrix_devices > 1 and activations == "keep"
    return (
        is_kept * work.model.num_layers // work.model.layer_groups * work.item_bytes * work.layer_parameters
    )


def _kept_layers(work: Workload, activations: Activations) -> int:
    """Returns the bytes of a token that all layers keep: of layer groups, the inputs and what one group keeps."""
    model, each = work.model, kept_bytes_per_token(work, activations)
    if model.layer_groups == 1:
        return model.num_layers * each
    return (
        model.layer_groups * work.item_bytes * model.embed_dim + model.num_layers // model.layer_groups * each
    )


def kept_bytes_per_token(work: Workload, activations: Activations) -> int:
    """Returns the bytes that each layer keeps of a token for its backward pass, wherever they lie.

    `recompute` and `offload` keep the layer's input; `save_attention` and `offload_attention` also the attention's
    output and float32 log-sum-exp; `keep` all that differentiation reads.
    """
    size, width = work.item_bytes, work.model.embed_dim
    attended = size * width + FLOAT32 * work.model.num_heads
    if activations in ("recompute", "offload"):
        return size * width
    if activations in ("save_attention", "offload_attention"):
        return size * width + attended
    projected = size * (width + 2 * work.kv_dim)
    if is_unrolled(work.model, activations):
        masks = 2 * width if work.model.dropout else 0
        if work.is_on_processor:
            # Measured: what blockwise attention reads is kept as it was projected and laid out by chunks; what is
            # dropped, with what it was drawn from.
            hidden = work.feedforward_dim * PROCESSOR_COPIES[work.model.activation]
            dropped = 3 * width if work.model.dropout else 0
            entries = 14 * width + 4 * work.kv_dim + work.model.num_heads + hidden + dropped
            return FLOAT32 * entries + masks
        hidden = size * work.feedforward_dim * UNROLLED_COPIES[work.model.activation]
        # Norms are made again of the stream; what they give is kept for the products behind.
        return 4 * size * width + projected + attended + masks + hidden
    return _norm_bytes(work) + 2 * size * width + projected + attended + _feedforward_bytes(work)


def _norm_bytes(work: Workload) -> int:
    """Returns what the derivative of a norm reads of a token, float32: three tensors and two statistics."""
    return FLOAT32 * (3 * work.model.embed_dim + 2)


def _feedforward_bytes(work: Workload) -> int:
    """Returns what the derivative of norm and feedforward reads of a token."""
    model, size = work.model, work.item_bytes
    mask = 1 if model.activation == "relu" else 0
    hidden = work.feedforward_dim * (ACTIVATION_COPIES[model.activation] * size + mask)
    drops = model.embed_dim * 2 if model.dropout else 0
    return _norm_bytes(work) + size * model.embed_dim + hidden + drops


def _attention_bytes(work: Workload, activations: Activations) -> int:
    """Returns what the backward pass of attention holds of a token beside what layers keep.

    cuDNN sums the query gradient in float32, and gives keys and values a gradient for each query head, which are
    then added where query heads share keys. The blockwise form lays the operands out by chunks and sums the key and
    value gradients in float32. All this is of one group of heads at a time.
    """
    size, width, kv_dim = work.item_bytes, work.model.embed_dim, work.attended_kv_dim
    num_groups = work.model.head_groups
    if work.share.context > 1 and work.share.method == "ring":
        heads = _ring_bytes(work, activations)
    else:
        heads = 2 * size * (width + 2 * kv_dim) + 2 * FLOAT32 * work.model.num_heads
        if work.implementation == "blockwise":
            heads += 2 * size * width + 2 * FLOAT32 * kv_dim
        else:
            heads += FLOAT32 * width + (2 * size * width if kv_dim < width else 0)
        if work.share.context > 1:
            # Queries, keys and values go as one array: what is sent, beside what arrives.
            heads += size * (width + 2 * kv_dim)
    if is_unrolled(work.model, activations):
        # All else takes the place of what the layers behind have kept.
        return heads // num_groups
    # Layer input, gradient of the stream, the attention's output and its gradient; the gradient of the tokens read.
    held = 4 * size * width + size * width // LAYOUTS[work.model.layout]
    if num_groups > 1:
        # The gradient summed over groups; a group's output and its gradient; results as their groups saved them.
        saved = size * width if activations in ("save_attention", "offload_attention") else 0
        held += size * width + 2 * size * width // num_groups + saved
    if work.model.layer_groups > 1 and num_groups == 1:
        held += 3 * size * width // 2  # measured: what nested loops over layers hold twice
    return held + heads // num_groups


def _ring_bytes(work: Workload, activations: Activations) -> int:
    """Returns what the backward pass of a ring holds of a token of this device, for all heads."""
    size, width, kv_dim = work.item_bytes, work.model.embed_dim, work.kv_dim
    own = size * (width + 2 * kv_dim) + 2 * FLOAT32 * work.model.num_heads
    # Queries, output, its gradient and half of the keys and values, laid out by chunks.
    cut = size * (3 * width + kv_dim)
    # Of two devices each hears of the other once: no keys arrive while others that came are attended to.
    has_turns = work.share.context > 2
    held_and_arriving = (1 + has_turns) * size * 2 * kv_dim
    # Of queries; of the keys and values that are held, and of those that arrive or, of two, the half attended to.
    gradients = FLOAT32 * (width + (3 + has_turns) * kv_dim)
    # The first keys come once for recomputation and backward pass, and are held until that begins.
    early = 2 * size * kv_dim * (activations in ("recompute", "offload"))
    return own + cut + held_and_arriving + gradients + early


def _residual_bytes(work: Workload, activations: Activations) -> int:
    """Returns what the backward pass of output projection and feedforward holds beside what layers keep."""
    model, size, width = work.model, work.item_bytes, work.model.embed_dim
    # Layer input, its norm, the attention's output, the gradient that comes in, and the two that go out.
    held = 6 * size * width + size * (width + 2 * work.kv_dim) // model.head_groups
    chunk = 2 * size * work.feedforward_dim  # gradients before and behind the activation
    if activations == "keep":
        # As in attention, all but the new gradients takes the place of what was kept.
        return (chunk if is_unrolled(model, activations) else held + chunk) * work.num_tokens
    return held * work.num_tokens + (chunk + _feedforward_bytes(work)) * work.local_rows * work.chunk_length


def count_flops(work: Workload, activations: Activations) -> Flops:
    """Returns the operations that a device executes in a gradient step, recomputation included.

    A causal product of queries and keys is S^2 D operations; attention has two of them forward and five backward.
    """
    layers, width = work.model.num_layers, work.model.embed_dim
    # Devices of a row have equal parts of the causal half: zigzag sees to it, or each has whole heads.
    product = work.num_tokens * work.padded_length * width
    is_again = activations != "keep"
    # What the last product of a layer gives is in nobody's derivative: it is not computed again.
    last = width * work.feedforward_dim
    weights = 3 * work.layer_parameters
    weights += is_again * work.projection_parameters
    # Groups of layers go forward once more, and whole: each layer's result is the next one's input.
    weights += (work.model.layer_groups > 1) * work.layer_parameters
    weights += is_again * (work.residual_parameters - last)
    return Flops(
        attention=work.accumulation * layers * product * (5 + 2 * attention_passes(work.model, activations)),
        matrices=work.accumulation * layers * 2 * weights * work.num_tokens,
    )


def attention_passes(model: ModelConfig, activations: Activations) -> int:
    """Returns how often a layer attends forward in a gradient step; backward it does once."""
    return 1 + (activations in ("recompute", "offload")) + (model.layer_groups > 1)


def longest_context(
    work: Workload,
    activations: Activations,
    memory: int,
    *,
    host_memory: int | None = None,
    num_rows: int | None = None,
) -> int:
    """Returns the most tokens that each row can have; 0 if not one fits.

    Args:
      work: Its rows do not count.
      activations: What a layer keeps.
      memory: Bytes of the device.
      host_memory: Bytes of the host; None for as many as it takes.
      num_rows: Of a micro-batch; the fewest that the devices can share if None.
    """
    num_rows = num_rows or work.share.row_shares

    def fits(tokens: int) -> bool:
        row = dataclasses.replace(work, num_rows=num_rows, context_length=tokens)
        return plan_memory(row, activations).fits(memory, host_memory)

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
