"""AWQ: channels with large inputs get finer steps, by a scale that is searched on a grid.

    s = (mean |x|)^alpha / sqrt(max * min),   W' = W * s,   x' = x / s

alpha = 0 scales nothing and is on the grid, so the search never ends above rounding to nearest. gate_up's scale is one
for the layer (its input is shared by the experts); down's is each expert's own and goes into the rows of `up`.

E experts, D model width, F expert width, A values of alpha.

Reference: arXiv:2306.00978, without its search of clipping thresholds.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moelab.quant import method, scale_folding
from pallas_kernels import formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(method.Method):
    """Rounds to nearest after scaling each channel by a power of its mean input.

    Attributes:
      steps: alpha is searched among 0, 1 / steps, ..., 1.
    """

    steps: int = 20

    needs_statistics: ClassVar[bool] = True

    def __post_init__(self):
        method.check_between("steps", self.steps, 1, 1000)

    def apply(self, weights, statistics, format, rule) -> method.LayerResult:
        alpha_A = np.arange(self.steps + 1, dtype=np.float32) / np.float32(self.steps)
        # The layer's output error is the sum over tokens, whichever expert they went to.
        tokens_E = np.maximum(statistics.tokens_E, 1).astype(np.float32)
        mean_D = np.average(statistics.gate_up.mean_abs_EK, axis=0, weights=tokens_E)
        mean_D = jnp.asarray(mean_D, jnp.float32)
        mean_EF = jnp.asarray(statistics.down.mean_abs_EK)

        def errors(name, mean):
            hessian_EKK = method.hessian_of(statistics, name)
            return _grid(weights[name], hessian_EKK, mean, alpha_A, format=format, rule=rule)

        error_AE = errors("gate_up", jnp.broadcast_to(mean_D[None], (len(tokens_E), len(mean_D))))
        alpha = alpha_A[np.argmin(np.asarray(error_AE) @ tokens_E)]
        alpha_E = alpha_A[np.argmin(np.asarray(errors("down", mean_EF)), axis=0)]
        scales = scale(mean_D, jnp.asarray(alpha)), scale(mean_EF, jnp.asarray(alpha_E)[:, None])
        extra = {"gate_up": {"alpha": float(alpha)}, "down": {"alpha": alpha_E.tolist()}}
        return scale_folding.quantize_folded(weights, statistics, scales, format, rule, extra)


def scale(mean: jax.Array, alpha: jax.Array) -> jax.Array:
    """Returns the centred channel scales of mean magnitudes [..., K] for alpha, a scalar or of mean's leading axes."""
    return scale_folding.centred(
        scale_folding.at_least_some(mean) ** jnp.broadcast_to(alpha, mean.shape)
    )


@functools.partial(jax.jit, static_argnames=("format", "rule"))
def _grid(w_ENK, hessian_EKK, mean_EK, alpha_A, *, format: str, rule: str | None) -> jax.Array:
    """Returns each expert's output error for each alpha: (A, E)."""

    def error(alpha):
        s_E1K = scale(mean_EK, alpha)[:, None, :]
        value = formats.dequantize(method.round_to_nearest(w_ENK * s_E1K, format, rule))
        return method.output_error(value / s_E1K - w_ENK, hessian_EKK)

    return lax.map(error, jnp.asarray(alpha_A))
