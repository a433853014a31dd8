"""The Triton kernel of `triton_w4a4.py`: block-scaled products of packed codes. Imports Triton.

Triton's interpreter decodes the E4M3 scales of `dot_scaled` as if they were E8M0. There, INTERPRET multiplies NVFP4
codes by their scales first and then each other, in float32; MXFP4 goes through `dot_scaled` there too.

M rows of a tile, N output axis, K contraction axis, S = K / BLOCK scales, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.grouped_matmul.triton_w4a16_kernel import (
    finished,
    load,
    scaled_weights,
    tile_of,
)


@triton.jit
def product(
    x_codes,
    x_scales,
    w_codes,
    w_scales,
    acc_MN,
    BLOCK: tl.constexpr,
    E4M3: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """acc + (x_codes * x_scales) @ (w_codes * w_scales)^T; codes uint8 [M, K / 2] and [N, K / 2]."""
    if not E4M3:
        return tl.dot_scaled(x_codes, x_scales, "e2m1", tl.trans(w_codes), w_scales, "e2m1", acc_MN)
    if INTERPRET:
        x_MK = scaled_weights(x_codes, x_scales, BLOCK, E4M3, tl.bfloat16, INTERPRET)
        w_NK = scaled_weights(w_codes, w_scales, BLOCK, E4M3, tl.bfloat16, INTERPRET)
        return tl.dot(x_MK, tl.trans(w_NK), acc_MN)
    x_scales = x_scales.to(tl.float8e4nv, bitcast=True)
    w_scales = w_scales.to(tl.float8e4nv, bitcast=True)
    return tl.dot_scaled(x_codes, x_scales, "e2m1", tl.trans(w_codes), w_scales, "e2m1", acc_MN)


@triton.jit
def w4a4(
    x_codes,
    x_scales,
    codes,
    scales,
    expert_scale,
    row_scale,
    bias,
    schedule,
    y,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    E4M3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of y = cast((x @ w^T) * (expert_scale * row_scale) + bias); zeros for expert E."""
    expert, block, first, rows, column = tile_of(schedule, NUM_TILES, tl.cdiv(N, BLOCK_N), GROUP)
    rows_M = tl.arange(0, BLOCK_M)
    live_M = (rows_M >= first) & (rows_M < first + rows)
    outputs_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = outputs_N < N
    row = block.to(tl.int64) * BLOCK_M
    y += row * N + rows_M[:, None] * N + outputs_N[None, :]
    mask_MN = live_M[:, None] & inside_N[None, :]
    if expert == E:  # rows that belong to nobody
        tl.store(y, tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty), mask=mask_MN)
        return
    x_codes += row * (K // 2)
    x_scales += row * (K // BLOCK)
    weight = expert.to(tl.int64) * N
    codes += weight * (K // 2)
    scales += weight * (K // BLOCK)
    EVEN: tl.constexpr = K % BLOCK_K == 0
    pairs_K = tl.arange(0, BLOCK_K // 2)
    blocks_S = tl.arange(0, BLOCK_K // BLOCK)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x_MP = load(x_codes, rows_M, k // 2 + pairs_K, K // 2, live_M, EVEN)
        x_MS = load(x_scales, rows_M, k // BLOCK + blocks_S, K // BLOCK, live_M, EVEN)
        w_NP = load(codes, outputs_N, k // 2 + pairs_K, K // 2, inside_N, EVEN)
        w_NS = load(scales, outputs_N, k // BLOCK + blocks_S, K // BLOCK, inside_N, EVEN)
        acc_MN = product(x_MP, x_MS, w_NP, w_NS, acc_MN, BLOCK, E4M3, INTERPRET)
    y_MN = finished(
        acc_MN, expert, row, outputs_N, expert_scale, row_scale, bias, live_M, inside_N, N
    )
    tl.store(y, y_MN.to(y.dtype.element_ty), mask=mask_MN)
