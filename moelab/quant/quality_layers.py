"""Each expert's error: the same rows, by the same routes, through the experts of two models.

T tokens, D model width, N assignments, E experts.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels


class Errors(NamedTuple):
    """Sums of squares of one MoE layer's outputs, float32.

    Attributes:
      error_E, power_E: of each expert's rows: difference, and reference.
      rows_E: how many rows.
      error, power: of the combined output of the routed experts.
    """

    error_E: jax.Array
    power_E: jax.Array
    rows_E: jax.Array
    error: jax.Array
    power: jax.Array


@functools.partial(jax.jit, static_argnames=("precisions",))
def layer_errors(
    x_TD: jax.Array,
    routing: tuple[jax.Array, jax.Array, jax.Array],
    weights: dict[str, Any],
    other: dict[str, Any],
    precisions: tuple[pallas_kernels.MlpPrecision | None, pallas_kernels.MlpPrecision | None],
) -> Errors:
    """Sends the same rows, by the same routes, through the experts of two models.

    Args:
      x_TD: rows that enter the layer.
      routing: token_N, expert_N, weight_N.
      weights, other: experts of the reference and of the quantized model, as experts.apply takes them.
      precisions: of both.
    """
    token_N, expert_N, weight_N = routing
    num_experts = weights["gate_up"].shape[0]
    expert_N = jnp.minimum(expert_N, num_experts)  # experts without computation are nobody here
    order_N = jnp.argsort(expert_N, stable=True)
    token_N, expert_N, weight_N = (a[order_N] for a in (token_N, expert_N, weight_N))
    rows_E = jnp.bincount(expert_N, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    x_ND = x_TD[token_N]
    y_ND = _through(x_ND, weights, rows_E, precisions[0])
    difference_ND = _through(x_ND, other, rows_E, precisions[1]) - y_ND

    def by_expert(a_ND):
        return jax.ops.segment_sum(jnp.sum(a_ND * a_ND, axis=1), expert_N, num_experts + 1)[
            :num_experts
        ]

    def combined(a_ND):
        y_TD = jax.ops.segment_sum(a_ND * weight_N[:, None], token_N, x_TD.shape[0])
        return jnp.sum(y_TD * y_TD)

    return Errors(
        by_expert(difference_ND), by_expert(y_ND), rows_E, combined(difference_ND), combined(y_ND)
    )


def _through(x_ND: jax.Array, weights: dict[str, Any], rows_E: jax.Array, precision) -> jax.Array:
    if "input_scale" in weights:
        x_ND = (x_ND * weights["input_scale"][None]).astype(x_ND.dtype)
    amax = tuple(
        weights[name] if name in weights else None for name in ("gate_up_amax", "down_amax")
    )
    return pallas_kernels.expert_mlp(
        x_ND,
        weights["gate_up"],
        weights["down"],
        rows_E,
        precision=precision,
        x_amax=amax,
        out_dtype=jnp.float32,
    )
