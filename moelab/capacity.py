"""A limit on the assignments of one expert: who stays and who is dropped.

T tokens, V of them valid, E experts, K slots per token, N = T*K assignments.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from moelab.routing import Routing


def limit(num_assignments: int, num_experts: int, factor: float) -> int:
    """Returns ceil(factor * N / E), the assignments one expert may take, at least 1.

    Raises:
      ValueError: a factor that is not a number above 0, or no experts.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"a capacity factor must be a finite number above 0, got {factor}")
    if num_experts < 1:
        raise ValueError(f"a capacity is shared by at least 1 expert, got {num_experts}")
    return max(1, math.ceil(factor * num_assignments / num_experts))


def limit_of_valid(mask_T: jax.Array, k: int, num_experts: int, factor: float) -> jax.Array:
    """Returns `limit` for the valid tokens alone, ceil(factor * k * V / E), at most k * T: int32 scalar.

    How many tokens are valid is known at run time only. A table has the limit of every possible number, since float32
    would round factor * k * V / E before the ceiling.

    Args:
      mask_T: bool; padding makes no room.
      k: assignments per valid token.
      num_experts: E.
      factor: places over those that a perfect balance needs.
    """
    limit(0, num_experts, factor)  # for what it refuses
    assignments_V = k * np.arange(mask_T.shape[0] + 1)
    limit_V = np.maximum(1, np.ceil(factor * assignments_V / num_experts))
    # More places than there are assignments are no limit, and might not be an int32.
    limit_V = np.minimum(limit_V, max(1, assignments_V[-1])).astype(np.int32)
    return jnp.asarray(limit_V)[jnp.sum(mask_T, dtype=jnp.int32)]


def drop(
    routing: Routing,
    num_experts: int,
    slots: int,
    limit: int | jax.Array,
    priority_T: jax.Array | None = None,
) -> Routing:
    """Sends assignments beyond `limit` per expert to no expert, in slot-major priority.

    All first choices come before all second choices (GShard, arXiv:2006.16668, algorithm 1; V-MoE, arXiv:2106.05974).
    Within a slot tokens come in order, or in descending priority: V-MoE's batch prioritised routing. Weights of kept
    assignments are unchanged.

    Args:
      routing: token choice with N = T*slots in token-major order.
      num_experts: E; experts without computation have no limit.
      slots: assignments per token.
      limit: assignments that one expert may take, an int or an int32 scalar.
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
