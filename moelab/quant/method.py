"""The contract of post-training quantization methods, and the errors that their reports have.

A method is a frozen dataclass `Method` in a file of `moelab.quant.ptq`: it turns one layer's float32 expert matrices
into packed ones.

E experts, N output rows, K inputs of a matrix, D model width, F expert width, G = 2F.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moelab.quant.statistics import InputStatistics, LayerStatistics
from pallas_kernels import formats

MATRICES = ("gate_up", "down")
INPUT_SCALE = "input_scale"  # of a layer's packed weights: what multiplies the rows that enter it
FP4 = ("nvfp4", "nvfp4_2d", "nvfp4_46", "nvfp4_46_2d", "mxfp4")

Weights = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """A layer's experts, quantized.

    Attributes:
      weights: BlockScaled gate_up (E, G, D) and down (E, D, F), and where the method scales inputs, input_scale:
        float32 (D,) that multiplies the rows before gate_up.
      rotation: block of the Hadamard transform, without signs, that the inputs of both matrices need; None: none.
      report: per matrix the method's numbers, lists over experts.
    """

    weights: dict[str, Any]
    rotation: int | None
    report: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods share: checks of the input. A method fills in `apply`.

    Attributes:
      needs_statistics: whether calibration must have come before.
      allowed: formats that it can make.
    """

    needs_statistics: ClassVar[bool] = False
    allowed: ClassVar[tuple[str, ...]] = FP4

    def quantize(
        self,
        weights: Weights,
        statistics: LayerStatistics | None,
        format: str,
        rule: str | None = None,
    ) -> LayerResult:
        """Quantizes one layer's experts; gate and up of an expert share one global scale.

        Args:
          weights: float gate_up (E, G, D), gate rows first, and down (E, D, F).
          statistics: of calibration; None for methods that need none.
          format: one of `allowed`.
          rule: the format's scale rule; None: its first.

        Raises:
          ValueError: statistics that are missing or of another layer, or a format, rule or shape that does not fit.
        """
        self.check(weights, statistics, format)
        float32 = {name: jnp.asarray(weights[name], jnp.float32) for name in MATRICES}
        return self.apply(float32, statistics, format, rule)

    def apply(
        self, weights: Weights, statistics: LayerStatistics | None, format: str, rule: str | None
    ) -> LayerResult:
        """Does what `quantize` says, on checked float32 weights."""
        raise NotImplementedError

    def check(self, weights: Weights, statistics: LayerStatistics | None, format: str) -> None:
        """Raises ValueError for what does not fit the method."""
        kind = type(self).__module__.rsplit(".", 1)[-1]
        if format not in self.allowed:
            raise ValueError(
                f"method {kind} cannot make format {format!r}; allowed: {', '.join(self.allowed)}"
            )
        if statistics is None:
            if self.needs_statistics:
                raise ValueError(f"method {kind} needs statistics of calibration, got None")
            return
        for name in MATRICES:
            wanted = (weights[name].shape[0], weights[name].shape[2])
            came = inputs_of(statistics, name).mean_abs_EK.shape
            if came != wanted:
                raise ValueError(
                    f"statistics of {name} must have (experts, inputs) = {wanted}, got {came}: of another layer?"
                )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError where a method's field is none of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError where a method's field is outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}")


def inputs_of(statistics: LayerStatistics, matrix: str) -> InputStatistics:
    """Returns the statistics of the inputs of gate_up or down."""
    return statistics.gate_up if matrix == "gate_up" else statistics.down


def hessian_of(statistics: LayerStatistics | None, matrix: str) -> jax.Array | None:
    """Returns the Hessians of a matrix, float32 (E, K, K), or None."""
    return None if statistics is None else jnp.asarray(inputs_of(statistics, matrix).hessian_EKK)


def round_to_nearest(w_ENK: jax.Array, format: str, rule: str | None) -> formats.BlockScaled:
    """Quantizes each expert's matrix with a global scale of its own."""
    return formats.quantize(w_ENK, format, rule=rule, num_batch_axes=1)


@jax.jit
def output_error(delta_ENK: jax.Array, hessian_EKK: jax.Array) -> jax.Array:
    """Returns the mean squared output error of each expert's calibration rows: (E,) float32.

    sum over output rows n of delta[n] hessian delta[n]^T
    """
    product_ENK = jnp.matmul(delta_ENK, hessian_EKK, precision=lax.Precision.HIGHEST)
    return jnp.sum(product_ENK * delta_ENK, axis=(1, 2))


def errors(
    weights: Weights, found: Weights, statistics: LayerStatistics | None
) -> dict[str, dict[str, Any]]:
    """Reports the relative squared errors of each matrix, lists over experts.

    weight_error is |found - w|^2 / |w|^2. With statistics, output_error is the same of the outputs on calibration's
    rows; 0 / 0 is 0. And input_amax is the largest magnitude that entered, for static activation scales: methods that
    change the inputs must change it.

    Args:
      weights: float32 before.
      found: float32 that the packed weights stand for, where rotations and input scales are undone.
      statistics: of the layer, or None.
    """
    report = {}
    for name in MATRICES:
        delta, w_ENK = found[name] - weights[name], weights[name]
        total = jnp.sum(jnp.square(w_ENK), axis=(1, 2))
        report[name] = {"weight_error": _ratio(jnp.sum(jnp.square(delta), axis=(1, 2)), total)}
        hessian = hessian_of(statistics, name)
        if hessian is not None:
            error, total = output_error(delta, hessian), output_error(w_ENK, hessian)
            report[name]["output_error"] = _ratio(error, total)
            report[name]["input_amax"] = inputs_of(statistics, name).amax_E.tolist()
    return report


def _ratio(error_E: jax.Array, total_E: jax.Array) -> list[float]:
    error, total = np.asarray(error_E, np.float64), np.asarray(total_E, np.float64)
    return np.where(error == 0, 0.0, error / np.where(total > 0, total, 1.0)).tolist()
