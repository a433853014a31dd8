"""Packed experts on data-centre Blackwell, from tokens to weighted outputs in three kernels: inference.

    codes of the rows, gathered by the routing     `quantize`
    gate and up, SwiGLU, and codes of its result   `mosaic_sm100_mlp`; in bfloat16, and then `quantize`, where the scale
                                                   needs the whole row (NVFP4 per token)
    down, times the combine weights                `mosaic_sm100`, or `mosaic_sm100_decode` for few rows

The gradient is that of the unfused composition, which is computed anew for it. Between the layers the fused kernel
quantizes from float32, the unfused one from x's dtype. Not yet run on hardware.

T tokens, N assignments sorted by expert, D model width, F expert width, E experts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import device, formats, private_shard_map
from pallas_kernels.grouped_matmul import kernels, operands
from pallas_kernels.grouped_matmul.activation import SwiGLU
from pallas_kernels.grouped_matmul.precision import Bias, MlpPrecision, Weight

_SCALES = ("per_token", "static")
_F_MULTIPLE = 128


def fits(gate_up: Weight, down: Weight, precision: MlpPrecision, layers: tuple) -> bool:
    """Whether the three kernels compute these experts: both packed, both layers W4A4 on sm_10x, scales a row's own."""
    packed = isinstance(gate_up, formats.BlockScaled) and isinstance(down, formats.BlockScaled)
    names = [kernel.name for kernel in layers if kernel is not None]
    if not packed or names != ["mosaic_sm100"] * 2 or down.shape[2] % _F_MULTIPLE:
        return False
    both = (precision.gate_up, precision.down)
    known = all(p.x in ("nvfp4", "mxfp4") for p in both)
    return known and all(p.x_scale in _SCALES and p.rotation is None and p.dy is None for p in both)


def rows(
    x_TD: jax.Array,
    token_N: jax.Array,
    weight_N: jax.Array,
    gate_up: formats.BlockScaled,
    down: formats.BlockScaled,
    group_sizes_E: jax.Array,
    precision: MlpPrecision,
    x_amax: tuple[jax.Array | None, jax.Array | None],
    activation: SwiGLU,
    bias: Bias,
) -> jax.Array:
    """y[n] = weight[n] * down[e(n)](quantize(act([gate, up]))) of token[n]: float32 (N, D), zero beyond the groups.

    Args:
      x_TD: tokens.
      token_N, weight_N: of the assignments, in sorted order; no weights with a bias of down, which they would miss.
      gate_up, down: packed.
      group_sizes_E: int32.
      precision: `fits`.
      x_amax: calibrated maxima, (E,) each, where scales are static.
      activation: between the layers.
      bias: (E, 2F) of gate and up, (E, D) of down, or None.
    """
    call = functools.partial(_kernels, precision, activation, device.current())
    arguments = (x_TD, token_N, weight_N, gate_up, down, group_sizes_E, x_amax, bias)
    return private_shard_map.hidden(call, *arguments)


def _kernels(
    precision, activation, here, x_TD, token_N, weight_N, gate_up, down, sizes_E, x_amax, bias
):
    from pallas_kernels.grouped_matmul import mosaic_sm100_mlp

    f32 = jnp.dtype(jnp.float32)
    shared = dict(num_sms=here.num_sms, interpret=kernels.interpreter())
    x = _quantized(x_TD, token_N, precision.gate_up, sizes_E, x_amax[0])
    swiglu = dict(
        expert_scale_E=_expert_scale(gate_up),
        row_scale_T=formats.global_scale(x),
        bias_EG=bias[0],
        activation=activation,
        tiling=mosaic_sm100_mlp.default_tiling(gate_up.format),
        **shared,
    )
    after = precision.down
    if after.x == "mxfp4" or after.x_scale == "static":
        amax_E = x_amax[1] if after.x == "nvfp4" else None
        act = mosaic_sm100_mlp.gate_up_swiglu_quantized(
            x, gate_up, sizes_E, format=after.x, rule=after.x_rule, act_amax_E=amax_E, **swiglu
        )
    else:
        act_NF = mosaic_sm100_mlp.gate_up_swiglu_codes(
            x, gate_up, sizes_E, out_dtype=jnp.dtype(jnp.bfloat16), **swiglu
        )
        act = _quantized(act_NF, None, after, sizes_E, None)
    scale_N = formats.global_scale(act)
    if weight_N is not None:
        scale_N = weight_N if scale_N is None else scale_N * weight_N
    return kernels.sm100_product(
        act,
        down,
        sizes_E,
        expert_scale_E=_expert_scale(down),
        row_scale_T=scale_N,
        bias_EN=bias[1],
        out_dtype=f32,
        device=here,
        **shared,
    )


def _expert_scale(w: formats.BlockScaled) -> jax.Array:
    scale_E = formats.global_scale(w)
    return jnp.ones(w.shape[0], jnp.float32) if scale_E is None else scale_E


def _quantized(x_TK, token_N, layer, sizes_E, amax_E) -> formats.BlockScaled:
    """Rows gathered and quantized, by the kernel where it runs."""
    from pallas_kernels import quantize

    count = x_TK.shape[0] if token_N is None else token_N.shape[0]
    static = layer.x_scale == "static" and layer.x == "nvfp4"
    return quantize.quantize_rows(
        x_TK,
        layer.x,
        rule=layer.x_rule,
        token_N=token_N,
        amax_N=operands.of_group(amax_E, sizes_E, count) if static else None,
        implementation="xla" if kernels.is_interpreted() else None,
    )
