"""The load-balancing loss of Switch and GShard, for any k.

    loss = E * sum_i f_i P_i,   f_i = N_i / sum_j N_j,   P_i = mean over tokens of the normalised score of i

Switch Transformer, arXiv:2101.03961, eq. 4-6 (k = 1). For k > 1 the count is divided by all assignments, as in
Megatron-LM and OLMo-core, so that perfect balance is exactly 1; MaxText and Hugging Face leave that division out, and
their coefficient means k times ours.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing
from moelab import routing as routing_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.Mechanism):
    """Pulls the router's mean score away from the experts that are chosen most in the same micro-batch."""

    coefficient: float = 0.0  # factor of the loss; 0: off; 0.01 is usual

    def loss(self, routing: routing_lib.Routing, state: dict[str, jax.Array]) -> jax.Array:
        """E * sum_i f_i P_i over the valid tokens of a micro-batch on all devices; 1 at balance."""
        del state
        num_experts = routing.aux.prob_TE.shape[1]
        count_E = routing_lib.load(routing.aux.choice_N, num_experts)
        share_E = count_E / jnp.maximum(jnp.sum(count_E), 1.0)
        mask_T1 = routing.aux.mask_T[:, None]
        total_E = jnp.sum(jnp.where(mask_T1, routing.aux.prob_TE, 0), axis=0)
        mean_E = total_E / jnp.maximum(jnp.sum(mask_T1), 1).astype(jnp.float32)
        return num_experts * jnp.sum(jax.lax.stop_gradient(share_E) * mean_E)
