"""Signal-to-noise ratios of experts: of their weights, and ranks of their errors.

E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from moelab import step as step_lib
from pallas_kernels import formats

MATRICES = ("gate", "up", "down")


def sqnr(signal: float, noise: float) -> float:
    """Returns 10 log10(signal / noise) in dB of two sums of squares: infinite without noise, NaN without signal.

    >>> sqnr(100.0, 1.0)
    20.0
    """
    if not signal > 0 or math.isnan(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf


def weights(
    params: Mapping[str, Any], quantized: Mapping[str, Any], rotation: int | None = None
) -> dict[str, Any]:
    """Compares the experts' weights with the values that the packed ones stand for.

    SQNR = 10 log10(sum w^2 / sum (w - q)^2) in dB. An input factor and a rotation are undone in q. What a method moves
    from one matrix into another without changing the function (AWQ and SmoothQuant do, between down and up) would count
    as error here: see `reported_weights`.

    Args:
      params: float32 parameters.
      quantized: the collection of that name.
      rotation: block of the Hadamard transform that the method put into the weights, or None.

    Returns:
      For gate, up and down: `layers` (dB per MoE layer; None where the experts stay plain), `all` (dB of their sums).
    """
    sums = []
    for plain, packed in zip(experts_of(params), experts_of(params, quantized), strict=True):
        sums.append(_matrix_sums(plain, packed, rotation))
    return _ratios(sums)


def reported_weights(
    params: Mapping[str, Any], quantized: Mapping[str, Any], report: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what `weights` does, for gate_up and down, from the relative errors that a method reported.

    Args:
      params, quantized: as in `weights`.
      report: of ptq.quantize_params: per layer and matrix weight_error, |q - w|^2 / |w|^2 of each expert.
    """
    layers = zip(
        experts_of(params), experts_of(params, quantized), report["layers"].values(), strict=True
    )
    sums = [
        {
            name: _reported_sums(plain[name], packed[name], found[name])
            for name in ("gate_up", "down")
        }
        for plain, packed, found in layers
    ]
    return _ratios(sums)


def _reported_sums(plain: Any, packed: Any, found: Mapping) -> tuple[float, float] | None:
    if not isinstance(packed, formats.BlockScaled):
        return None
    signal_E = (np.asarray(plain, np.float64) ** 2).sum((1, 2))
    return float(signal_E.sum()), float((signal_E * np.asarray(found["weight_error"])).sum())


def _ratios(sums: list[dict[str, tuple[float, float] | None]]) -> dict[str, Any]:
    """SQNR per layer and over all layers, by matrix."""
    result = {}
    for name in sums[0]:
        pairs = [found[name] for found in sums]
        known = [pair for pair in pairs if pair is not None]
        total = np.sum(known, axis=0) if known else (math.nan, math.nan)
        layers = [None if pair is None else sqnr(*pair) for pair in pairs]
        result[name] = {"layers": layers, "all": sqnr(*map(float, total))}
    return result


def _matrix_sums(plain: Mapping, packed: Mapping, rotation: int | None) -> dict[str, Any]:
    """Sums of squares of weights and errors of gate, up and down, float64; None for those that are not packed."""
    sums = {}
    for role, names in (("gate_up", ("gate", "up")), ("down", ("down",))):
        if not isinstance(packed[role], formats.BlockScaled):
            sums |= dict.fromkeys(names)
            continue
        value = formats.dequantize(packed[role])
        if rotation:
            value = formats.inverse_block_hadamard(value, rotation)
        if role == "gate_up" and "input_scale" in packed:
            value = value * packed["input_scale"][None, None]
        pair = (np.asarray(a, np.float64) for a in (plain[role], value))
        parts = zip(names, *(np.split(a, len(names), axis=1) for a in pair), strict=True)
        sums |= {name: (float((w**2).sum()), float(((w - q) ** 2).sum())) for name, w, q in parts}
    return sums


def experts_of(params: Mapping[str, Any], quantized: Mapping[str, Any] | None = None) -> list[dict]:
    """Returns the experts of each MoE layer in the order of the blocks, the packed ones where there are any."""
    found = []
    names = {name for tree in (params, quantized or {}) for name in tree}
    for segment in sorted(n for n in names if n.startswith("segment_")):
        blocks: dict[str, dict] = {}
        for tree in (params, quantized or {}):
            for block, value in tree.get(segment, {}).items():
                if "moe" in value and "experts" in value["moe"]:
                    blocks[block] = blocks.get(block, {}) | value["moe"]["experts"]
        found.append((int(segment.split("_")[1]), blocks))
    return step_lib.in_block_order(tuple(blocks for _, blocks in sorted(found, key=lambda p: p[0])))


def rank_correlation(rows_E: np.ndarray, power_E: np.ndarray, error_E: np.ndarray) -> dict | None:
    """Correlates the ranks of experts' load and of their relative error (Spearman).

    Returns:
      rho, p and the number of experts that had rows; None with fewer than 3, or where all have one load or one error.
    """
    used = (rows_E > 0) & (power_E > 0)
    load, error = rows_E[used], error_E[used] / power_E[used]
    if used.sum() < 3 or np.ptp(load) == 0 or np.ptp(error) == 0:
        return None
    found = stats.spearmanr(load, error)
    return {"rho": float(found.statistic), "p": float(found.pvalue), "experts": int(used.sum())}
