"""GPTQ: rounds input by input, and lets the inputs that are still to come make up for each error.

    H = hessian + damping * mean(diag hessian) I,   U^T U = H^-1 (U upper triangular),
    for k = 0, 1, ...:  w'[k] = w[k] - sum over i < k of e[i] U[i, k],   e[k] = (w'[k] - round(w'[k])) / U[k, k]

Scales are fixed before, from the weights as they came (static groups), so the order of the inputs needs no index at run
time. Experts are a batch axis.

N output rows, K inputs of a matrix, B inputs of one pass, E experts.

References: GPTQ, arXiv:2210.17323; for FP4 with static groups and order, MR-GPTQ, arXiv:2509.23202.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moelab.quant import method, scale_search
from pallas_kernels import formats
from pallas_kernels.formats import FORMATS, BlockScaled

_PASS = 128  # inputs whose errors are propagated among each other before the others see them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(scale_search.Searched):
    """Rounds with error propagation. The Hessian may be gate-weighted: that is calibration's choice.

    Attributes:
      damping: share of the mean of the Hessian's diagonal that is added to it.
      activation_order: whether inputs with the largest diagonal come first.
    """

    damping: float = 0.01
    activation_order: bool = True

    needs_statistics: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        method.check_between("damping", self.damping, 1e-6, 10)

    def apply(self, weights, statistics, format, rule) -> method.LayerResult:
        hessians = {name: method.hessian_of(statistics, name) for name in method.MATRICES}
        packed, failed = self.packed(weights, hessians, format, rule)
        values = {name: formats.dequantize(q) for name, q in packed.items()}
        report = method.errors(weights, values, statistics)
        for name in method.MATRICES:
            report[name]["without_hessian"] = failed[name]
        return method.LayerResult(packed, None, report)

    def packed(
        self, weights, hessians, format: str, rule: str | None
    ) -> tuple[dict[str, BlockScaled], dict[str, list[int]]]:
        """Returns both matrices, and the experts that were rounded to nearest since H had no Cholesky factor."""
        packed, failed = {}, {}
        for name in method.MATRICES:
            start = self.rounded(weights[name], hessians[name], format, rule)
            packed[name], good_E = propagate(
                weights[name],
                start,
                hessians[name],
                damping=self.damping,
                activation_order=self.activation_order,
            )
            failed[name] = np.flatnonzero(~np.asarray(good_E)).tolist()
        return packed, failed


@functools.partial(jax.jit, static_argnames=("damping", "activation_order"))
def propagate(
    w_ENK: jax.Array,
    start: BlockScaled,
    hessian_EKK: jax.Array,
    *,
    damping: float,
    activation_order: bool,
) -> tuple[BlockScaled, jax.Array]:
    """Rounds under given scales with error propagation.

    Args:
      w_ENK: float32 weights.
      start: of the same shape; its scales and global amax are used, its codes are not.
      hessian_EKK: float32 Hessians of the inputs.
      damping, activation_order: see `Method`.

    Returns:
      BlockScaled under start's scales, and bool (E,): False where the Hessian gave no finite factor and the expert was
      rounded to nearest.
    """
    one = functools.partial(
        _propagate_one, format=start.format, damping=damping, activation_order=activation_order
    )
    adjusted_ENK, good_E = jax.vmap(one)(w_ENK, start.scales, start.global_amax, hessian_EKK)
    return formats.quantize_with(adjusted_ENK, start), good_E


def _propagate_one(
    w_NK, scale_NB, global_amax, hessian_KK, *, format: str, damping: float, activation_order: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the weights as they are when their turn to be rounded comes."""
    diagonal_K = jnp.diagonal(hessian_KK)
    order_K = jnp.argsort(-diagonal_K, stable=True).astype(jnp.int32)
    if not activation_order:
        order_K = jnp.arange(len(order_K), dtype=jnp.int32)
    upper_KK, good = inverse_factor(hessian_KK[order_K][:, order_K], damping)
    scale_KN = scale_NB.T[order_K // FORMATS[format].block]
    adjusted_KN = _round_in_turn(w_NK.T[order_K], upper_KK, scale_KN, global_amax, format)
    return adjusted_KN[jnp.argsort(order_K)].T, good


def inverse_factor(hessian_KK: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """Returns the upper triangular U with U^T U = H^-1 for the damped H, and whether it is finite; else U = I.

    From one Cholesky factor of H in reversed order: with H = R R^T, R upper triangular, U is R^-1. H is divided by its
    mean diagonal, which changes nothing that GPTQ computes.
    """
    size = hessian_KK.shape[0]
    eye_KK = jnp.eye(size, dtype=jnp.float32)
    mean = jnp.mean(jnp.diagonal(hessian_KK))
    damped_KK = hessian_KK / jnp.where(mean > 0, mean, jnp.float32(jnp.nan))
    damped_KK = damped_KK + jnp.float32(damping) * eye_KK
    reversed_KK = jnp.linalg.cholesky(damped_KK[::-1, ::-1], symmetrize_input=False)
    upper_KK = jax.scipy.linalg.solve_triangular(reversed_KK[::-1, ::-1], eye_KK, lower=False)
    good = jnp.all(jnp.isfinite(upper_KK))
    return jnp.where(good, upper_KK, eye_KK), good


def _round_in_turn(
    w_KN: jax.Array, upper_KK: jax.Array, scale_KN: jax.Array, global_amax, format: str
) -> jax.Array:
    """Goes over the inputs in passes of B: errors of earlier passes come in one product, those within row by row."""
    size = math.gcd(w_KN.shape[0], _PASS)

    def one_pass(index, carry):
        error_KN, adjusted_KN = carry
        first = index * size
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        upper_KB = cut(upper_KK, axis=1)
        earlier_BN = jnp.matmul(upper_KB.T, error_KN, precision=lax.Precision.HIGHEST)
        error_BN, adjusted_BN = _one_by_one(
            cut(w_KN) - earlier_BN, cut(upper_KB), cut(scale_KN), global_amax, format
        )
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return put(error_KN, error_BN), put(adjusted_KN, adjusted_BN)

    empty_KN = jnp.zeros_like(w_KN)
    return lax.fori_loop(0, w_KN.shape[0] // size, one_pass, (empty_KN, empty_KN))[1]


def _one_by_one(
    w_BN: jax.Array, upper_BB: jax.Array, scale_BN: jax.Array, global_amax, format: str
) -> tuple[jax.Array, jax.Array]:
    def one(k, carry):
        error_BN, adjusted_BN = carry
        # Errors of later inputs are still zero.
        earlier_N = jnp.matmul(upper_BB[:, k], error_BN, precision=lax.Precision.HIGHEST)
        w_N = w_BN[k] - earlier_N
        value_N = formats.nearest(w_N, scale_BN[k], global_amax, format)
        error_N = (w_N - value_N) / upper_BB[k, k]
        return error_BN.at[k].set(error_N), adjusted_BN.at[k].set(w_N)

    empty_BN = jnp.zeros_like(w_BN)
    return lax.fori_loop(0, w_BN.shape[0], one, (empty_BN, empty_BN))
