"""What a profile says of sending and computing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.run import bench_trace
from bpt_rl.run.bench_trace import communication_of


def test_what_is_sent_while_a_device_computes_is_hidden():
    kernels = [
        ("gemm", 0, 10),
        ("ncclDevKernel_SendRecv(args)", 5, 10),  # 5 of 10 beside the product
        ("fusion_1", 12, 2),  # 2 more
        ("ncclDevKernel_SendRecv(args)", 14, 4),  # goes on from the one before, 3 of it alone
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 30, 5),
        ("cudnn_flash", 20, 30),
    ]
    found = bench_trace._of_device(kernels)
    assert found.seconds == pytest.approx((18 - 5 + 5) / 1e9)
    assert found.hidden_seconds == pytest.approx((5 + 2 + 5) / 1e9)


def test_time_that_both_cover_is_counted_once_whatever_the_order():
    generator = np.random.default_rng(0)

    def drawn():
        return [(float(b), float(b + d)) for b, d in generator.integers(0, 100, (8, 2))]

    left, right = drawn(), drawn()
    covered = [{n for b, e in each for n in range(int(b), int(e))} for each in (left, right)]
    unions = [bench_trace._union(each) for each in (left, right)]
    assert [bench_trace._length(union) for union in unions] == [len(each) for each in covered]
    assert bench_trace._length(bench_trace._common(*unions)) == len(covered[0] & covered[1])


def test_a_profile_without_a_gpu_says_nothing():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    step = jax.jit(lambda x: (x @ x).sum())
    assert communication_of(lambda: step(jnp.ones((8, 8)))) is None
