"""The value that routers make and experts consume, and the pure maths that routers share.

T tokens, E experts, K experts per token, N assignments, C capacity, D model width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterInput(NamedTuple):
    """What a router may look at besides the token's vector. T is local to the device.

    Attributes:
      token_id_T: int32 vocabulary ids.
      sequence_T: int32, which sequence of the batch a token belongs to.
      position_T: int32, index of the token in the step's batch; noise is keyed by (step, position).
      mask_T: bool, False for padding: routed nowhere, counted nowhere.
      domain_T: int32 domain of the text; -1 where unknown.
      step: () int32 optimizer step.
      previous_logit_TE: float32 logits of the MoE layer before, or None.
      replay_TK: int32 experts to select instead of the router's own choice, or None.
      train: Python bool; noise and dropping may differ between training and evaluation.
    """

    token_id_T: jax.Array
    sequence_T: jax.Array
    position_T: jax.Array
    mask_T: jax.Array
    domain_T: jax.Array
    step: jax.Array
    previous_logit_TE: jax.Array | None = None
    replay_TK: jax.Array | None = None
    train: bool = False


class RoutingAux(NamedTuple):
    """What balancing and diagnostics need of a routing decision.

    Attributes:
      logit_TE: float32 raw router logits, before bias and noise.
      prob_TE: float32 scores normalised over the experts: each row sums to 1.
      choice_N: int32 expert chosen before a capacity removed it; E where the token is padding.
      mask_T: bool, valid tokens.
      sequence_T: int32, as in RouterInput.
    """

    logit_TE: jax.Array
    prob_TE: jax.Array
    choice_N: jax.Array
    mask_T: jax.Array
    sequence_T: jax.Array


class Routing(NamedTuple):
    """N assignments of tokens to experts, whatever made them (token choice N = T*K, expert choice N = E*C).

    Invariants: 0 <= token_N < T; expert_N == E means "no expert" (dropped or padded: computed by nobody, counted
    nowhere), and its weight is 0; weight_N is float32; token choice lists n = t*K + slot.

    Attributes:
      token_N: int32 row of the token.
      expert_N: int32 expert, or E for none.
      weight_N: float32 factor of the expert's output in the combined output.
      aux: scores and masks for balancing and diagnostics.
    """

    token_N: jax.Array
    expert_N: jax.Array
    weight_N: jax.Array
    aux: RoutingAux


def logits(x_TD: jax.Array, kernel_DE: jax.Array) -> jax.Array:
    """Multiplies tokens by the router's kernel in float32, whatever the dtype of x.

    Args:
      x_TD: (T, D) any float dtype.
      kernel_DE: (D, E) float32.

    Returns:
      (T, E) float32.
    """
    x_TD, kernel_DE = x_TD.astype(jnp.float32), kernel_DE.astype(jnp.float32)
    return jnp.matmul(x_TD, kernel_DE, precision=jax.lax.Precision.HIGHEST)


def select(value_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
    """Reads value[t, expert[t, k]]: (T, K). The gradient is dense, without a scatter."""
    hit_TKE = (
        expert_TK[:, :, None] == jnp.arange(value_TE.shape[1], dtype=expert_TK.dtype)[None, None]
    )
    return jnp.sum(jnp.where(hit_TKE, value_TE[:, None, :], 0), axis=-1)


def from_token_choice(
    expert_TK: jax.Array,
    weight_TK: jax.Array,
    logit_TE: jax.Array,
    prob_TE: jax.Array,
    inputs: RouterInput,
) -> Routing:
    """Lists the assignments token by token, slot by slot; padding is sent to no expert."""
    num_tokens, k = expert_TK.shape
    valid_T1 = inputs.mask_T[:, None]
    expert_N = jnp.where(valid_T1, expert_TK, logit_TE.shape[1]).astype(jnp.int32).reshape(-1)
    token_N = jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), k)
    weight_N = jnp.where(valid_T1, weight_TK, 0).reshape(-1)
    aux = RoutingAux(logit_TE, prob_TE, expert_N, inputs.mask_T, inputs.sequence_T)
    return Routing(token_N, expert_N, weight_N, aux)


def from_expert_choice(
    token_EC: jax.Array,
    weight_EC: jax.Array,
    logit_TE: jax.Array,
    prob_TE: jax.Array,
    inputs: RouterInput,
) -> Routing:
    """Lists the assignments expert by expert; padding that an expert had to take is sent to no expert."""
    num_experts = logit_TE.shape[1]
    token_N = token_EC.astype(jnp.int32).reshape(-1)
    valid_N = inputs.mask_T[token_N]
    owner_N = jnp.repeat(jnp.arange(num_experts, dtype=jnp.int32), token_EC.shape[1])
    expert_N = jnp.where(valid_N, owner_N, num_experts)
    weight_N = jnp.where(valid_N, weight_EC.reshape(-1), 0)
    aux = RoutingAux(logit_TE, prob_TE, expert_N, inputs.mask_T, inputs.sequence_T)
    return Routing(token_N, expert_N, weight_N, aux)


def capacity(num_assignments: int, num_experts: int, factor: float) -> int:
    """Returns C = ceil(factor * N / E), the assignments one expert may take, at least 1."""
    return max(1, math.ceil(factor * num_assignments / num_experts))


def drop_over_capacity(routing: Routing, num_experts: int, k: int, limit: int) -> Routing:
    """Sends assignments beyond `limit` per expert to no expert, in k-major priority.

    All first choices come before all second choices, and within a choice earlier tokens come first (GShard
    arXiv:2006.16668 algorithm 1; V-MoE arXiv:2106.05974). Weights of kept assignments are unchanged.

    Args:
      routing: token choice with N = T*k in token-major order.
      num_experts: E.
      k: assignments per token.
      limit: C, assignments that one expert may take.

    Returns:
      The routing with expert_N == E and weight 0 where the capacity was exceeded.
    """
    expert_N = routing.expert_N
    priority_N = expert_N.reshape(-1, k).T.reshape(-1)  # k-major
    order_N = jnp.argsort(priority_N, stable=True)
    sorted_N = priority_N[order_N]
    start_N = jnp.searchsorted(sorted_N, sorted_N, side="left")
    rank_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(order_N.size) - start_N)
    keep_N = (rank_N < limit).reshape(k, -1).T.reshape(-1)
    return routing._replace(
        expert_N=jnp.where(keep_N, expert_N, num_experts),
        weight_N=jnp.where(keep_N, routing.weight_N, 0),
    )


def load(expert_N: jax.Array, num_experts: int) -> jax.Array:
    """Counts the assignments of each expert: (E,) float32; "no expert" is left out."""
    count_E = jnp.zeros((num_experts + 1,), jnp.int32).at[expert_N].add(1, mode="drop")
    return count_E[:num_experts].astype(jnp.float32)
