"""Operands of the weight gradient dw[e] = dy^T x: rows quantized along the tokens, each expert's apart.

A block of `block` tokens lies within one expert, counted from its first row; the last is filled with zeros before it is
transformed and quantized. One function makes the codes (`quantize`). GPU kernels multiply them, in units of 256 tokens
(`widen`), every other backend the float32 values that they stand for (`values`): one definition of the numerics.

T rows sorted by expert, N columns (outputs or inputs), E experts, B units of U tokens, P = B U padded rows,
V wide units of W tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import formats
from pallas_kernels.grouped_matmul.operands import group_of
from pallas_kernels.grouped_matmul.precision import MatmulPrecision

# The signs of the transform of 16 tokens in NVIDIA's recipe: fixed for all layers and steps (arXiv:2509.25149).
_SIGNS_16 = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


class Units(NamedTuple):
    """Each group's rows from its first one on, in units of U rows, the last one filled with zeros.

    Attributes:
      source_P: row at each padded place, T where there is none.
      group_B: group of each unit, E beyond the last.
      sizes_E: padded rows per group.
    """

    source_P: jax.Array
    group_B: jax.Array
    sizes_E: jax.Array


def units(group_sizes_E: jax.Array, num_rows: int, unit: int) -> Units:
    """Lays groups out so that no unit has rows of two: P is at most T + (U - 1) min(E, T), rounded up, at least U."""
    num_experts = group_sizes_E.shape[0]
    count = max(-(-(num_rows + (unit - 1) * min(num_experts, num_rows)) // unit), 1)
    padded_E = -(-group_sizes_E // unit) * unit
    group_B = group_of(padded_E // unit, count)
    end_E = jnp.cumsum(group_sizes_E)
    # Entry E, of nobody: no rows.
    start = jnp.append(end_E - group_sizes_E, 0)
    stop = jnp.append(end_E, 0)
    first = jnp.append(jnp.cumsum(padded_E) - padded_E, 0)
    group_P = jnp.repeat(group_B, unit)
    row_P = jnp.arange(count * unit, dtype=jnp.int32) - first[group_P] + start[group_P]
    source_P = jnp.where(row_P < stop[group_P], row_P, num_rows)
    return Units(source_P, group_B, padded_E)


def smallest_unit(precision: MatmulPrecision) -> int:
    """Returns the tokens of a unit that both operands' blocks and the transform divide."""
    blocks = [formats.FORMATS[format].block for format in (precision.x, precision.dy)]
    return max(*blocks, precision.hadamard or 1)  # all powers of two


def quantize(
    a_TN: jax.Array,
    layout: Units,
    precision: MatmulPrecision,
    format: str,
    rule: str | None = None,
    key: jax.Array | None = None,
) -> formats.BlockScaled:
    """Returns rows quantized along the tokens: (B, N, U), transformed if precision.hadamard.

    One global scale per group, of what is quantized, that is after the transform: global_amax is (B,), that of each
    unit's group.

    Args:
      a_TN: rows sorted by expert.
      layout: from `units`, with a unit that the format's block and the transform divide.
      precision: its hadamard is used.
      format: of the codes.
      rule: scale rule.
      key: for stochastic rounding, or None.
    """
    num_units, width = layout.group_B.shape[0], a_TN.shape[1]
    a_PN = _rows_or_zeros(a_TN, layout.source_P).astype(jnp.float32)
    a_BNU = jnp.swapaxes(a_PN.reshape(num_units, -1, width), 1, 2)
    if precision.hadamard:
        a_BNU = formats.block_hadamard(
            a_BNU, precision.hadamard, signs=jnp.asarray(token_signs(precision.hadamard))
        )
    amax_B = None
    if formats.FORMATS[format].scale == "e4m3":
        magnitude_BNU = jnp.abs(a_BNU)
        found_B = jnp.max(jnp.where(jnp.isfinite(magnitude_BNU), magnitude_BNU, 0), axis=(1, 2))
        count = layout.sizes_E.shape[0] + 1
        found = jax.ops.segment_max(found_B, layout.group_B, count, indices_are_sorted=True)
        amax_B = jnp.maximum(found, 0)[layout.group_B]
    return formats.quantize(a_BNU, format, rule=rule, num_batch_axes=1, key=key, global_amax=amax_B)


