"""Bytes that a step reads and writes in its device's memory beside what matrix products and attention do themselves.

Norms, rotary positions, activations, residuals, casts, chunks cut and joined, and the update compute little: they
last as long as their operands take to come and go. Each is counted as if it read what it needs once and wrote what it
makes once; what products and attention read is in their own rates. Left out: embeddings, head and loss.
"""

from bpt_rl.config import Activations
from bpt_rl.nn.memory_plan import ACTIVATION_COPIES, kept_bytes_per_token
from bpt_rl.nn.workload import FLOAT32, Workload

UPDATE_BYTES = 8 * FLOAT32
"""Of a parameter: its gradient is read for the norm of all; then gradient, parameter and two moments are read, and the
last three are written."""


def streamed_bytes(work: Workload, activations: Activations) -> int:
    """Returns the bytes that a device reads and writes in a gradient step, products and attention left out."""
    model, tokens = work.model, work.num_tokens
    # Stream and attention's output are cut into chunks, the new stream is joined.
    cut = 6 * work.item_bytes * model.embed_dim * (work.is_chunked and activations != "keep")
    projecting, behind = _projecting(work), _behind_attention(work) + cut
    layer = projecting + behind + _backward(work) + cut
    if activations != "keep":
        # What is kept is written and read; all but the attention is made again of it.
        layer += 2 * kept_bytes_per_token(work, activations) + projecting + behind
    if model.layer_groups > 1:
        layer += projecting + behind
    layer += _crossing(work, activations)
    # Weights become the compute type in two passes, and their gradients float32 again.
    casts = 3 * (FLOAT32 + work.item_bytes) * work.layer_parameters if work.item_bytes < FLOAT32 else 0
    sums = 3 * FLOAT32 * work.local_parameters if work.accumulation > 1 else 0
    micro_batch = model.num_layers * (tokens * layer + casts) + sums
    return work.accumulation * micro_batch + UPDATE_BYTES * work.local_parameters


def _projecting(work: Workload) -> int:
    """Returns what the norm and the rotary positions of a token's queries and keys move, forward."""
    width = work.model.embed_dim
    return work.item_bytes * (2 * width + 2 * (width + work.kv_dim))


def _behind_attention(work: Workload) -> int:
    """Returns what two residual sums, a norm and the activation move of a token, forward."""
    width = work.model.embed_dim
    return work.item_bytes * (2 * 3 * width + 2 * width + 2 * work.feedforward_dim)


def _backward(work: Workload) -> int:
    """Returns what the derivatives of all that move of a token, with what they read, which is written before."""
    model, size, width = work.model, work.item_bytes, work.model.embed_dim
    # Of a norm: three float32 tensors, written and read; the gradient that comes in and the one that goes out.
    norms = 2 * (2 * 3 * FLOAT32 * width + 2 * size * width)
    hidden = size * work.feedforward_dim * (2 * ACTIVATION_COPIES[model.activation] + 2)
    rotary = 2 * size * (width + work.kv_dim)
    # Of three residual sums, and of the gradients of queries, keys and values, which add up to one.
    sums = size * (3 * 3 * width + 2 * 3 * width)
    # cuDNN sums the gradient of queries in float32.
    rounded = (FLOAT32 + size) * width if work.implementation == "cudnn" else 0
    return norms + hidden + rotary + sums + rounded


def _crossing(work: Workload, activations: Activations) -> int:
    """Returns what a token's way to other devices, and the merging of what they bring, move in a layer."""
    share, size, width = work.share, work.item_bytes, work.model.embed_dim
    if share.context == 1:
        return 0
    is_again = activations in ("recompute", "offload")
    forward = 1 + is_again + (work.model.layer_groups > 1)
    if share.method == "ulysses":
        # Laid out before and behind each all-to-all: queries, keys and values, and the output.
        inputs = 4 * size * (width + 2 * work.attended_kv_dim)
        is_sent_again = activations in ("save_attention", "offload_attention")
        return (forward + 1) * (inputs + 4 * size * width) + is_sent_again * inputs
    kv_dim = work.kv_dim
    # A turn cuts half of the keys out and merges a block's output into the float32 sum; backward it cuts queries,
    # output and its gradient too, and adds to the sums of the queries' and of the keys' and values' gradients.
    merge = (2 * FLOAT32 + size) * width + 2 * size * kv_dim
    cut = 2 * size * (3 * width + kv_dim)
    gradients = 3 * FLOAT32 * (width + 2 * kv_dim) + FLOAT32 * 2 * kv_dim
    return (share.context - 1) * (forward * merge + cut + gradients)
