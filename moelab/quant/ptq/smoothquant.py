"""SmoothQuant: channels' largest inputs and largest weights share the range.

    s = max|x|^alpha / max|w|^(1 - alpha),   W' = W * s,   x' = x / s

The rows that enter gate_up are shared by a layer's experts, so the experts' scales are aggregated by their maximum
(EAQuant, arXiv:2506.13329, cross-expert smoothing); down's is each expert's own and goes into the rows of `up`.

E experts, N output rows, K inputs, D model width, F expert width.

Reference: arXiv:2211.10438.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moelab.quant import method, scale_folding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(method.Method):
    """Rounds to nearest after scaling each channel by the ratio of its largest input and weight.

    Attributes:
      alpha: 1 takes all outliers out of the inputs, 0 out of the weights.
    """

    alpha: float = 0.5

    needs_statistics: ClassVar[bool] = True

    def __post_init__(self):
        method.check_between("alpha", self.alpha, 0, 1)

    def apply(self, weights, statistics, format, rule) -> method.LayerResult:
        gate_up_ED = scale(
            weights["gate_up"], jnp.asarray(statistics.gate_up.max_abs_EK), self.alpha
        )
        down_EF = scale(weights["down"], jnp.asarray(statistics.down.max_abs_EK), self.alpha)
        gate_up_D = scale_folding.centred(gate_up_ED.max(axis=0))
        scales = gate_up_D, scale_folding.centred(down_EF)
        return scale_folding.quantize_folded(weights, statistics, scales, format, rule, {})


def scale(w_ENK: jax.Array, max_abs_EK: jax.Array, alpha: float) -> jax.Array:
    """Returns each expert's scale per channel, (E, K) float32; ones where no row came."""
    largest_EK = scale_folding.at_least_some(jnp.abs(w_ENK).max(axis=1))
    seen_EK = scale_folding.at_least_some(max_abs_EK)
    found_EK = seen_EK ** jnp.float32(alpha) / largest_EK ** jnp.float32(1 - alpha)
    return jnp.where(max_abs_EK.max(axis=1, keepdims=True) > 0, found_EK, jnp.float32(1))
