"""Which operand of a matmul is quantized to which format, and the two quantizations every backend shares.

T rows, K contraction axis, E experts, N output axis.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import formats

Weight = jax.Array | formats.BlockScaled

X_SCALES = ("per_token", "per_tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulPrecision:
    """Formats of the operands of y = x @ w.T in the forward pass. Hashable, so it can be static.

    Gradients are those of the unquantized product (straight-through).

    Attributes:
      x: key of `formats.FORMATS` for the activations; None leaves them in float.
      w: the same for plain weights. Weights that are already `BlockScaled` keep their own format.
      x_scale: "per_token": a row's global scale comes from that row only, so no token sees another. "per_tensor": from
        all rows that belong to a group, which lets a later token change an earlier one's result.
      rule: scale rule for both operands; None is each format's own default.
      dy: format of the output gradient; must be None, quantized backward products are not implemented yet.
      hadamard: block of the random Hadamard transform before quantization; must be None so far.
      rounding: stochastic rounding; must be None (to nearest) so far.
    """

    x: str | None = None
    w: str | None = None
    x_scale: str = "per_token"
    rule: str | None = None
    dy: str | None = None
    hadamard: int | None = None
    rounding: str | None = None

    def __post_init__(self):
        for name in ("x", "w"):
            value = getattr(self, name)
            if value is not None and value not in formats.FORMATS:
                allowed = ", ".join(formats.FORMATS)
                raise ValueError(f"unknown format {name}={value!r}; allowed: {allowed} or None")
        if self.x_scale not in X_SCALES:
            raise ValueError(f"unknown x_scale {self.x_scale!r}; allowed: {', '.join(X_SCALES)}")
        for name in ("dy", "hadamard", "rounding"):
            if getattr(self, name) is not None:
                value = getattr(self, name)
                raise NotImplementedError(f"{name} must be None for now, got {value!r}")


PLAIN = MatmulPrecision()


def quantize_rows(x_TK: jax.Array, precision: MatmulPrecision, valid_T: jax.Array) -> jax.Array:
    """Returns the values that quantized activations stand for, in the dtype of x.

    Args:
      x_TK: activations.
      precision: says the format and what shares a scale.
      valid_T: bool, rows that belong to a group; the others are left out of a per-tensor scale.
    """
    if precision.x is None:
        return x_TK
    num_batch_axes = 0
    if precision.x_scale == "per_token":
        num_batch_axes = x_TK.ndim - 1
    else:
        x_TK = jnp.where(valid_T[:, None], x_TK, jnp.zeros((), x_TK.dtype))
    q = formats.quantize(x_TK, precision.x, rule=precision.rule, num_batch_axes=num_batch_axes)
    return formats.dequantize(q, x_TK.dtype)


def expert_weight(w: Weight, expert: jax.Array | int, precision: MatmulPrecision) -> jax.Array:
    """Returns one expert's (N, K) float32 weight as the forward product sees it."""
    w_NK = jax.tree.map(lambda leaf: leaf[expert], w)
    if isinstance(w, formats.BlockScaled):
        return formats.dequantize(w_NK, jnp.float32)
    if precision.w is None:
        return w_NK.astype(jnp.float32)
    return formats.dequantize(formats.quantize(w_NK, precision.w, rule=precision.rule), jnp.float32)
