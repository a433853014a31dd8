"""A limit on the assignments of one expert: who stays and who is dropped.

T tokens, E experts, K slots per token, N = T*K assignments.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moelab.routing import Routing


def limit(num_assignments: int, num_experts: int, factor: float) -> int:
    """Returns ceil(factor * N / E), the assignments one expert may take, at least 1."""
    return max(1, math.ceil(factor * num_assignments / num_experts))


def drop(
    routing: Routing, num_experts: int, slots: int, limit: int, priority_T: jax.Array | None = None
) -> Routing:
    """Sends assignments beyond `limit` per expert to no expert, in slot-major priority.

    All first choices come before all second choices (GShard, arXiv:2006.16668, algorithm 1; V-MoE, arXiv:2106.05974).
    Within a slot tokens come in order, or in descending priority: V-MoE's batch prioritised routing. Weights of kept
    assignments are unchanged.

    Args:
      routing: token choice with N = T*slots in token-major order.
      num_experts: E; experts without computation have no limit.
      slots: assignments per token.
      limit: assignments that one expert may take.
      priority_T: float32, or None for the order of the tokens.

    Returns:
      The routing with expert_N == E and weight 0 where the capacity was exceeded.
    """
    expert_TK = routing.expert_N.reshape(-1, slots)
    num_tokens = expert_TK.shape[0]
    turn_T = jnp.arange(num_tokens)
    if priority_T is not None:
        turn_T = jnp.argsort(-jax.lax.stop_gradient(priority_T), stable=True)
    queue_N = expert_TK[turn_T].T.reshape(-1)  # slot-major
    order_N = jnp.argsort(queue_N, stable=True)
    sorted_N = queue_N[order_N]
    start_N = jnp.searchsorted(sorted_N, sorted_N, side="left")
    rank_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(order_N.size) - start_N)
    stays_TK = (rank_N < limit).reshape(slots, -1).T
    stays_TK = jnp.zeros_like(stays_TK).at[turn_T].set(stays_TK) | (expert_TK > num_experts)
    stays_N = stays_TK.reshape(-1)
    return routing._replace(
        expert_N=jnp.where(stays_N, routing.expert_N, num_experts),
        weight_N=jnp.where(stays_N, routing.weight_N, 0),
    )
