"""Quantizes the operands of grouped products.

GPU kernels multiply the codes, every other backend the float32 values that the codes stand for (`value`), so there is
one definition of the numerics.
T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import device, formats, private_shard_map
from pallas_kernels.grouped_matmul import kernels, windows
from pallas_kernels.grouped_matmul.precision import MatmulPrecision, Weight


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
    if _has_kernel(x_TK, format, key):
        data = None if key is None else jax.random.key_data(key)
        call = functools.partial(_by_kernel, format, rule)
        return private_shard_map.hidden(call, x_TK, amax_T, data)
    return formats.quantize(x_TK, format, rule=rule, num_batch_axes=1, key=key, global_amax=amax_T)


def _has_kernel(x_TK, format: str, key) -> bool:
    """Whether a kernel of the device makes the codes: the same bits, in one pass over the rows."""
    if not device.current().is_tcgen05 or kernels.is_interpreted():
        return False
    from pallas_kernels import quantize  # imports Pallas, which a CPU does without

    if format not in quantize.FORMATS:
        return False
    options = dict(rule=None, token_N=None, amax_N=None, hadamard=None, key=key)
    return quantize.choose(None, x_TK, format, **options) != "xla"


def _by_kernel(format, rule, x_TK, amax_T, data):
    from pallas_kernels import quantize

    key = None if data is None else jax.random.wrap_key_data(data, impl="threefry2x32")
    return quantize.quantize_rows(x_TK, format, rule=rule, amax_N=amax_T, key=key)


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
    group_T = group_of(group_sizes_E, x_TK.shape[0])
    amax_E = jax.ops.segment_max(amax_T, group_T, num_experts + 1, indices_are_sorted=True)
    return jnp.maximum(amax_E[:num_experts], 0)  # an empty segment has -inf


def group_of(group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Returns the group of each row, E beyond the last: (T,) int32."""
    row_T = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.cumsum(group_sizes_E), row_T, side="right").astype(jnp.int32)


def of_group(value_E: jax.Array, group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Returns each row's entry of what each group has, float32; 0 beyond the groups: (T, ...)."""
    pad = [(0, 1)] + [(0, 0)] * (value_E.ndim - 1)
    padded = jnp.pad(value_E.astype(jnp.float32), pad)
    return padded[group_of(group_sizes_E, num_rows)]


def plus_bias(
    y_TN: jax.Array,
    bias_EN: jax.Array,
    group_sizes_E: jax.Array,
    weight_gradient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Adds each row's expert's bias, float32; the gradient sums rows in one order, where a scatter-add has none.

    Args:
      y_TN: float32 rows sorted by expert.
      bias_EN: float.
      group_sizes_E: int32.
      weight_gradient: of a backend: the bias is the weight of an input that is always 1.
    """
    return _plus_bias(*windows.vary_alike(y_TN, bias_EN, group_sizes_E), weight_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _plus_bias(y_TN, bias_EN, group_sizes_E, weight_gradient):
    return y_TN + of_group(bias_EN, group_sizes_E, y_TN.shape[0])


def _plus_bias_forward(y_TN, bias_EN, group_sizes_E, weight_gradient):
    y_TN = _plus_bias(y_TN, bias_EN, group_sizes_E, weight_gradient)
    return y_TN, (jnp.zeros(0, bias_EN.dtype), group_sizes_E)


def _plus_bias_backward(weight_gradient, residuals, dy_TN):
    like, group_sizes_E = residuals
    ones_T1 = jnp.ones((dy_TN.shape[0], 1), jnp.float32)
    dbias_EN1 = weight_gradient(*windows.vary_alike(dy_TN, ones_T1, group_sizes_E))
    return dy_TN, dbias_EN1[..., 0].astype(like.dtype), None


_plus_bias.defvjp(_plus_bias_forward, _plus_bias_backward)


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
