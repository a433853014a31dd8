"""The feed-forward of experts in 4 bits on data-centre Blackwell: gate, up, SwiGLU and requantization in one kernel.

A tile multiplies its rows with 128 rows of gate and the same 128 of up, two boxes of weights side by side. A thread of
the epilogue holds a row: it finds the maxima of its blocks itself, and the layer between the two products is written as
codes. sigmoid(x) = 1 / (1 + exp(-x)) in float32: `ex2.approx.ftz` of x * -log2(e), and `rcp.approx.ftz`.

A dynamic global scale of NVFP4 is not possible, since no tile sees a whole row: it comes calibrated, per expert. Scales
leave the kernel in tiles of their own for each tile of rows, so that experts may share a block of 128 rows; XLA gathers
them to one tile for each block, an eighth of the bytes of the codes.

Compiled for sm_100 and sm_103 and run in interpret mode; not yet run on hardware.

T rows sorted by expert, D model width, F expert width, E experts, I tiles of rows, L 128 rows of a tile, C = scales of
a row / 4, W columns of a chunk, B elements of a block.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import FORMATS, BlockScaled, global_scale
from pallas_kernels.grouped_matmul import mosaic_sm100 as plain
from pallas_kernels.grouped_matmul import mosaic_sm100_loop as main_loop
from pallas_kernels.grouped_matmul import mosaic_sm100_mlp_epilogue as epilogue
from pallas_kernels.grouped_matmul import tiles
from pallas_kernels.grouped_matmul.activation import SWIGLU, SwiGLU
from pallas_kernels.grouped_matmul.mosaic_sm100 import Tiling
from pallas_kernels.grouped_matmul.mosaic_sm100_mlp_epilogue import TILE_F
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import TILE_M

__all__ = [
    "Tiling",
    "default_tiling",
    "expert_mlp_codes",
    "gate_up_swiglu_codes",
    "gate_up_swiglu_quantized",
]

_FORMATS = ("nvfp4", "mxfp4")
_LANE = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    approx_math=True,  # of exp alone: the other operations are the same
)


def default_tiling(format: str) -> Tiling:
    """Returns a tiling of `gate_up_swiglu_codes` and `gate_up_swiglu_quantized` that fits every shape they take."""
    return Tiling(tile_n=2 * TILE_F, accumulators=1, stages=3)


def gate_up_swiglu_codes(
    x: BlockScaled,
    gate_up: BlockScaled,
    group_sizes_E: jax.Array,
    *,
    expert_scale_E: jax.Array,
    row_scale_T: jax.Array | None = None,
    row_weight_T: jax.Array | None = None,
    bias_EG: jax.Array | None = None,
    activation: SwiGLU = SWIGLU,
    out_dtype: jnp.dtype,
    tiling: Tiling,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Multiplies packed rows with gate and up, and applies the activation; zero beyond the groups.

        hidden[t] = (sum_d (code * scale)(x[t, d]) * (code * scale)(gate_up[e, :, d]))
                    * (expert_scale[e] * row_scale[t]) + bias[e]
        act[t, f] = cast(activation(hidden[t])[f] * row_weight[t])                       e = e(t), all in float32

    Args:
      x: (T, D), as in `mosaic_sm100.grouped_matmul_codes`.
      gate_up: (E, 2F, D), gate rows first, F a multiple of 128.
      group_sizes_E: int32.
      expert_scale_E: float32.
      row_scale_T: float32, or None for 1.
      row_weight_T: float32, or None for 1.
      bias_EG: (E, 2F) float, or None.
      activation: SwiGLU with any constants.
      out_dtype: bfloat16 or float32.
      tiling: tile_n = 256 and not collective. Stores have rows of 128 bytes whatever epilogue_n.
      num_sms: streaming multiprocessors to use.
      interpret: parameters of interpret mode, or None for a GPU.

    Returns:
      out_dtype (T, F).

    Raises:
      ValueError: shapes, formats or dtypes that do not go together, or a tiling that does not fit.
    """
    out_dtype = jnp.dtype(out_dtype)
    rows = (row_scale_T, row_weight_T)
    _check(x, gate_up, group_sizes_E, expert_scale_E, rows, bias_EG, out_dtype, tiling, num_sms)
    num_rows, width = x.shape[0], gate_up.shape[1] // 2
    if not num_rows or not width:
        return jnp.zeros((num_rows, width), out_dtype)
    in_chunks = (num_rows, width // epilogue.CHUNK, epilogue.CHUNK)
    (act,) = _run(
        (x, gate_up, group_sizes_E, expert_scale_E, rows, bias_EG),
        (jax.ShapeDtypeStruct(in_chunks, out_dtype),),
        {"out": epilogue.act_buffers(out_dtype)},
        functools.partial(epilogue.store_act, activation=activation),
        (tiling, num_sms, interpret),
    )
    return act.reshape(num_rows, width)


def gate_up_swiglu_quantized(
    x: BlockScaled,
    gate_up: BlockScaled,
    group_sizes_E: jax.Array,
    *,
    expert_scale_E: jax.Array,
    row_scale_T: jax.Array | None = None,
    row_weight_T: jax.Array | None = None,
    bias_EG: jax.Array | None = None,
    activation: SwiGLU = SWIGLU,
    format: str,
    rule: str | None = None,
    act_amax_E: jax.Array | None = None,
    tiling: Tiling,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> BlockScaled:
    """As `gate_up_swiglu_codes`, with act quantized from float32 before it leaves the kernel.

        result = formats.quantize(act, format, rule=rule, num_batch_axes=1, global_amax=act_amax[e(t)])

    Args:
      x, gate_up, group_sizes_E, expert_scale_E, row_scale_T, row_weight_T, bias_EG, activation, tiling, num_sms,
        interpret: as there.
      format: "nvfp4" or "mxfp4", whatever the operands are.
      rule: scale rule; None is the format's first.
      act_amax_E: float32, calibrated largest magnitude of act for each expert (NVFP4). Blocks above it saturate.

    Returns:
      BlockScaled (T, F), layout "tcgen05". Beyond the groups codes, scales and global_amax are zero.

    Raises:
      ValueError: as there; a format or rule that there is not; act_amax_E given or missing where it should not be.
    """
    rows = (row_scale_T, row_weight_T)
    operands = (x, gate_up, group_sizes_E, expert_scale_E, rows, bias_EG)
    _check(*operands, jnp.dtype(jnp.bfloat16), tiling, num_sms)
    rule = _checked_rule(format, rule, act_amax_E, expert_scale_E)
    num_rows, width = x.shape[0], gate_up.shape[1] // 2
    schedule = tiles.schedule(group_sizes_E, num_rows, TILE_M)
    lines = width // (4 * FORMATS[format].block)
    words = TILE_F // (4 * FORMATS[format].block)
    codes_TF, word_ICQ4 = _run(
        operands,
        (
            jax.ShapeDtypeStruct((num_rows, width), jnp.float4_e2m1fn),
            jax.ShapeDtypeStruct((schedule.expert_I.shape[0], lines, 32, 4), jnp.int32),
        ),
        {
            # Twice the rows, so that a tile's first row, wherever it is, lies where a copy may begin.
            "codes": plgpu.SMEM((2 * TILE_M, TILE_F), jnp.float4_e2m1fn),
            "words": plgpu.SMEM((words, TILE_M), jnp.int32),
            "atoms": plgpu.SMEM((words, 32, 4), jnp.int32),
        },
        functools.partial(epilogue.store_codes, activation=activation, format=format, rule=rule),
        (tiling, num_sms, interpret),
        () if act_amax_E is None else (act_amax_E,),
    )
    tile_T, amax_T = _tile_of_row(schedule, group_sizes_E, num_rows), None
    if act_amax_E is not None:
        amax_T = jnp.where(tile_T >= 0, act_amax_E[schedule.expert_I[tile_T]], jnp.float32(0))
    pairs = codes_TF.reshape(num_rows, width // 2, 2)
    return BlockScaled(
        codes=lax.bitcast_convert_type(pairs, jnp.uint8),
        scales=_by_block(word_ICQ4, tile_T),
        global_amax=amax_T,
        format=format,
        rule=rule,
        layout="tcgen05",
    )


def expert_mlp_codes(
    x: BlockScaled,
    gate_up: BlockScaled,
    down: BlockScaled,
    group_sizes_E: jax.Array,
    *,
    gate_up_scale_E: jax.Array,
    down_scale_E: jax.Array,
    row_scale_T: jax.Array | None = None,
    row_weight_T: jax.Array | None = None,
    bias_EG: jax.Array | None = None,
    activation: SwiGLU = SWIGLU,
    act_rule: str | None = None,
    act_amax_E: jax.Array | None = None,
    out_dtype: jnp.dtype,
    tiling: tuple[Tiling, Tiling],
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """y[t] = weight[t] * down(quantize(act(gate_up(x[t])))); the layer between never leaves 4 bits.

    act is quantized from float32; `quantized.expert_mlp` casts it to the dtype of x first.

    Args:
      x, gate_up, group_sizes_E, row_scale_T, bias_EG, activation, act_amax_E, num_sms, interpret: as in
        `gate_up_swiglu_quantized`.
      down: (E, D, F), of x's kind of block and scales; act is quantized to "nvfp4" or "mxfp4" accordingly.
      gate_up_scale_E, down_scale_E: float32, global scales of the weights, 1 for MXFP4.
      row_weight_T: float32, the combine weight of each row, at inference; it multiplies sums of down, before the cast.
      act_rule: scale rule of act.
      out_dtype: bfloat16 or float32.
      tiling: of gate and up, and of down, which may be collective.

    Returns:
      out_dtype (T, D); zero beyond the groups.
    """
    act = gate_up_swiglu_quantized(
        x,
        gate_up,
        group_sizes_E,
        expert_scale_E=gate_up_scale_E,
        row_scale_T=row_scale_T,
        bias_EG=bias_EG,
        activation=activation,
        format="nvfp4" if FORMATS[down.format].scale == "e4m3" else "mxfp4",
        rule=act_rule,
        act_amax_E=act_amax_E,
        tiling=tiling[0],
        num_sms=num_sms,
        interpret=interpret,
    )
    factor_T = global_scale(act)
    if row_weight_T is not None:
        factor_T = row_weight_T if factor_T is None else factor_T * row_weight_T
    return plain.grouped_matmul_codes(
        act,
        down,
        group_sizes_E,
        expert_scale_E=down_scale_E,
        row_scale_T=factor_T,
        out_dtype=out_dtype,
        tiling=tiling[1],
        num_sms=num_sms,
        interpret=interpret,
    )


def _check(
    x, gate_up, group_sizes_E, expert_scale_E, rows, bias_EG, out_dtype, tiling, num_sms
) -> None:
    if tiling.tile_n != 2 * TILE_F or tiling.collective:
        raise ValueError(f"needs tile_n = {2 * TILE_F} and collective = False, got {tiling}")
    if gate_up.ndim == 3 and gate_up.shape[1] % (2 * TILE_F):
        raise ValueError(
            f"F must be a multiple of {TILE_F}, got gate_up {gate_up.shape}: pad gate and up when they are loaded"
        )
    shared = (x, gate_up, group_sizes_E, expert_scale_E)
    for row_T in rows:
        plain.check(*shared, row_T, bias_EG, out_dtype, tiling, num_sms)
    # 128 bytes of every row in each of two buffers, whatever leaves; 2 KiB more than codes and their scales need.
    stored = dataclasses.replace(tiling, epilogue_n=epilogue.CHUNK)
    stored.check_budgets(gate_up.format, jnp.dtype(jnp.float32))


def _checked_rule(format: str, rule: str | None, act_amax_E, expert_scale_E) -> str:
    if format not in _FORMATS:
        raise ValueError(f"quantizes to {' or '.join(_FORMATS)}, not to {format!r}")
    rules = FORMATS[format].rules
    if rule is not None and rule not in rules:
        raise ValueError(f"unknown rule {rule!r} for format {format}; allowed: {', '.join(rules)}")
    if (act_amax_E is None) == (FORMATS[format].scale == "e4m3"):
        raise ValueError(
            f"act_amax_E is for NVFP4, which needs it: got {format} and {type(act_amax_E).__name__}"
        )
    shape = expert_scale_E.shape
    if act_amax_E is not None and (act_amax_E.shape != shape or act_amax_E.dtype != jnp.float32):
        raise ValueError(
            f"act_amax_E must be float32 {shape}, got {act_amax_E.dtype} {act_amax_E.shape}"
        )
    return rules[0] if rule is None else rule


def _run(operands, out_type, scratch, store, how, extra=()) -> tuple[jax.Array, ...]:
    """Launches the main loop with an epilogue over both boxes."""
    x, gate_up, group_sizes_E, expert_scale_E, rows, bias_EG = operands
    tiling, num_sms, interpret = how
    num_rows, width = x.shape[0], gate_up.shape[1] // 2
    used = jnp.minimum(jnp.sum(group_sizes_E, dtype=jnp.int32), num_rows)
    inputs = [used.reshape(1), expert_scale_E]
    inputs += [jnp.pad(row_T, (0, -num_rows % TILE_M)) for row_T in rows if row_T is not None]
    inputs += [] if bias_EG is None else [bias_EG]
    what = main_loop.Epilogue(
        inputs=(*inputs, *extra),
        out_type=out_type,
        scratch=scratch,
        num_columns=width // TILE_F,
        boxes=lambda column: (column * TILE_F, width + column * TILE_F),
        store=functools.partial(store, given=tuple(a is not None for a in (*rows, bias_EG))),
        finish=epilogue.zero_the_rest,
    )
    return main_loop.run(
        plain.operands(x, gate_up, TILE_M),
        tiles.schedule(group_sizes_E, num_rows, TILE_M),
        what,
        tiling,
        format=gate_up.format,
        num_sms=num_sms,
        name=f"gate_up_swiglu_{gate_up.format}",
        interpret=interpret,
        compiler_params=_LANE,
    )


def _tile_of_row(schedule: tiles.Tiles, group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Which tile a row is stored from, int32 (T,), -1 beyond the groups."""
    row_T = jnp.arange(num_rows, dtype=jnp.int32)
    index_I = jnp.arange(schedule.expert_I.shape[0], dtype=jnp.int32)
    start_I = schedule.block_I * TILE_M + schedule.first_row_I
    begun_TI = (start_I[None, :] <= row_T[:, None]) & (index_I < schedule.count)[None, :]
    tile_T = jnp.sum(begun_TI, axis=1, dtype=jnp.int32) - 1
    return jnp.where(row_T < jnp.sum(group_sizes_E), tile_T, -1)


def _by_block(word_ICQ4: jax.Array, tile_T: jax.Array) -> jax.Array:
    """Gathers a tile of scales for each block of 128 rows: uint8 (ceil(T / 128), C, 32, 16), zero beyond the groups."""
    tile_T = jnp.pad(tile_T, (0, -tile_T.shape[0] % TILE_M), constant_values=-1)
    tile_R1Q4 = tile_T.reshape(-1, 1, 4, 32).swapaxes(2, 3)
    _, num_lines, *atom = word_ICQ4.shape
    line, row, quarter = jnp.ogrid[:num_lines, : atom[0], : atom[1]]
    word_RCQ4 = word_ICQ4[tile_R1Q4, line[None], row[None], quarter[None]]
    word_RCQ4 = jnp.where(tile_R1Q4 >= 0, word_RCQ4, 0)
    scales = lax.bitcast_convert_type(word_RCQ4, jnp.uint8)
    return scales.reshape(*word_RCQ4.shape[:2], 32, 16)
