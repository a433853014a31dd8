"""Quantizes rows to packed FP4 codes and tensor-core scales in one pass, on data-centre Blackwell, in Mosaic GPU.

Every block of 128 threads takes groups of a few rows: each warp copies its own rows ahead through a ring of shared
memory, a thread quantizes a line of four blocks, codes go back row by row, and the group's scales at its end, 16 bytes
or more side by side. Where the kernel finds the global scale of a row, the row stays in shared memory until its
maximum is known, so that it is read once.

Compiled for sm_100 and sm_103 and run in interpret mode; not yet run on hardware.

T tokens, N rows of the output, K contraction axis.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import private_jax
from pallas_kernels.formats import FORMATS, BlockScaled, elements
from pallas_kernels.quantize import mosaic_sm100_kernel as kernel
from pallas_kernels.quantize.tiling import ATOM_ROWS, Plan, Tiling, fitted

__all__ = ["Tiling", "plan_for", "quantize_rows", "unsupported"]

_FORMATS = ("nvfp4", "mxfp4")
_WARP = 32


def quantize_rows(
    x_TK: jax.Array,
    format: str,
    *,
    rule: str,
    token_N: jax.Array | None = None,
    amax_N: jax.Array | None = None,
    hadamard: int | None = None,
    key: jax.Array | None = None,
    tiling: Tiling | None = None,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> BlockScaled:
    """Quantizes as `quantize.quantize_rows` says, which checks the arguments.

    Random bits of stochastic rounding are drawn by XLA beside the kernel, as `formats` draws them: 6 bytes of
    temporary memory an element, of which the kernel reads 2.

    Args:
      x_TK, format, rule, token_N, amax_N, hadamard, key: as there.
      tiling: sizes, or None for those that fit.
      num_sms: streaming multiprocessors to use.
      interpret: parameters of interpret mode, or None for a GPU.
    """
    plan = plan_for(
        x_TK,
        format,
        rule=rule,
        token_N=token_N,
        amax_N=amax_N,
        hadamard=hadamard,
        key=key,
        tiling=tiling,
    )
    pieces = (plan.lines, plan.pieces, plan.piece)
    inputs = {"x_g": x_TK.reshape(-1, *pieces)}
    if token_N is not None:
        inputs["token_g"] = token_N.astype(jnp.int32)
    if plan.has_global and not plan.finds_amax:
        inputs["amax_g"] = amax_N
    if key is not None:
        random = elements.random_bits(key, (plan.num_rows, plan.depth)).astype(jnp.uint16)
        inputs["random_g"] = random.reshape(-1, *pieces)
    out = _call(plan, inputs, num_sms, interpret)
    pairs = out["codes_g"].reshape(plan.num_rows, plan.depth // 2, 2)
    scales = lax.bitcast_convert_type(out["scales_g"], jnp.uint8)
    return BlockScaled(
        codes=lax.bitcast_convert_type(pairs, jnp.uint8),
        scales=scales.reshape(*scales.shape[:2], _WARP, 16),
        global_amax=out["amax_g"] if plan.finds_amax else inputs.get("amax_g"),
        format=format,
        rule=rule,
        layout="tcgen05",
    )


def unsupported(x_TK: jax.Array | jax.ShapeDtypeStruct, format: str, **options) -> str | None:
    """Says why the kernel cannot do what `quantize_rows` is asked for, on any GPU; None if it can."""
    if format not in _FORMATS:
        return f"mosaic_sm100 quantizes to {' and '.join(_FORMATS)}, not to {format}"
    if options["hadamard"] not in (None, 16):
        return f"mosaic_sm100 transforms blocks of 16, not of {options['hadamard']}"
    line = 4 * FORMATS[format].block
    if not x_TK.shape[1] or x_TK.shape[1] % line:
        return f"mosaic_sm100 needs K a multiple of {line} for {format}, got {x_TK.shape[1]}"
    try:
        plan = plan_for(x_TK, format, **options)
    except ValueError as error:
        return f"mosaic_sm100 needs rows that fit in shared memory, or amax_N: {error}"
    if not plan.num_rows or not plan.num_tokens:
        return "mosaic_sm100 needs at least one row"
    return None


def plan_for(
    x_TK: jax.Array | jax.ShapeDtypeStruct,
    format: str,
    *,
    rule: str,
    token_N: jax.Array | None = None,
    amax_N: jax.Array | None = None,
    hadamard: int | None = None,
    key: jax.Array | None = None,
    tiling: Tiling | None = None,
) -> Plan:
    """Returns the plan of a call of `quantize_rows`; of arrays, shapes and dtypes are read.

    Raises:
      ValueError: a tiling that does not fit; rows too long for shared memory.
    """
    plan = Plan(
        format=format,
        rule=rule,
        num_rows=(x_TK if token_N is None else token_N).shape[0],
        num_tokens=x_TK.shape[0],
        depth=x_TK.shape[1],
        dtype=jnp.dtype(x_TK.dtype),
        gathers=token_N is not None,
        finds_amax=FORMATS[format].scale == "e4m3" and amax_N is None,
        hadamard=hadamard is not None,
        draws=key is not None,
        tiling=tiling or Tiling(32, 1, 1),
    )
    plan = fitted(plan) if tiling is None else plan
    plan.check()
    return plan


def _call(plan: Plan, inputs: dict, num_sms: int, interpret) -> dict:
    """Runs the kernel; returns its outputs by the names of `kernel.Refs`."""
    if interpret is not None:
        private_jax.compile_interpreted_threads_once()
    row = (plan.lines, plan.line)
    tiles = -(-plan.num_rows // ATOM_ROWS)
    out = {
        "codes_g": jax.ShapeDtypeStruct((plan.num_rows, *row), jnp.float4_e2m1fn),
        "scales_g": jax.ShapeDtypeStruct((tiles, plan.lines, _WARP, 4), jnp.int32),
    }
    if plan.finds_amax:
        out["amax_g"] = jax.ShapeDtypeStruct((plan.num_rows,), jnp.float32)
    names = (*inputs, *out)
    ctas = min(num_sms * plan.tiling.ctas_per_sm, plan.groups)

    def body(*refs, **scratch):
        kernel.run(kernel.Refs(**dict(zip(names, refs, strict=True)), **scratch), plan, ctas)

    found = plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        scratch_types=kernel.scratch(plan),
        grid=(ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=f"quantize_{plan.format}",
        interpret=interpret,
    )(*inputs.values())
    return dict(zip(out, found, strict=True))
