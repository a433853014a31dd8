"""The entropy loss makes routers decide: it penalises flat distributions (Huang et al., arXiv:2403.07652).

    loss = mean over tokens of -sum_i p_i log p_i    (nats)

Without it the router of `top_p` flattens p and takes ever more experts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing, scores
from moelab.router import Router
from moelab.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.Mechanism):
    """Penalises the entropy of each token's normalised scores."""

    steers = "scores"

    coefficient: float = 0.0  # factor of the loss; 0: off; 0.0001 in the paper

    def loss(self, routing: Routing, state: balancing.State, router: Router) -> jax.Array:
        """Mean entropy over the valid tokens, nats."""
        del state, router
        entropy_T = scores.entropy(routing.aux.prob_TC)
        mask_T = routing.aux.mask_T
        total = jnp.sum(jnp.where(mask_T, entropy_T, 0))
        return total / jnp.maximum(jnp.sum(mask_T), 1).astype(jnp.float32)
