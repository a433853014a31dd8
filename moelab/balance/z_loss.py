"""The router z-loss keeps logits small.

    loss = mean over tokens of (log sum_i exp z_i)^2

ST-MoE, arXiv:2202.08906, eq. 5; on the raw float32 logits; padding is left out (flaxformer multiplies padded logits by
0, so that each still adds log(E)^2).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing
from moelab.router import Router
from moelab.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.Mechanism):
    """Penalises the squared log-sum-exp of the router's logits."""

    steers = "scores"

    coefficient: float = 0.0  # factor of the loss; 0: off; 0.001 is usual

    def loss(self, routing: Routing, state: balancing.State, router: Router) -> jax.Array:
        """Mean squared log-sum-exp over the valid tokens."""
        del state, router
        z_T = jax.nn.logsumexp(routing.aux.logit_TC, axis=-1)
        mask_T = routing.aux.mask_T
        total = jnp.sum(jnp.where(mask_T, jnp.square(z_T), 0))
        return total / jnp.maximum(jnp.sum(mask_T), 1).astype(jnp.float32)
