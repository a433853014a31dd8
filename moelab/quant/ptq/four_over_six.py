"""Four Over Six: each block's largest value is mapped to 6 or to 4, whichever rounds better (arXiv:2512.02010)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from moelab.quant import method
from pallas_kernels import formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(method.Method):
    """Rounds to nearest under the better of two scales per block.

    Attributes:
      error: "mse" or "mae", by which the better one is found; a rule that the caller names goes before it.
    """

    error: str = "mse"

    allowed: ClassVar[tuple[str, ...]] = ("nvfp4_46", "nvfp4_46_2d")

    def __post_init__(self):
        method.check_choice("error", self.error, formats.FORMATS["nvfp4_46"].rules)

    def apply(self, weights, statistics, format, rule) -> method.LayerResult:
        packed = {
            name: method.round_to_nearest(weights[name], format, rule or self.error)
            for name in method.MATRICES
        }
        values = {name: formats.dequantize(q) for name, q in packed.items()}
        return method.LayerResult(packed, None, method.errors(weights, values, statistics))
