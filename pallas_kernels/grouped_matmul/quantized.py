"""The grouped product with quantized operands: fake quantization, or quantized gradients too.

A backend multiplies the values that the codes stand for; where there is a `kernels.Kernel`, it multiplies the codes
themselves, and the backend is left with the gradients that are not quantized.

T rows sorted by expert, K contraction axis, N output axis, E experts, P padded rows.
"""

from __future__ import annotations

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device, formats
from pallas_kernels.grouped_matmul import operands, transposed_operands, windows
from pallas_kernels.grouped_matmul.activation import SWIGLU, SwiGLU
from pallas_kernels.grouped_matmul.kernels import Kernel, Problem
from pallas_kernels.grouped_matmul.precision import (
    PLAIN,
    Bias,
    MatmulPrecision,
    MlpPrecision,
    Weight,
)


def grouped_matmul(
    backend: types.ModuleType,
    x_TK: jax.Array,
    w_ENK: Weight,
    group_sizes_E: jax.Array,
    precision: MatmulPrecision,
    out_dtype: jnp.dtype,
    *,
    amax_E: jax.Array | None = None,
    key: jax.Array | None = None,
    kernel: Kernel | None = None,
    bias_EN: jax.Array | None = None,
) -> jax.Array:
    """Multiplies rows with their expert's weight as `precision` says; see `api.quantized_grouped_matmul`.

    A bias is added in float32, before the only cast.
    """
    x_TK, w_ENK = operands.rotate(x_TK, precision), operands.rotate(w_ENK, precision)
    if (precision.dy is None and kernel is None) or not x_TK.shape[0]:
        x_TK = fake_rows(x_TK, precision, group_sizes_E, amax_E)
        w_ENK = fake_weights(w_ENK, precision)
        return backend.grouped_matmul(x_TK, w_ENK, group_sizes_E, bias_EN, None, out_dtype)
    data = None if key is None else key_data(key)
    leaves = windows.vary_alike(x_TK, w_ENK, group_sizes_E, amax_E, data)
    product_dtype = jnp.dtype(out_dtype if bias_EN is None else jnp.float32)
    y_TN = _product(*leaves, (backend, kernel), precision, product_dtype)
    if bias_EN is None:
        return y_TN
    y_TN = operands.plus_bias(y_TN, bias_EN, group_sizes_E, backend.weight_gradient)
    return y_TN.astype(out_dtype)


def expert_mlp(
    backend: types.ModuleType,
    x_ND: jax.Array,
    gate_up_EGD: Weight,
    down_EDF: Weight,
    group_sizes_E: jax.Array,
    precision: MlpPrecision,
    out_dtype: jnp.dtype,
    *,
    x_amax: tuple[jax.Array | None, jax.Array | None] = (None, None),
    key: jax.Array | None = None,
    kernels: tuple[Kernel | None, Kernel | None] = (None, None),
    activation: SwiGLU = SWIGLU,
    bias: Bias = (None, None),
) -> jax.Array:
    """down(act([gate, up])) as `precision` says; see `api.expert_mlp`."""
    if fuses(precision) and kernels == (None, None):
        gate_up_EGD = fake_weights(gate_up_EGD, precision.gate_up)
        down_EDF = fake_weights(down_EDF, precision.down)
        weights = gate_up_EGD, down_EDF
        return backend.expert_mlp(x_ND, *weights, group_sizes_E, out_dtype, activation, bias)
    keys = (None, None) if key is None else jax.random.split(_typed(key))
    call = functools.partial(grouped_matmul, backend)
    hidden_NG = call(
        x_ND,
        gate_up_EGD,
        group_sizes_E,
        precision.gate_up,
        jnp.float32,
        amax_E=x_amax[0],
        key=keys[0],
        kernel=kernels[0],
        bias_EN=bias[0],
    )
    act_NF = activation(hidden_NG).astype(x_ND.dtype)
    return call(
        act_NF,
        down_EDF,
        group_sizes_E,
        precision.down,
        out_dtype,
        amax_E=x_amax[1],
        key=keys[1],
        kernel=kernels[1],
        bias_EN=bias[1],
    )


