"""The mutual information of token and expert, maximised: sure for each token, spread over all of them.

    loss = mean_t H(p_t) - H(mean_t p_t) = -I(token; expert)    (nats, between -ln C and 0)

The form of Mod-Squad (Chen et al., arXiv:2212.08066) with tokens in place of tasks; -ln C at perfect balance of
perfectly sure choices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing, scores
from moelab.router import Router
from moelab.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.ScopedLoss):
    """Rewards scores that tell tokens apart."""

    def sums(self, routing: Routing, router: Router) -> dict[str, jax.Array]:
        """Normalised scores and their entropy."""
        del router
        prob_TC, mask_T = routing.aux.prob_TC, routing.aux.mask_T
        entropy_T = scores.entropy(prob_TC)
        return {
            "prob_C": jnp.where(mask_T[:, None], prob_TC, 0),
            "entropy": jnp.where(mask_T, entropy_T, 0),
        }

    def value(self, total: dict[str, jax.Array]) -> jax.Array:
        """Mean entropy minus entropy of the mean."""
        tokens = jnp.maximum(total["token_T"], 1.0)
        spread = scores.entropy(total["prob_C"] / tokens)
        return total["entropy"] / tokens - spread

    def balanced(self, router: Router) -> dict[str, jax.Array]:
        """Equal means; an entropy of 0."""
        columns = router.num_columns
        return {
            "prob_C": jnp.full((columns,), 1 / columns, jnp.float32),
            "entropy": jnp.zeros((), jnp.float32),
        }


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    return balancing.check_scope(fields, config)
