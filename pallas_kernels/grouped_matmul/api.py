"""The public grouped matmuls: arguments are checked here, once; `choice.py` picks what computes them.

T rows sorted by expert, K contraction axis, N output axis, E experts, D model width, F expert width, G = 2F.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import dense, loading, operands, quantized
from pallas_kernels.grouped_matmul.activation import SWIGLU, SwiGLU
from pallas_kernels.grouped_matmul.choice import choose, choose_both
from pallas_kernels.grouped_matmul.loading import Padded
from pallas_kernels.grouped_matmul.precision import (
    PLAIN,
    Bias,
    MatmulPrecision,
    MlpPrecision,
    Weight,
    both,
)

F32 = jnp.dtype(jnp.float32)
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def grouped_matmul(
    x_TK: jax.Array,
    w_ENK: Weight | Padded,
    group_sizes_E: jax.Array,
    *,
    bias_EN: jax.Array | None = None,
    row_scale_T: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies rows that are sorted by expert with their expert's weight.

        y[t] = row_scale[t] * (w[e(t)] @ x[t]) + bias[e(t)]

    e(t) is the expert whose group holds row t: the first group_sizes[0] rows belong to expert 0, and so on.

    >>> x_TK = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> w_ENK = jnp.array([[[1.0, 0.0]], [[0.0, 10.0]]])
    >>> grouped_matmul(x_TK, w_ENK, jnp.array([1, 1])).tolist()
    [[1.0], [40.0], [0.0]]

    Args:
      x_TK: (T, K) float32, bfloat16 or float16.
      w_ENK: (E, N, K) float, `BlockScaled` or `loading.Padded`; output axis before input axis, as in checkpoints.
      group_sizes_E: (E,) integers >= 0, rows per expert. Rows beyond their sum give zeros and get zero gradients. A
        sum above T is refused where the values are known; traced, group ends are min(cumsum, T).
      bias_EN: (E, N) float, added after the row scale.
      row_scale_T: (T,) float.
      out_dtype: of y; None is the dtype of x. Products and sums are float32, cast once.
      implementation: one of IMPLEMENTATIONS; None or "auto" picks the fastest that works here.

    Returns:
      y_TN: (T, N). An expert without rows gets an exactly zero weight gradient.

    Raises:
      ValueError: shapes, dtypes or group sizes that do not fit; an unknown implementation.
      NotImplementedError: the named implementation cannot compute this.
    """
    if isinstance(w_ENK, Padded):
        options = dict(row_scale_T=row_scale_T, out_dtype=out_dtype, implementation=implementation)
        bias_EN, x_TK = w_ENK.extended_bias(bias_EN), w_ENK.extended(x_TK)
        return w_ENK.cut(
            grouped_matmul(x_TK, w_ENK.value, group_sizes_E, bias_EN=bias_EN, **options)
        )
    sizes_E = _check(x_TK, w_ENK, group_sizes_E)
    num_experts, width, _ = w_ENK.shape
    _check_shape("bias_EN", bias_EN, (num_experts, width), "(E, N)")
    _check_shape("row_scale_T", row_scale_T, (x_TK.shape[0],), "(T,)")
    out_dtype = _out_dtype(out_dtype, x_TK)
    module, kernel = choose(implementation, x_TK, w_ENK)
    if kernel is None:
        return module.grouped_matmul(x_TK, w_ENK, sizes_E, bias_EN, row_scale_T, out_dtype)
    y_TN = quantized.grouped_matmul(module, x_TK, w_ENK, sizes_E, PLAIN, F32, kernel=kernel)
    return _finish(module, y_TN, sizes_E, bias_EN, row_scale_T, out_dtype)


