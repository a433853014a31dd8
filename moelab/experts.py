"""Expert feed-forwards: the weights, and dispatch -> grouped matmul -> combine on one device's tokens.

T tokens, D model width, F expert width, G = 2F (gate rows, then up rows), E experts, N assignments.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import pallas_kernels
from moelab import exchange
from moelab.quant import linear
from moelab.routing import Routing
from pallas_kernels.grouped_matmul import dispatch

# gate_up and down, and gate_up_bias (E, 2F) and down_bias (E, D) where a model has them; packed ones may come with
# input_scale (D,), which multiplies the rows before gate_up, and with the calibrated maxima gate_up_amax and down_amax
# (E,) of static activation scales.
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


def swiglu(
    x_TD: jax.Array,
    weights: Weights,
    precision: pallas_kernels.MatmulPrecision | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """down(silu(gate(x)) * up(x)) for one dense feed-forward, in the dtype of x (arXiv:2002.05202)."""
    keys = (None, None) if key is None else (linear.fold(key, 0), linear.fold(key, 1))
    hidden_TG = linear.product(x_TD, weights["gate_up"], precision, keys[0])
    gate_TF, up_TF = jnp.split(hidden_TG, 2, axis=-1)
    return linear.product(jax.nn.silu(gate_TF) * up_TF, weights["down"], precision, keys[1])


def cast(weight, dtype, precision: pallas_kernels.MlpPrecision | None):
    """Casts a plain weight to the dtype of the computation where nothing is quantized."""
    return weight.astype(dtype) if isinstance(weight, jax.Array) and precision is None else weight


def apply(
    weights: Weights,
    x_TD: jax.Array,
    routing: Routing,
    *,
    assignments_per_token: int | None,
    activation: pallas_kernels.SwiGLU = pallas_kernels.SWIGLU,
    precision: pallas_kernels.MlpPrecision | None = None,
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Sends each token through its experts and sums what comes back.

    y[t] = sum over assignments n of token t of weight[n] * expert[n](x[t])

    Args:
      weights: gate_up (E, 2F, D) and down (E, D, F), plain arrays or `BlockScaled`; see `Weights`.
      x_TD: (T, D), the dtype of the computation.
      routing: local to the device.
      assignments_per_token: K where the routing is token choice (N = T*K in token-major order), else None.
      activation: between the layers.
      precision: formats of the expert matmuls; None computes in the dtype of x.
      key: for stochastic rounding of gradients.
      implementation: grouped matmul backend; None picks.

    Returns:
      (T, D) in the dtype of x.
    """
    num_experts = weights["gate_up"].shape[0]
    return pallas_kernels.routed_expert_mlp(
        _scaled(x_TD, weights),
        routing.token_N,
        jnp.minimum(routing.expert_N, num_experts),  # ids above E compute nothing
        routing.weight_N,
        cast(weights["gate_up"], x_TD.dtype, precision),
        cast(weights["down"], x_TD.dtype, precision),
        assignments_per_token=assignments_per_token,
        precision=precision,
        x_amax=_pair(weights, "amax"),
        bias=_pair(weights, "bias"),
        activation=activation,
        key=key,
        implementation=implementation,
    )


def apply_parallel(
    weights: Weights,
    x_TD: jax.Array,
    routing: Routing,
    *,
    assignments_per_token: int | None,
    axis: str,
    receive_factor: float,
    activation: pallas_kernels.SwiGLU = pallas_kernels.SWIGLU,
    precision: pallas_kernels.MlpPrecision | None = None,
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `apply`, with the experts split over the devices of a mesh axis: rows travel, weights do not.

    Args:
      weights: of this device's experts alone, the E / P that follow those of the device before.
      x_TD, routing, assignments_per_token, activation, precision, key, implementation: as in `apply`; experts by global
        number.
      axis: mesh axis.
      receive_factor: rows that a device makes room for, over the N assignments of its own; 0: all that can come.

    Returns:
      (T, D) in the dtype of x, and (N,) whether an assignment was computed or had no expert anyway: False where its
      device had no room.
    """
    num_devices = jax.lax.axis_size(axis)
    num_experts, count = weights["gate_up"].shape[0] * num_devices, routing.token_N.shape[0]
    expert_N = jnp.minimum(routing.expert_N, num_experts)
    plan = dispatch.make_plan(
        routing.token_N, expert_N, x_TD.shape[0], num_experts, assignments_per_token
    )
    rows = exchange.room(count, num_devices, receive_factor)
    swap = exchange.plan(plan.group_sizes_E, count, rows, axis)
    x_RD = exchange.to_experts(dispatch.dispatch(_scaled(x_TD, weights), plan), swap, axis)
    y_RD = pallas_kernels.expert_mlp(
        x_RD,
        cast(weights["gate_up"], x_TD.dtype, precision),
        cast(weights["down"], x_TD.dtype, precision),
        swap.sizes_S,
        precision=precision,
        x_amax=_pair(weights, "amax"),
        bias=_pair(weights, "bias"),
        activation=activation,
        key=key,
        implementation=implementation,
    )
    y_ND = exchange.to_tokens(y_RD, swap, axis)
    y_TD = dispatch.combine(y_ND, routing.weight_N.astype(jnp.float32), plan, x_TD.shape[0])
    kept_N = (swap.kept_N | (jnp.arange(count) >= plan.kept))[plan.position_N]
    return y_TD.astype(x_TD.dtype), kept_N


def _scaled(x_TD: jax.Array, weights: Weights) -> jax.Array:
    if "input_scale" not in weights:
        return x_TD
    return (x_TD * weights["input_scale"][None]).astype(x_TD.dtype)


def _pair(weights: Weights, name: str) -> tuple[jax.Array | None, jax.Array | None]:
    return tuple(weights.get(f"{layer}_{name}") for layer in ("gate_up", "down"))
