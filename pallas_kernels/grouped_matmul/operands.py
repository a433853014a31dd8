"""Quantizes the operands of grouped products.

GPU kernels multiply the codes, every other backend the float32 values that the codes stand for (`value`), so there is
one definition of the numerics.
T rows sorted by expert, K contraction axis, N output axis, E experts, P padded rows, U rows of a unit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import formats
from pallas_kernels.grouped_matmul.precision import MatmulPrecision, Weight

# The signs of the transform of 16 tokens in NVIDIA's recipe: fixed for all layers and steps (arXiv:2509.25149).
_SIGNS_16 = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@jax.custom_vjp
def straight_through(x: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `value`; its gradient goes to x as it is (arXiv:1308.3432)."""
    return value


def _straight_through_forward(x, value):
    return value, jnp.zeros((0,), x.dtype)


def _straight_through_backward(like, dy):
    return dy.astype(like.dtype), None


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def rotate(a: Weight, precision: MatmulPrecision) -> Weight:
    """Applies precision.rotation along the last axis of activations or plain weights; packed ones have been."""
    if precision.rotation is None or isinstance(a, formats.BlockScaled):
        return a
    return formats.block_hadamard(a, precision.rotation)


def value(operand: Weight) -> jax.Array:
    """Returns the float32 values that codes stand for; plain operands as they are."""
    return formats.dequantize(operand) if isinstance(operand, formats.BlockScaled) else operand


def rows(
    x_TK: jax.Array,
    precision: MatmulPrecision,
    group_sizes_E: jax.Array,
    amax_E: jax.Array | None = None,
) -> Weight:
    """Returns quantized activations; x itself where precision.x is None.

    Args:
      x_TK: rows sorted by expert, rotated if need be.
      precision: its x, x_scale and x_rule are used.
      group_sizes_E: int32; rows beyond their sum count in no shared scale.
      amax_E: float32 calibrated amax of each expert's rows, for x_scale "static".
    """
    if precision.x is None:
        return x_TK
    scale = precision.x_scale
    return _rows(x_TK, precision.x, precision.x_rule, scale, group_sizes_E, amax_E, None)


def _rows(x_TK, format, rule, scale, group_sizes_E, amax_E, key):
    """Rows quantized along K, with the global scale from where `scale` says."""
    spec = formats.FORMATS[format]
    if spec.scale == "tensor" and scale != "per_token":
        return _one_scale(x_TK, format, rule, group_sizes_E, key)
    amax_T = None
    if spec.scale == "e4m3" and scale != "per_token":
        found_E = _group_amax(x_TK, group_sizes_E) if amax_E is None else amax_E
        if scale == "per_tensor":
            found_E = jnp.broadcast_to(jnp.max(found_E, keepdims=True), found_E.shape)
        amax_T = of_group(found_E, group_sizes_E, x_TK.shape[0])
    return formats.quantize(x_TK, format, rule=rule, num_batch_axes=1, key=key, global_amax=amax_T)


def _one_scale(x_TK, format, rule, group_sizes_E, key):
    inside_T = jnp.arange(x_TK.shape[0]) < jnp.sum(group_sizes_E)
    x_TK = jnp.where(inside_T[:, None], x_TK, jnp.zeros((), x_TK.dtype))
    return formats.quantize(x_TK, format, rule=rule, num_batch_axes=0, key=key)