def values(q_BNU: formats.BlockScaled) -> jax.Array:
    """Returns the float32 rows that codes stand for: (P, N)."""
    return jnp.swapaxes(formats.dequantize(q_BNU), 1, 2).reshape(-1, q_BNU.shape[1])


def widen(
    q_BNU: formats.BlockScaled, sizes_E: jax.Array, unit: int
) -> tuple[formats.BlockScaled, jax.Array]:
    """Lays the same codes out in units of `unit` tokens, zeros where a group has none: (V, N, W).

    The codes are not made anew: blocks, and what was drawn to round them, are those of the smallest units.

    Args:
      q_BNU: from `quantize`.
      sizes_E: the padded sizes of its layout, multiples of U.
      unit: W, a multiple of U.

    Returns:
      (q_VNW, sizes_E): the array, with linear scales, and each group's tokens, multiples of W. Units beyond the last
      group's are zero. V W is at most B U + (W - U) min(E, B), rounded up.

    Raises:
      ValueError: float scales, or a unit that is no multiple of U.
    """
    num_units, width, small = q_BNU.shape
    if formats.FORMATS[q_BNU.format].float_scales or unit % small:
        raise ValueError(
            f"widen needs byte scales and a unit that is a multiple of {small}, got {q_BNU.format} and {unit}"
        )
    # The same layout, of units for rows.
    layout = units(sizes_E // small, num_units, unit // small)

    def wide(leaf_BNC):
        found = _rows_or_zeros(leaf_BNC, layout.source_P)
        found = found.reshape(-1, unit // small, width, leaf_BNC.shape[-1])
        return jnp.swapaxes(found, 1, 2).reshape(found.shape[0], width, -1)

    amax = q_BNU.global_amax
    if amax is not None:
        amax = _rows_or_zeros(amax, layout.source_P[:: unit // small])
    q_VNW = dataclasses.replace(
        q_BNU, codes=wide(q_BNU.codes), scales=wide(q_BNU.scales), global_amax=amax
    )
    return q_VNW, layout.sizes_E * small


def expert_scale(
    dy_VNW: formats.BlockScaled, x_VKW: formats.BlockScaled, sizes_E: jax.Array
) -> jax.Array:
    """Returns the factor of each expert's sums of products of code * scale: float32 (E,), 0 for an empty group.

    Args:
      dy_VNW: the gradients' codes.
      x_VKW: the activations' codes.
      sizes_E: each group's tokens, multiples of W.
    """
    num_units, _, unit = dy_VNW.shape
    first_E = (jnp.cumsum(sizes_E) - sizes_E) // unit
    factor_E = (sizes_E > 0).astype(jnp.float32)
    for q in (dy_VNW, x_VKW):
        scale_V = formats.global_scale(q)
        if scale_V is not None:
            factor_E = factor_E * scale_V[jnp.minimum(first_E, num_units - 1)]
    return factor_E


def _rows_or_zeros(a_R: jax.Array, row_S: jax.Array) -> jax.Array:
    """Returns a[row], zeros where the row is beyond the last."""
    if not a_R.shape[0]:
        return jnp.zeros((*row_S.shape, *a_R.shape[1:]), a_R.dtype)
    found = a_R[jnp.minimum(row_S, a_R.shape[0] - 1)]
    exists = (row_S < a_R.shape[0]).reshape(-1, *(1,) * (a_R.ndim - 1))
    return jnp.where(exists, found, jnp.zeros((), a_R.dtype))


@functools.cache
def token_signs(block: int) -> np.ndarray:
    """Returns the fixed int8 signs of the transform along tokens: NVIDIA's for 16, drawn once for longer blocks."""
    if block == 16:
        return np.array(_SIGNS_16, np.int8)
    return np.random.default_rng(block).choice(np.array([-1, 1], np.int8), block)
