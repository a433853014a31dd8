"""Round to nearest: the baseline, with the scales of the block maxima or searched ones.

The search over scales is MR-GPTQ's idea (arXiv:2509.23202), here over all neighbouring scale bytes.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from moelab.quant import method, scale_search
from pallas_kernels import formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(scale_search.Searched):
    """Rounds every weight to the nearest code. Without a search, to any format."""

    allowed: ClassVar[tuple[str, ...]] = tuple(formats.FORMATS)

    @property
    def needs_statistics(self) -> bool:
        """A search by the error of the outputs needs their Hessians."""
        return self.search == "output"

    def apply(self, weights, statistics, format, rule) -> method.LayerResult:
        packed = {
            name: self.rounded(weights[name], method.hessian_of(statistics, name), format, rule)
            for name in method.MATRICES
        }
        values = {name: formats.dequantize(q) for name, q in packed.items()}
        return method.LayerResult(packed, None, method.errors(weights, values, statistics))