def _group_amax(x_TK: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The largest finite magnitude of each group's rows, 0 for an empty one: (E,)."""
    magnitude_TK = jnp.abs(x_TK.astype(jnp.float32))
    amax_T = jnp.max(jnp.where(jnp.isfinite(magnitude_TK), magnitude_TK, 0), axis=1, initial=0)
    num_experts = group_sizes_E.shape[0]
    # Rows of nobody go to a group of their own, which is left out.
    group_T = _group_of(group_sizes_E, x_TK.shape[0])
    amax_E = jax.ops.segment_max(amax_T, group_T, num_experts + 1, indices_are_sorted=True)
    return jnp.maximum(amax_E[:num_experts], 0)  # an empty segment has -inf


def _group_of(group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """The group of each row, E beyond the last: (T,) int32."""
    row_T = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.cumsum(group_sizes_E), row_T, side="right").astype(jnp.int32)


def of_group(value_E: jax.Array, group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Returns each row's entry of what each group has, float32; 0 beyond the groups: (T, ...)."""
    pad = [(0, 1)] + [(0, 0)] * (value_E.ndim - 1)
    padded = jnp.pad(value_E.astype(jnp.float32), pad)
    return padded[_group_of(group_sizes_E, num_rows)]


def weights(w_ENK: Weight, precision: MatmulPrecision) -> Weight:
    """Returns quantized weights, each expert with its own global scale.

    Packed weights, and plain ones without a format, are returned as they are.
    """
    if isinstance(w_ENK, formats.BlockScaled) or precision.w is None:
        return w_ENK
    return formats.quantize(w_ENK, precision.w, rule=precision.w_rule, num_batch_axes=1)


def transposed_weights(w_ENK: Weight, used_ENK: Weight, precision: MatmulPrecision) -> jax.Array:
    """Returns the weights of the input gradient dx = dy w, float32 (E, N, K), blocks along N.

    A 2D format has the same values in both directions, so those of the forward product serve; packed weights have no
    master to quantize anew, so what they stand for does; any other format is quantized along N.

    Args:
      w_ENK: the unquantized weights, or packed ones.
      used_ENK: what the forward product used.
      precision: says the format.
    """
    packed = isinstance(w_ENK, formats.BlockScaled)
    if packed or precision.w is None or formats.FORMATS[precision.w].block_rows > 1:
        return value(used_ENK).astype(jnp.float32)
    return jnp.swapaxes(formats.dequantize(transposed_codes(w_ENK, precision)), 1, 2)


def transposed_codes(w_ENK: jax.Array, precision: MatmulPrecision) -> formats.BlockScaled:
    """Returns plain weights quantized along N: (E, K, N). A 2D format makes the codes that it makes along K."""
    w_EKN = jnp.swapaxes(w_ENK, 1, 2)
    return formats.quantize(w_EKN, precision.w, rule=precision.w_rule, num_batch_axes=1)


def gradient_rows(
    dy_TN: jax.Array, precision: MatmulPrecision, group_sizes_E: jax.Array, key: jax.Array | None
) -> Weight:
    """Returns output gradients quantized along N, one global scale per group."""
    return _rows(dy_TN, precision.dy, None, "per_group", group_sizes_E, None, key)


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
    """Lays groups out so that no unit has rows of two: P is at most T + (U - 1) min(E, T), rounded up."""
    num_experts = group_sizes_E.shape[0]
    count = -(-(num_rows + (unit - 1) * min(num_experts, num_rows)) // unit)
    padded_E = -(-group_sizes_E // unit) * unit
    group_B = _group_of(padded_E // unit, count)
    end_E = jnp.cumsum(group_sizes_E)
    # Entry E, of nobody: no rows.
    start = jnp.append(end_E - group_sizes_E, 0)
    stop = jnp.append(end_E, 0)
    first = jnp.append(jnp.cumsum(padded_E) - padded_E, 0)
    group_P = jnp.repeat(group_B, unit)
    row_P = jnp.arange(count * unit, dtype=jnp.int32) - first[group_P] + start[group_P]
    source_P = jnp.where(row_P < stop[group_P], row_P, num_rows)
    return Units(source_P, group_B, padded_E)


def along_tokens(
    a_TN: jax.Array,
    layout: Units,
    precision: MatmulPrecision,
    format: str,
    rule: str | None,
    key: jax.Array | None,
) -> jax.Array:
    """Returns the float32 values of rows quantized along the tokens: (P, N), transformed if precision.hadamard.

    A block holds consecutive rows of one group; the tail of a group's last block is zeros. One global scale per group,
    of what is quantized, that is after the transform.

    Args:
      a_TN: rows sorted by expert.
      layout: from `units`, with a unit that the format's block and the transform divide.
      precision: its hadamard is used.
      format: of the codes.
      rule: scale rule.
      key: for stochastic rounding, or None.
    """
    num_units, width = layout.group_B.shape[0], a_TN.shape[1]
    exists_P = layout.source_P < a_TN.shape[0]
    a_PN = a_TN[jnp.minimum(layout.source_P, a_TN.shape[0] - 1)].astype(jnp.float32)
    a_PN = jnp.where(exists_P[:, None], a_PN, 0)
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
    q = formats.quantize(a_BNU, format, rule=rule, num_batch_axes=1, key=key, global_amax=amax_B)
    return jnp.swapaxes(formats.dequantize(q), 1, 2).reshape(-1, width)


@functools.cache
def token_signs(block: int) -> np.ndarray:
    """Returns the fixed int8 signs of the transform along tokens: NVIDIA's for 16, drawn once for longer blocks."""
    if block == 16:
        return np.array(_SIGNS_16, np.int8)
    return np.random.default_rng(block).choice(np.array([-1, 1], np.int8), block)
