"""The grouped product with quantized operands, over any backend: fake quantization, or quantized gradients too.

T rows sorted by expert, K contraction axis, N output axis, E experts, P padded rows.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import operands, reference, windows
from pallas_kernels.grouped_matmul.precision import MatmulPrecision, MlpPrecision, Weight


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
) -> jax.Array:
    """Multiplies rows with their expert's weight as `precision` says; see `api.quantized_grouped_matmul`."""
    x_TK, w_ENK = operands.rotate(x_TK, precision), operands.rotate(w_ENK, precision)
    if precision.dy is None or not x_TK.shape[0]:
        x_TK = fake_rows(x_TK, precision, group_sizes_E, amax_E)
        w_ENK = fake_weights(w_ENK, precision)
        return backend.grouped_matmul(x_TK, w_ENK, group_sizes_E, None, None, out_dtype)
    data = None if key is None else key_data(key)
    leaves = windows.vary_alike(x_TK, w_ENK, group_sizes_E, amax_E, data)
    return _trained(*leaves, backend, precision, jnp.dtype(out_dtype))


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
) -> jax.Array:
    """down(silu(gate) * up) as `precision` says; see `api.expert_mlp`."""
    if fuses(precision):
        gate_up_EGD = fake_weights(gate_up_EGD, precision.gate_up)
        down_EDF = fake_weights(down_EDF, precision.down)
        return backend.expert_mlp(x_ND, gate_up_EGD, down_EDF, group_sizes_E, out_dtype)
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
    )
    act_NF = reference.swiglu(hidden_NG).astype(x_ND.dtype)
    return call(
        act_NF,
        down_EDF,
        group_sizes_E,
        precision.down,
        out_dtype,
        amax_E=x_amax[1],
        key=keys[1],
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
    value = operands.rows(jax.lax.stop_gradient(x_TK), precision, group_sizes_E, amax_E)
    return operands.straight_through(x_TK, value)


def fake_weights(w_ENK: Weight, precision: MatmulPrecision) -> Weight:
    """Returns plain weights rounded to their format, float32, gradient straight-through; packed ones as given."""
    if isinstance(w_ENK, formats.BlockScaled) or precision.w is None:
        return w_ENK
    value = operands.weights(jax.lax.stop_gradient(w_ENK), precision)
    return operands.straight_through(w_ENK, value)


def _typed(key: jax.Array) -> jax.Array:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key, impl="threefry2x32")


def key_data(key: jax.Array) -> jax.Array:
    """Returns a key as plain integers, which take no gradient."""
    return jax.random.key_data(_typed(key))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _trained(x_TK, w_ENK, group_sizes_E, amax_E, data, backend, precision, out_dtype):
    operands_ = (x_TK, w_ENK, group_sizes_E, amax_E, data)
    return _forward(*operands_, backend, precision, out_dtype)[0]


def _forward(x_TK, w_ENK, group_sizes_E, amax_E, data, backend, precision, out_dtype):
    value_TK = operands.rows(x_TK, precision, group_sizes_E, amax_E)
    value_ENK = operands.weights(w_ENK, precision)
    y_TN = backend.grouped_matmul(value_TK, value_ENK, group_sizes_E, None, None, out_dtype)
    return y_TN, (x_TK, w_ENK, value_ENK, group_sizes_E, data)


def _backward(backend, precision, out_dtype, residuals, dy_TN):
    x_TK, w_ENK, value_ENK, group_sizes_E, data = residuals
    keys = (None, None)
    if precision.needs_key:
        keys = tuple(jax.random.split(jax.random.wrap_key_data(data, impl="threefry2x32")))
    # Rows of nobody: their gradient is not zero by itself, and must reach no shared scale.
    inside_T = jnp.arange(x_TK.shape[0]) < jnp.sum(group_sizes_E)
    dy_TN = jnp.where(inside_T[:, None], dy_TN.astype(jnp.float32), 0)
    value_TN = operands.gradient_rows(dy_TN, precision, group_sizes_E, keys[0])
    back_ENK = operands.transposed_weights(w_ENK, value_ENK, precision)
    dx_TK = backend.input_gradient(value_TN, back_ENK, group_sizes_E).astype(x_TK.dtype)
    dw_ENK = None
    if not isinstance(w_ENK, formats.BlockScaled):
        dw_ENK = _weight_gradient(backend, x_TK, dy_TN, group_sizes_E, precision, keys[1])
        dw_ENK = dw_ENK.astype(w_ENK.dtype)
    return dx_TK, dw_ENK, None, None, None


def _weight_gradient(backend, x_TK, dy_TN, group_sizes_E, precision, key):
    """dw[e] = dy^T x over the rows of e, both quantized along the tokens; exactly zero for an empty group."""
    blocks = [formats.FORMATS[f].block for f in (precision.x, precision.dy)]
    unit = max(*blocks, precision.hadamard or 1)  # all powers of two
    layout = operands.units(group_sizes_E, x_TK.shape[0], unit)
    value_PN = operands.along_tokens(dy_TN, layout, precision, precision.dy, None, key)
    value_PK = operands.along_tokens(x_TK, layout, precision, precision.x, precision.x_rule, None)
    return backend.weight_gradient(value_PN, value_PK, layout.sizes_E)


_trained.defvjp(_forward, _backward)
