"""Expert feed-forwards: the weights, and dispatch -> grouped matmul -> combine on one device's tokens.

T tokens, D model width, F expert width, G = 2F (gate rows, then up rows), E experts, N assignments.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import pallas_kernels
from moelab.routing import Routing

Weights = dict[str, jax.Array]


def init_swiglu(
    key: jax.Array, leading: tuple[int, ...], width: int, hidden: int, output_scale: float
) -> Weights:
    """Draws the weights of SwiGLU feed-forwards, [..., out, in] float32, normal with deviation 1/sqrt(in).

    Args:
      key: PRNG key.
      leading: leading axes, (E,) for experts and () for one dense feed-forward.
      width: D.
      hidden: F.
      output_scale: factor on the deviation of the output matrix, 1/sqrt(2 * layers) in a residual stream.

    Returns:
      gate_up (..., 2F, D), gate rows first; down (..., D, F).
    """
    gate_up_key, down_key = jax.random.split(key)
    gate_up = jax.random.normal(gate_up_key, (*leading, 2 * hidden, width)) * width**-0.5
    down = jax.random.normal(down_key, (*leading, width, hidden)) * (hidden**-0.5 * output_scale)
    return {"gate_up": gate_up, "down": down}


def swiglu(x_TD: jax.Array, weights: Weights) -> jax.Array:
    """down(silu(gate(x)) * up(x)) for one dense feed-forward, in the dtype of x (arXiv:2002.05202)."""
    gate_up_GD = weights["gate_up"].astype(x_TD.dtype)
    hidden_TG = jax.lax.dot_general(x_TD, gate_up_GD, (((1,), (1,)), ((), ())))
    gate_TF, up_TF = jnp.split(hidden_TG, 2, axis=-1)
    down_DF = weights["down"].astype(x_TD.dtype)
    return jax.lax.dot_general(jax.nn.silu(gate_TF) * up_TF, down_DF, (((1,), (1,)), ((), ())))


def cast(weight, dtype, precision: pallas_kernels.MatmulPrecision | None):
    """Casts a plain weight to the dtype of the computation where nothing is quantized."""
    return weight.astype(dtype) if isinstance(weight, jax.Array) and precision is None else weight


def apply(
    weights: Weights,
    x_TD: jax.Array,
    routing: Routing,
    *,
    assignments_per_token: int | None,
    precision: pallas_kernels.MatmulPrecision | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Sends each token through its experts and sums what comes back.

    y[t] = sum over assignments n of token t of weight[n] * expert[n](x[t])

    Args:
      weights: gate_up (E, 2F, D) and down (E, D, F), plain arrays or `BlockScaled`.
      x_TD: (T, D), the dtype of the computation.
      routing: local to the device.
      assignments_per_token: K where the routing is token choice (N = T*K in token-major order), else None.
      precision: formats of the expert matmuls; None computes in the dtype of x.
      implementation: grouped matmul backend; None picks.

    Returns:
      (T, D) in the dtype of x.
    """
    num_experts = weights["gate_up"].shape[0]
    return pallas_kernels.routed_expert_mlp(
        x_TD,
        routing.token_N,
        jnp.minimum(routing.expert_N, num_experts),  # ids above E compute nothing
        routing.weight_N,
        cast(weights["gate_up"], x_TD.dtype, precision),
        cast(weights["down"], x_TD.dtype, precision),
        assignments_per_token=assignments_per_token,
        precision=precision,
        implementation=implementation,
    )
