"""Least times that physics allows: of an expert layer, a matrix product, an exchange, a decoding step.

A measured time below them is impossible: bytes over the peak bandwidth, FLOPs over the dense peak, bytes over the link.
Bandwidths are the highest of the values that circulate, peaks the dense ones; rows are arrays.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from moelab.plan.hardware import Gpu
from moelab.plan.recipes import BITS

CACHED = 200e6  # bytes: weights below it may come from the second-level cache, and are not judged by bandwidth
TOLERANCE = 0.03  # of a measured time
# moe_dtype or gemm_dtype of the tables -> (bits of a weight, precision that multiplies)
DTYPES = {
    "bfloat16": (16.0, "bf16"),
    "float16": (16.0, "bf16"),
    "fp8": (8.0, "fp8"),
    "fp8_block": (8.0, "fp8"),
    "fp8_static": (8.0, "fp8"),
    "nvfp4": (BITS["nvfp4"], "fp4"),
    "w4a8_mxfp4_mxfp8": (BITS["mxfp4"], "fp8"),
    "w4a8_mxfp4_fp8": (BITS["mxfp4"], "fp8"),
    "w4a16_mxfp4": (BITS["mxfp4"], "bf16"),
    "w4a16_nvfp4": (BITS["nvfp4"], "bf16"),
    "w4afp8": (4.0, "fp8"),
    "int4_wo": (4.0, "bf16"),
    "int8_wo": (8.0, "fp8"),  # INT8 tensor cores are as fast as FP8 ones on Hopper
}
FALSE_POSITIVES = (
    "non-gated experts: two matrices, not three (kernels named 'nongated', Nemotron's shapes), 2/3 of the bytes",
    "group-limited routing: random logits reach the experts of the chosen groups, 4 of 8 groups, half of the experts",
    "balanced by chance: few tokens with random logits touch E (1 - (1 - k/E)^T) experts, less two standard "
    "deviations of the draw, not min(E, T k)",
    "weight-only kernels (w4a16, int4): few bits are read, bfloat16 is multiplied; int8_wo may multiply in INT8",
    f"weights below {CACHED / 1e6:.0f} MB: they may stay in the cache between runs, and are judged by FLOPs alone",
    "skewed distributions: an unknown number of experts is touched; their bytes are those of k experts",
)


def bandwidth(gpu: Gpu) -> float:
    """Returns the highest bandwidth that anyone states for a GPU."""
    return max([gpu.bandwidth.value, *(value for value, _ in gpu.bandwidth.others)])


@dataclasses.dataclass(frozen=True)
class Least:
    """Least times of rows and what sets them, (n,).

    Attributes:
      seconds: the larger of the two.
      bytes_seconds, flops_seconds: each.
      reason: "bytes" or "FLOPs", per row.
    """

    bytes_seconds: np.ndarray
    flops_seconds: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        return np.maximum(self.bytes_seconds, self.flops_seconds)

    @property
    def reason(self) -> np.ndarray:
        return np.where(self.bytes_seconds >= self.flops_seconds, "bytes", "FLOPs")


def experts(gpu: Gpu, dtype: str, shape: dict[str, np.ndarray], balanced, matrices) -> Least:
    """Bounds an expert layer on one rank.

    Args:
      shape: num_tokens, hidden_size, inter_size, topk, num_experts, moe_tp_size, moe_ep_size and `touchable`, the share
        of the experts that routing can reach.
      balanced: whether all experts are equally likely.
      matrices: of an expert, 2 or 3.
    """
    bits, precision = DTYPES[dtype]
    s = {name: np.asarray(value, float) for name, value in shape.items()}
    one = matrices * s["hidden_size"] * s["inter_size"] / s["moe_tp_size"]
    assignments = s["num_tokens"] * s["topk"]
    reachable = s["num_experts"] * s["touchable"]
    chance = 1 - np.minimum(s["topk"] / reachable, 1 - 1e-9)
    hit = 1 - chance ** s["num_tokens"]
    spread = reachable * hit - 2 * np.sqrt(reachable * hit * (1 - hit))  # a lucky draw
    spread = np.maximum(spread, s["topk"])
    touched = np.where(balanced, spread, s["topk"]) / s["moe_ep_size"]
    size = touched * one * bits / 8
    size = np.where(size > CACHED, size, 0.0)
    # Under a skew the busiest rank was measured, which has more; an average one is the least.
    flops = 2 * assignments / s["moe_ep_size"] * one
    return Least(size / bandwidth(gpu), flops / gpu.peak(precision))


def product(gpu: Gpu, dtype: str, m, n, k) -> Least:
    """Bounds y_mn = x_mk w_nk."""
    bits, precision = DTYPES[dtype]
    m, n, k = (np.asarray(x, float) for x in (m, n, k))
    size = n * k * bits / 8
    size = np.where(size > CACHED, size, 0.0)
    return Least(size / bandwidth(gpu), 2 * m * n * k / gpu.peak(precision))


def exchange(gpu: Gpu, tokens, hidden, ranks, nodes, size) -> np.ndarray:
    """Bounds dispatch or combine: a token whose expert is elsewhere leaves once at least.

    With experts at random a token stays at home with probability 1/ranks.

    Args:
      size: bytes of an element.
    """
    tokens, hidden, ranks, nodes = (np.asarray(x, float) for x in (tokens, hidden, ranks, nodes))
    inside = tokens * hidden * size * (1 - 1 / ranks) / gpu.nvlink.value
    outside = tokens * hidden * size * (1 - 1 / nodes) / gpu.nic.value
    return np.where((nodes > 1) & (ranks > gpu.domain.value), outside, inside)
