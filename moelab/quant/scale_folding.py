"""Channel scales that move between matrices without changing the function: x' = x / s, W' = W * s.

The rows that enter gate_up are shared by the layer's experts, so its scale is one per channel and multiplies the rows
(the inverse, `input_scale`). The hidden row is silu(gate) * up, linear in up: down's scale goes into the rows of `up`,
one per expert and channel.

E experts, D model width, F expert width, G = 2F.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moelab.quant import method
from moelab.quant.statistics import LayerStatistics
from pallas_kernels import formats

_SMALLEST = (
    1e-4  # of the largest statistic: a channel that never fires must not get a scale of zero
)


def fold(
    weights: method.Weights, gate_up_scale_D: jax.Array, down_scale_EF: jax.Array
) -> dict[str, jax.Array]:
    """Scales both matrices' inputs: weights whose function of x / gate_up_scale is the old one of x.

    Args:
      weights: float32 gate_up (E, G, D), gate rows first, and down (E, D, F).
      gate_up_scale_D, down_scale_EF: float32, positive.
    """
    row_EG = jnp.concatenate([jnp.ones_like(down_scale_EF), 1 / down_scale_EF], axis=1)
    gate_up = weights["gate_up"] * gate_up_scale_D[None, None, :] * row_EG[:, :, None]
    return {"gate_up": gate_up, "down": weights["down"] * down_scale_EF[:, None, :]}


def unfold(
    weights: method.Weights, gate_up_scale_D: jax.Array, down_scale_EF: jax.Array
) -> dict[str, jax.Array]:
    """Inverts `fold`, up to rounding."""
    return fold(weights, 1 / gate_up_scale_D, 1 / down_scale_EF)


def centred(scale: jax.Array) -> jax.Array:
    """Divides by the geometric mean of the last axis's largest and smallest; all ones where that is nothing."""
    largest = scale.max(axis=-1, keepdims=True)
    middle = jnp.sqrt(largest * scale.min(axis=-1, keepdims=True))
    usable = jnp.isfinite(middle) & (middle > 0)
    return jnp.where(usable, scale / jnp.where(usable, middle, jnp.float32(1)), jnp.float32(1))


def at_least_some(statistic: jax.Array) -> jax.Array:
    """Lifts what is nearly zero to 1e-4 of the largest of the last axis, and zeros alone to 1."""
    largest = statistic.max(axis=-1, keepdims=True)
    lifted = jnp.maximum(statistic, largest * jnp.float32(_SMALLEST))
    return jnp.where(largest > 0, lifted, jnp.float32(1))


def quantize_folded(
    weights: method.Weights,
    statistics: LayerStatistics,
    scales: tuple[jax.Array, jax.Array],
    format: str,
    rule: str | None,
    extra: Mapping[str, Mapping[str, Any]],
) -> method.LayerResult:
    """Folds (gate_up_scale_D, down_scale_EF) in, rounds to nearest, and reports with `extra` per matrix."""
    folded = fold(weights, *scales)
    packed = {name: method.round_to_nearest(folded[name], format, rule) for name in method.MATRICES}
    values = {name: formats.dequantize(q) for name, q in packed.items()}
    report = method.errors(weights, unfold(values, *scales), statistics)
    for name, scale in zip(method.MATRICES, scales, strict=True):
        seen_EK = jnp.asarray(method.inputs_of(statistics, name).max_abs_EK)
        scaled_EK = seen_EK / jnp.broadcast_to(scale, seen_EK.shape)
        report[name] |= {"input_amax": scaled_EK.max(axis=1).tolist()} | dict(extra.get(name, {}))
    return method.LayerResult(packed | {method.INPUT_SCALE: 1 / scales[0]}, None, report)