def fuses(precision: MlpPrecision) -> bool:
    """Whether only weights are rounded, so that a backend's own feed-forward serves: nothing happens between layers."""
    layers = (precision.gate_up, precision.down)
    return all(p.x is None and p.dy is None and p.rotation is None for p in layers)


def fake_rows(
    x_TK: jax.Array,
    precision: MatmulPrecision,
    group_sizes_E: jax.Array,
    amax_E: jax.Array | None = None,
) -> jax.Array:
    """Returns activations rounded to their format, float32; the gradient is straight-through."""
    if precision.x is None:
        return x_TK
    q = operands.rows(jax.lax.stop_gradient(x_TK), precision, group_sizes_E, amax_E)
    return operands.straight_through(x_TK, operands.value(q))


def fake_weights(w_ENK: Weight, precision: MatmulPrecision) -> Weight:
    """Returns plain weights rounded to their format, float32, gradient straight-through; packed ones as given."""
    if isinstance(w_ENK, formats.BlockScaled) or precision.w is None:
        return w_ENK
    q = operands.weights(jax.lax.stop_gradient(w_ENK), precision)
    return operands.straight_through(w_ENK, operands.value(q))


def _typed(key: jax.Array) -> jax.Array:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key, impl="threefry2x32")


def key_data(key: jax.Array) -> jax.Array:
    """Returns a key as plain integers, which take no gradient."""
    return jax.random.key_data(_typed(key))


class _Residuals(NamedTuple):
    """What the gradients need; None where they do not.

    used: the operands that were multiplied. master: the unquantized ones, where gradients are quantized from them.
    like: empty arrays of the dtypes of x and w; None for packed weights, which get no gradient.
    """

    used: tuple[Weight | None, Weight]
    master: tuple[jax.Array | None, Weight | None]
    like: tuple[jax.Array, jax.Array | None]
    group_sizes_E: jax.Array
    data: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _product(x_TK, w_ENK, group_sizes_E, amax_E, data, computes, precision, out_dtype):
    operands_ = (x_TK, w_ENK, group_sizes_E, amax_E, data)
    return _forward(*operands_, computes, precision, out_dtype)[0]


def _forward(x_TK, w_ENK, group_sizes_E, amax_E, data, computes, precision, out_dtype):
    used_TK = operands.rows(x_TK, precision, group_sizes_E, amax_E)
    used_ENK = operands.weights(w_ENK, precision)
    y_TN = _multiply(computes, used_TK, used_ENK, group_sizes_E, out_dtype)
    straight, packed = precision.dy is None, isinstance(w_ENK, formats.BlockScaled)
    residuals = _Residuals(
        used=(used_TK if straight and not packed else None, used_ENK),
        master=(None, None) if straight else (x_TK, w_ENK),
        like=(jnp.zeros(0, x_TK.dtype), None if packed else jnp.zeros(0, w_ENK.dtype)),
        group_sizes_E=group_sizes_E,
        data=data,
    )
    return y_TN, residuals


def _multiply(computes, x_TK: Weight, w_ENK: Weight, group_sizes_E, out_dtype) -> jax.Array:
    """The product of two operands: of their codes by the kernel if there is one, else of their values."""
    backend, kernel = computes
    if kernel is not None:
        here = device.current()
        return kernel.product(x_TK, w_ENK, group_sizes_E, None, None, out_dtype, here)
    x_TK, w_ENK = operands.value(x_TK), operands.value(w_ENK)
    return backend.grouped_matmul(x_TK, w_ENK, group_sizes_E, None, None, out_dtype)


def _backward(computes, precision, out_dtype, residuals, dy_TN):
    group_sizes_E, (like_x, like_w) = residuals.group_sizes_E, residuals.like
    # Rows of nobody: their gradient is not zero by itself, and must reach no shared scale.
    inside_T = jnp.arange(dy_TN.shape[0]) < jnp.sum(group_sizes_E)
    dy_TN = jnp.where(inside_T[:, None], dy_TN.astype(jnp.float32), 0)
    gradients = _straight_gradients if precision.dy is None else _quantized_gradients
    dx_TK, dw_ENK = gradients(computes, precision, residuals, dy_TN)
    dw_ENK = None if like_w is None else dw_ENK.astype(like_w.dtype)
    return dx_TK.astype(like_x.dtype), dw_ENK, None, None, None


