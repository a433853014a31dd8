"""MR-GPTQ: a block Hadamard transform of the inputs, then a scale search and GPTQ (arXiv:2509.23202).

    (x R) (w R)^T = x w^T,   hessian of x R: R^T hessian R

R is block-diagonal, orthonormal and without signs. The rows that enter both matrices must be transformed at run time by
`formats.block_hadamard(x, rotation)`.

E experts, N output rows, K inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moelab.quant import method
from moelab.quant.ptq import gptq
from pallas_kernels import formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(gptq.Method):
    """GPTQ in a rotated basis.

    Attributes:
      rotation: block of the transform: 16, 32, 64 or 128; must divide the inputs of both matrices.
    """

    search: str = "mse"
    rotation: int = 32

    def __post_init__(self):
        super().__post_init__()
        formats.hadamard_matrix(self.rotation)  # raises for another block

    def check(self, weights, statistics, format: str) -> None:
        super().check(weights, statistics, format)
        for name in method.MATRICES:
            if weights[name].shape[-1] % self.rotation:
                raise ValueError(
                    f"rotation must divide the inputs of {name}, {weights[name].shape[-1]}, got {self.rotation}"
                )

    def apply(self, weights, statistics, format, rule) -> method.LayerResult:
        rotated = {name: formats.block_hadamard(w, self.rotation) for name, w in weights.items()}
        hessians = {
            name: rotate_hessian(method.hessian_of(statistics, name), self.rotation)
            for name in method.MATRICES
        }
        packed, failed = self.packed(rotated, hessians, format, rule)
        report = method.errors(weights, self._unrotated(packed), statistics)
        for name in method.MATRICES:
            report[name]["without_hessian"] = failed[name]
            del report[name]["input_amax"]  # of rows that are not rotated
        return method.LayerResult(packed, self.rotation, report)

    def _unrotated(self, packed: Mapping[str, formats.BlockScaled]) -> dict[str, jax.Array]:
        values = {name: formats.dequantize(q) for name, q in packed.items()}
        return {
            name: formats.inverse_block_hadamard(v, self.rotation) for name, v in values.items()
        }


def rotate_hessian(hessian_EKK: jax.Array, block: int) -> jax.Array:
    """Returns R^T hessian R, the Hessian of the transformed inputs: float32 (E, K, K)."""
    half_EKK = formats.block_hadamard(hessian_EKK, block)
    return formats.block_hadamard(jnp.swapaxes(half_EKK, 1, 2), block)
