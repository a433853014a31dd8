"""Experts without computation (MoE++, arXiv:2410.07348, section 3.1): zero, copy and constant.

    zero(x) = 0,   copy(x) = x,   constant_j(x) = a1 x + a2 v_j  with  [a1, a2] = softmax(x W_j)

T tokens, D model width, S idle experts, J of them constant.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moelab.routing import Routing

KINDS = ("zero", "copy", "constant")


def init(key: jax.Array, kinds: tuple[str, ...], width: int) -> dict[str, jax.Array]:
    """Draws the parameters of the constant experts: vector (J, D) and kernel (J, D, 2), float32."""
    count = kinds.count("constant")
    vector_key, kernel_key = jax.random.split(key)
    return {
        "vector": jax.random.normal(vector_key, (count, width)) * 0.02,
        "kernel": jax.random.normal(kernel_key, (count, width, 2)) * width**-0.5,
    }


def apply(
    params: dict[str, jax.Array],
    kinds: tuple[str, ...],
    x_TD: jax.Array,
    routing: Routing,
    num_experts: int,
) -> jax.Array:
    """Returns what the idle experts add, in the dtype of x: (T, D).

    Args:
      params: from `init`.
      kinds: kind of each id above num_experts, in order.
      x_TD: tokens.
      routing: local to the device, token choice.
      num_experts: E.
    """
    num_tokens = x_TD.shape[0]
    slots = routing.expert_N.size // max(num_tokens, 1)
    expert_TK = routing.expert_N.reshape(num_tokens, slots)
    weight_TK = routing.weight_N.reshape(num_tokens, slots)
    x32_TD = x_TD.astype(jnp.float32)

    def share(index: int) -> jax.Array:
        mine_TK = expert_TK == num_experts + 1 + index
        return jnp.sum(jnp.where(mine_TK, weight_TK, 0), axis=1, keepdims=True)

    y_TD, constants = jnp.zeros_like(x32_TD), 0
    for index, kind in enumerate(kinds):
        if kind == "copy":
            y_TD = y_TD + share(index) * x32_TD
        if kind == "constant":
            mix_T2 = jax.nn.softmax(x32_TD @ params["kernel"][constants], axis=-1)
            vector_D = params["vector"][constants]
            mixed_TD = mix_T2[:, :1] * x32_TD + mix_T2[:, 1:] * vector_D[None]
            y_TD = y_TD + share(index) * mixed_TD
            constants += 1
    return y_TD.astype(x_TD.dtype)