def _straight_gradients(computes, precision, residuals, dy_TN):
    """Straight-through: those of the product of the values that were multiplied, in float32."""
    backend, sizes_E = computes[0], residuals.group_sizes_E
    used_TK, used_ENK = residuals.used
    dx_TK = backend.input_gradient(dy_TN, operands.value(used_ENK).astype(jnp.float32), sizes_E)
    if residuals.like[1] is None:
        return dx_TK, None
    return dx_TK, backend.weight_gradient(dy_TN, operands.value(used_TK), sizes_E)


def _quantized_gradients(computes, precision, residuals, dy_TN):
    """Both products with operands quantized anew, each along its own contraction axis."""
    sizes_E, (x_TK, w_ENK) = residuals.group_sizes_E, residuals.master
    keys = (None, None)
    if precision.needs_key:
        data = jax.random.wrap_key_data(residuals.data, impl="threefry2x32")
        keys = tuple(jax.random.split(data))
    q_TN = operands.gradient_rows(dy_TN, precision, sizes_E, keys[0])
    dx_TK = _input_gradient(computes, q_TN, w_ENK, residuals.used[1], sizes_E, precision)
    if residuals.like[1] is None:
        return dx_TK, None
    return dx_TK, _weight_gradient(computes, x_TK, dy_TN, sizes_E, precision, keys[1])


def _input_gradient(computes, dy_TN: Weight, w_ENK, used_ENK, group_sizes_E, precision):
    """dx = dy w, the weights quantized along N; float32."""
    backend, kernel = computes
    if kernel is not None and not isinstance(w_ENK, formats.BlockScaled) and precision.w:
        codes_EKN, here = operands.transposed_codes(w_ENK, precision), device.current()
        if not kernel.unsupported(problem_of(dy_TN, codes_EKN), here):
            f32 = jnp.dtype(jnp.float32)
            return kernel.product(dy_TN, codes_EKN, group_sizes_E, None, None, f32, here)
    back_ENK = operands.transposed_weights(w_ENK, used_ENK, precision)
    return backend.input_gradient(operands.value(dy_TN), back_ENK, group_sizes_E)


def _weight_gradient(computes, x_TK, dy_TN, group_sizes_E, precision, key):
    """dw[e] = dy^T x over the rows of e, both quantized along the tokens; exactly zero for an empty group."""
    unit = transposed_operands.smallest_unit(precision)
    layout = transposed_operands.units(group_sizes_E, x_TK.shape[0], unit)
    dy_BNU = transposed_operands.quantize(dy_TN, layout, precision, precision.dy, None, key)
    x_BKU = transposed_operands.quantize(x_TK, layout, precision, precision.x, precision.x_rule)
    backend, kernel = computes
    if kernel is not None:
        dw_ENK = kernel.weight_gradient(dy_BNU, x_BKU, layout.sizes_E, device.current())
        if dw_ENK is not None:
            return dw_ENK
    value_PN, value_PK = (transposed_operands.values(q) for q in (dy_BNU, x_BKU))
    return backend.weight_gradient(value_PN, value_PK, layout.sizes_E)


_product.defvjp(_forward, _backward)


def problem_of(x_TK, w_ENK, precision: MatmulPrecision = PLAIN) -> Problem:
    """Describes a product under a precision, for the choice of a kernel."""
    x = precision.x or _kind(x_TK)
    w = precision.w if precision.w and not isinstance(w_ENK, formats.BlockScaled) else _kind(w_ENK)
    return Problem(x_TK.shape[0], w_ENK.shape[0], w_ENK.shape[1], w_ENK.shape[2], x, w)


def _kind(a) -> str:
    return a.format if isinstance(a, formats.BlockScaled) else a.dtype.name