def quantized_grouped_matmul(
    x_TK: jax.Array,
    w_ENK: Weight | Padded,
    group_sizes_E: jax.Array,
    precision: MatmulPrecision,
    *,
    x_amax_E: jax.Array | None = None,
    key: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies the values that quantized operands stand for; gradients as the precision says.

    Args:
      x_TK: (T, K) float.
      w_ENK: (E, N, K) float, quantized per expert along K as precision.w says; or `BlockScaled`, which gets no gradient
        (that of x is computed with its dequantized value).
      group_sizes_E: as in `grouped_matmul`.
      precision: formats of the operands of the product and of its gradients.
      x_amax_E: (E,) float32, largest magnitude of each expert's rows in calibration: for x_scale "static".
      key: PRNG key, for stochastic rounding of gradients.
      out_dtype: of y; None is the dtype of x.
      implementation: as in `grouped_matmul`.

    Returns:
      y_TN: (T, N).

    Raises:
      ValueError: as in `grouped_matmul`; a precision.w that is not the format of packed weights; a key or x_amax_E that
        is missing.
      NotImplementedError: the named implementation cannot compute this.
    """
    if isinstance(w_ENK, Padded):
        options = dict(x_amax_E=x_amax_E, key=key, out_dtype=out_dtype)
        operands_ = (w_ENK.extended(x_TK), w_ENK.value, group_sizes_E, precision)
        return w_ENK.cut(
            quantized_grouped_matmul(*operands_, implementation=implementation, **options)
        )
    sizes_E = _check(x_TK, w_ENK, group_sizes_E)
    check_precision(both(precision), w_ENK, w_ENK)
    check_extras(both(precision), key, (x_amax_E, x_amax_E), w_ENK.shape[0])
    out_dtype = _out_dtype(out_dtype, x_TK)
    module, kernel = choose(implementation, x_TK, w_ENK, precision)
    return quantized.grouped_matmul(
        module, x_TK, w_ENK, sizes_E, precision, out_dtype, amax_E=x_amax_E, key=key, kernel=kernel
    )


def quantized_matmul(
    x_TK: jax.Array,
    w_NK: Weight,
    precision: MatmulPrecision,
    *,
    key: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Multiplies all rows with one weight, y = x w^T: `quantized_grouped_matmul` with a single group.

    Args:
      x_TK: (T, K) float.
      w_NK: (N, K) float or `BlockScaled`.
      precision: formats; x_scale "static" is not for here.
      key: PRNG key, for stochastic rounding of gradients.
      out_dtype: of y; None is the dtype of x.

    Returns:
      y_TN: (T, N).

    Raises:
      ValueError: as in `quantized_grouped_matmul`.
    """
    w_1NK = jax.tree.map(lambda leaf: leaf[None], w_NK)
    sizes_1 = jnp.full((1,), x_TK.shape[0], jnp.int32)
    _check_operands(x_TK, w_1NK)
    check_precision(both(precision), w_1NK, w_1NK)
    check_extras(both(precision), key, (None, None), 1)
    dtype = _out_dtype(out_dtype, x_TK)
    return quantized.grouped_matmul(dense, x_TK, w_1NK, sizes_1, precision, dtype, key=key)


def expert_mlp(
    x_ND: jax.Array,
    gate_up_EGD: Weight | Padded,
    down_EDF: Weight | Padded,
    group_sizes_E: jax.Array,
    *,
    activation: SwiGLU = SWIGLU,
    bias: Bias = (None, None),
    precision: MatmulPrecision | MlpPrecision | None = None,
    x_amax: tuple[jax.Array | None, jax.Array | None] = (None, None),
    key: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Applies each expert's gated feed-forward to its rows.

        y[n] = down[e(n)] act([gate, up]) + b2[e(n)],    [gate, up] = gate_up[e(n)] x[n] + b1[e(n)]

    act is silu(gate) * up, or what another `activation` says. Defined by its unfused composition of (quantized) grouped
    matmuls: the hidden layer in float32, what the activation makes of it cast to the dtype of x.

    Args:
      x_ND: (N, D) float, rows sorted by expert.
      gate_up_EGD: (E, 2F, D) float, `BlockScaled` or `loading.Padded`; rows :F are the gate's, F: the up projection's.
      down_EDF: (E, D, F) likewise.
      group_sizes_E: as in `grouped_matmul`.
      activation: `GPT_OSS` for gpt-oss.
      bias: (E, 2F) float of gate and up, and (E, D) of down; None for none.
      precision: formats of the operands, of both layers or of each; None is plain float.
      x_amax: for x_scale "static": (E,) float32 of the rows that enter gate and up, and down.
      key: PRNG key, for stochastic rounding of gradients.
      out_dtype: of y; None is the dtype of x.
      implementation: as in `grouped_matmul`.

    Returns:
      y_ND: (N, D).

    Raises:
      ValueError, NotImplementedError: as in `quantized_grouped_matmul`.

    Reference: SwiGLU, arXiv:2002.05202.
    """
    sizes_E, width = _check(x_ND, gate_up_EGD, group_sizes_E), x_ND.shape[1]
    check_feed_forward(x_ND, gate_up_EGD, down_EDF, bias)
    gate_up, down, bias = loading.as_multiplied(gate_up_EGD, down_EDF, bias)
    x_ND = loading.widened(x_ND, gate_up.shape[2])
    precision = both(precision)
    check_precision(precision, gate_up, down)
    check_extras(precision, key, x_amax, gate_up.shape[0])
    out_dtype = _out_dtype(out_dtype, x_ND)
    module, layers = choose_both(implementation, x_ND, gate_up, down, precision)
    extras = dict(x_amax=x_amax, key=key, kernels=layers, activation=activation, bias=bias)
    y_ND = quantized.expert_mlp(
        module, x_ND, gate_up, down, sizes_E, precision, out_dtype, **extras
    )
    return y_ND[:, :width]


def check_feed_forward(
    x_ND: jax.Array, gate_up: Weight | Padded, down: Weight | Padded, bias: Bias
) -> None:
    """Raises ValueError unless x, gate_up, down and biases are a feed-forward: dtypes and shapes fit."""
    _check_operands(x_ND, gate_up)
    num_experts, hidden, width = gate_up.shape
    if hidden % 2 or down.shape != (num_experts, width, hidden // 2):
        raise ValueError(
            f"gate_up must be (E, 2F, D) and down (E, D, F), got {gate_up.shape} and {down.shape}"
        )
    _check_float("down", down)
    shapes = {
        "gate_up": ((num_experts, hidden), "(E, 2F)"),
        "down": ((num_experts, width), "(E, D)"),
    }
    for b, (name, (shape, axes)) in zip(bias, shapes.items(), strict=True):
        _check_shape(f"bias of {name}", b, shape, axes)
        if b is not None:
            _check_float(f"bias of {name}", b)


def _check(x_TK, w_ENK, group_sizes_E) -> jax.Array:
    """Returns group sizes as int32 whose sum is at most T."""
    _check_operands(x_TK, w_ENK)
    num_rows, num_experts = x_TK.shape[0], w_ENK.shape[0]
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"group sizes must be integers, got {group_sizes_E.dtype}")
    _check_shape("group_sizes_E", group_sizes_E, (num_experts,), "(E,), one per expert of w")
    if not isinstance(group_sizes_E, jax.core.Tracer):
        _check_sizes(np.asarray(group_sizes_E), num_rows)
    # Traced sizes cannot be refused: whatever lies beyond the last row is cut off.
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), num_rows)
    return jnp.diff(end_E, prepend=jnp.zeros(1, jnp.int32))


def _check_sizes(sizes_E: np.ndarray, num_rows: int) -> None:
    if sizes_E.min(initial=0) < 0:
        raise ValueError(f"group sizes must not be negative, got {sizes_E.tolist()}")
    if sizes_E.sum() > num_rows:
        raise ValueError(f"group sizes sum to {sizes_E.sum()}, but x has {num_rows} rows")


def _check_operands(x_TK, w_ENK) -> None:
    if x_TK.ndim != 2 or w_ENK.ndim != 3 or x_TK.shape[1] != w_ENK.shape[2]:
        raise ValueError(
            f"x must be (T, K) and w (E, N, K) with the same K, got {x_TK.shape} and {w_ENK.shape}"
        )
    if not w_ENK.shape[0]:
        raise ValueError(f"there must be at least one expert, got w of shape {w_ENK.shape}")
    _check_float("x", x_TK)
    _check_float("w", w_ENK)


def _check_float(name: str, a: Weight | Padded) -> None:
    a = a.value if isinstance(a, Padded) else a
    if not isinstance(a, formats.BlockScaled) and a.dtype not in _FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {a.dtype}")


def _check_shape(name: str, a, shape: tuple[int, ...], axes: str) -> None:
    if a is not None and a.shape != shape:
        raise ValueError(f"{name} must be {axes} = {shape}, got shape {a.shape}")


def check_precision(precision: MlpPrecision, gate_up: Weight, down: Weight) -> None:
    """Raises ValueError where packed weights have another format than the precision says."""
    for layer, w in ((precision.gate_up, gate_up), (precision.down, down)):
        if isinstance(w, formats.BlockScaled) and layer.w not in (None, w.format):
            raise ValueError(f"precision.w is {layer.w!r}, but the weights are packed {w.format}")


def check_extras(precision: MlpPrecision, key, x_amax: tuple, num_experts: int) -> None:
    """Raises ValueError where a precision needs a key or calibrated maxima that are not there."""
    if precision.needs_key and key is None:
        raise ValueError('rounding="stochastic" needs a key')
    for layer, amax_E in zip((precision.gate_up, precision.down), x_amax, strict=True):
        if layer.x is None or layer.x_scale != "static":
            continue
        if formats.FORMATS[layer.x].scale != "e4m3":
            raise ValueError(f'x_scale="static" is for the NVFP4 formats, not {layer.x}')
        if amax_E is None:
            raise ValueError('x_scale="static" needs the calibrated maxima x_amax')
        _check_shape("x_amax", amax_E, (num_experts,), "(E,)")


def _out_dtype(out_dtype, x) -> jnp.dtype:
    return jnp.dtype(x.dtype if out_dtype is None else out_dtype)


def _finish(backend, y_TN, group_sizes_E, bias_EN, row_scale_T, out_dtype) -> jax.Array:
    """Row scale and bias behind a kernel's product, in float32; zero beyond the groups, and one cast."""
    if row_scale_T is not None:
        y_TN = y_TN * row_scale_T.astype(jnp.float32)[:, None]
    if bias_EN is not None:
        y_TN = operands.plus_bias(y_TN, bias_EN, group_sizes_E, backend.weight_gradient)
    inside_T = jnp.arange(y_TN.shape[0]) < jnp.sum(group_sizes_E)
    return jnp.where(inside_T[:, None], y_TN, 0).astype(out_dtype)
