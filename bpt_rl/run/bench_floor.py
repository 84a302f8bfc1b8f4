"""The floor of a step: attention and matrix products at the speed that each reaches alone on the same device."""

import functools

from bpt_rl.config import ModelConfig
from bpt_rl.nn.attention import dot_product_attention
from bpt_rl.nn.memory_plan import attention_passes, count_flops
from bpt_rl.nn.workload import Workload
from bpt_rl.run.bench_attention import AttentionShape, AttentionTimes, time_attention
from bpt_rl.run.bench_measurement import matrix_rate
from bpt_rl.run.bench_subject import Subject

_LOGIT_PRODUCTS = 4
"""Matrix products behind the loss of a vocabulary: the logits, once more in the backward pass, and two gradients."""


class KernelTimes:
    """Times of kernels alone, each measured once, when it is first asked for."""

    def __init__(self) -> None:
        self._matrix_rates: dict[str, float] = {}
        self._attention: dict[tuple[AttentionShape, str, int, int], AttentionTimes] = {}

    def matrix_rate(self, dtype: str) -> float:
        """Returns the rate of a large matrix product of this type."""
        if dtype not in self._matrix_rates:
            self._matrix_rates[dtype] = matrix_rate(dtype)
        return self._matrix_rates[dtype]

    def attention(self, model: ModelConfig, num_rows: int, num_tokens: int) -> AttentionTimes:
        """Returns the times of one layer's attention, all its heads at once."""
        shape = AttentionShape(
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            head_dim=model.embed_dim // model.num_heads,
            dtype=model.compute_dtype,
        )
        key = (shape, model.implementation, model.query_chunk_size, model.key_chunk_size)
        if key not in self._attention:
            attend = functools.partial(
                dot_product_attention,
                implementation=model.implementation,
                query_chunk_size=model.query_chunk_size,
                key_chunk_size=model.key_chunk_size,
            )
            self._attention[key] = time_attention(attend, shape, 3)
        return self._attention[key]


def floor_seconds(
    subject: Subject, attention: AttentionTimes, matrix_flops_per_second: float, *, forward_only: bool = False
) -> float:
    """Returns the seconds of a gradient step, or of its forward pass alone, that does nothing else.

    The attention of each layer runs forward as often as the step does it, and backward once; matrix products are
    those of the layers, recomputation included, and those of a vocabulary.
    """
    model = subject.train.model
    passes = 1 if forward_only else attention_passes(model, model.activations)
    backward = 0 if forward_only else attention.both - attention.forward
    calls = subject.train.optimizer.accumulation * model.num_layers
    matrix_seconds = _matrix_flops(subject, forward_only=forward_only) / matrix_flops_per_second
    return calls * (passes * attention.forward + backward) + matrix_seconds


def _matrix_flops(subject: Subject, *, forward_only: bool) -> int:
    model = subject.train.model
    work = _workload(model, num_rows=subject.num_rows, num_tokens=subject.num_tokens)
    if forward_only:
        weights = work.projection_parameters + work.residual_parameters
        return 2 * model.num_layers * weights * subject.step_tokens + subject.logit_flops
    flops = subject.train.optimizer.accumulation * count_flops(work, model.activations).matrices
    return flops + _LOGIT_PRODUCTS * subject.logit_flops


def _workload(model: ModelConfig, *, num_rows: int, num_tokens: int) -> Workload:
    # Neither attention's implementation nor parameters change the number of operations.
    return Workload(
        model=model,
        implementation="blockwise",
        num_parameters=0,
        num_rows=num_rows,
        context_length=num_tokens,
    )
