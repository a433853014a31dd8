"""The Triton kernel of `triton_w4a16.py`, and how it decodes 4-bit codes and their scales. Imports Triton.

Decoding is exact. E2M1 has two significant bits and E4M3 four, so their product has at most six: bfloat16 (eight) and
float16 (eleven) hold it, and it is rounded nowhere. E8M0 is a power of two, so in bfloat16, which has the exponents of
float32, the product overflows and underflows where the float32 one does (subnormals are kept, down to 2^-128).
Triton's interpreter computes bfloat16 wrongly: there, INTERPRET does the same steps on the same bits in float32.

M rows of a tile, N output axis, K contraction axis, S = K / BLOCK scales, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_float(bits, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """The float16 or bfloat16 that uint16 bits are."""
    if INTERPRET and DTYPE == tl.bfloat16:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def e2m1(bytes, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Decodes uint8 [N, K / 2] to [N, K], low nibble first.

    E2M1 is laid out like the exponent and mantissa fields of a wider float, subnormal included, so moving the three
    bits gives the value but for the difference of the biases, a power of two. Both nibbles of a byte are moved at once
    (byte * 0x1001 has them 16 bits apart), which leaves them where the two halves of a register belong.
    """
    if DTYPE == tl.float16:
        SHIFT: tl.constexpr = 9
        UNBIAS: tl.constexpr = 2.0**14
    else:
        SHIFT: tl.constexpr = 6
        UNBIAS: tl.constexpr = 2.0**126
    word = bytes.to(tl.uint32)
    magnitude = (word * (0x1001 << SHIFT)) & (0x00070007 << SHIFT)
    both = magnitude | ((word * (0x1001 << 12)) & 0x80008000)
    low = as_float((both & 0xFFFF).to(tl.uint16), DTYPE, INTERPRET)
    high = as_float((both >> 16).to(tl.uint16), DTYPE, INTERPRET)
    return tl.interleave(low, high) * UNBIAS


@triton.jit
def e4m3(byte):
    """Decodes uint8 to float32: a float16's fields with another bias, sign and subnormals included; 0x7f is NaN."""
    wide = byte.to(tl.uint16)
    half = (((wide & 0x7F) << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True)
    value = half.to(tl.float32) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e8m0(byte, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Decodes uint8 to bfloat16: the exponent field itself, but for 0, 2^-127, a subnormal, and 255, NaN."""
    field = byte.to(tl.uint16) << 7
    field = tl.where(byte == 0, 0x0040, field)
    field = tl.where(byte == 255, 0x7FC0, field)
    return as_float(field.to(tl.uint16), DTYPE, INTERPRET)


@triton.jit
def scaled_weights(
    codes,
    scales,
    BLOCK: tl.constexpr,
    E4M3: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """code * scale, exactly: uint8 [N, K / 2] and [N, S] to DTYPE [N, K]."""
    value_NK = e2m1(codes, DTYPE, INTERPRET)
    if E4M3:
        scale_NS = e4m3(scales).to(value_NK.dtype)
    else:
        scale_NS = e8m0(scales, DTYPE, INTERPRET)
    blocks: tl.constexpr = (scales.shape[0], scales.shape[1], BLOCK)
    value = tl.reshape(value_NK, blocks) * scale_NS[:, :, None]
    return tl.reshape(value, (scales.shape[0], scales.shape[1] * BLOCK))


@triton.jit
def load(pointer, rows, columns, width: tl.constexpr, row_mask, EVEN: tl.constexpr):
    """A tile of a row-major matrix of `width` columns, zeros where rows are masked or columns beyond the width."""
    mask = row_mask[:, None]
    if not EVEN:
        mask = mask & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * width + columns[None, :], mask=mask, other=0)


@triton.jit
def tile_of(schedule, NUM_TILES: tl.constexpr, NUM_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Which tile a program computes: expert, block of rows, first row in it, number of rows, block of columns.

    GROUP tiles go through all columns before the next ones, one column after the other, so that the rows of the group
    and the weights of the column are read from the cache.
    """
    program = tl.program_id(0)
    tile, column = tl.swizzle2d(
        program // NUM_COLUMNS, program % NUM_COLUMNS, NUM_TILES, NUM_COLUMNS, GROUP
    )
    expert = tl.load(schedule + tile)
    block = tl.load(schedule + NUM_TILES + tile)
    first = tl.load(schedule + 2 * NUM_TILES + tile)
    rows = tl.load(schedule + 3 * NUM_TILES + tile)
    return expert, block, first, rows, column


@triton.jit
def finished(
    acc_MN,
    expert,
    row,
    outputs_N,
    expert_scale,
    row_scale,
    bias,
    live_M,
    inside_N,
    N: tl.constexpr,
):
    """acc * (expert_scale * row_scale) + bias in float32; `row` is the tile's first one."""
    factor = tl.load(expert_scale + expert)
    if row_scale is None:
        y_MN = acc_MN * factor
    else:
        rows_M = tl.arange(0, acc_MN.shape[0])
        factor_M = factor * tl.load(row_scale + row + rows_M, mask=live_M, other=0.0)
        y_MN = acc_MN * factor_M[:, None]
    if bias is not None:
        offset = expert.to(tl.int64) * N
        bias_N = tl.load(bias + offset + outputs_N, mask=inside_N, other=0.0)
        y_MN += bias_N.to(tl.float32)[None, :]
    return y_MN


@triton.jit
def w4a16(
    x,
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
    """One tile of y = cast((x @ (codes * scales)^T) * (expert_scale * row_scale) + bias); zeros for expert E."""
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
    x += row * K
    weight = expert.to(tl.int64) * N
    codes += weight * (K // 2)
    scales += weight * (K // BLOCK)
    EVEN: tl.constexpr = K % BLOCK_K == 0
    inputs_K = tl.arange(0, BLOCK_K)
    pairs_K = tl.arange(0, BLOCK_K // 2)
    blocks_S = tl.arange(0, BLOCK_K // BLOCK)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A step's scales are few bytes, too few for asynchronous copies, so they are loaded one step ahead.
    next_NS = load(scales, outputs_N, blocks_S, K // BLOCK, inside_N, False)
    for k in range(0, K, BLOCK_K):
        scales_NS = next_NS
        ahead_S = (k + BLOCK_K) // BLOCK + blocks_S
        next_NS = load(scales, outputs_N, ahead_S, K // BLOCK, inside_N, False)
        x_MK = load(x, rows_M, k + inputs_K, K, live_M, EVEN)
        codes_N = load(codes, outputs_N, k // 2 + pairs_K, K // 2, inside_N, EVEN)
        w_NK = scaled_weights(codes_N, scales_NS, BLOCK, E4M3, x.dtype.element_ty, INTERPRET)
        acc_MN = tl.dot(x_MK.to(w_NK.dtype), tl.trans(w_NK), acc_MN)
    y_MN = finished(
        acc_MN, expert, row, outputs_N, expert_scale, row_scale, bias, live_M, inside_N, N
    )
    tl.store(y, y_MN.to(y.dtype.element_ty), mask=mask_MN)
