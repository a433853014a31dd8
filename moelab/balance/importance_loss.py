"""The importance loss: experts should get equal sums of gate values (Shazeer et al., arXiv:1701.06538, eq. 6-7).

    loss = CV(sum over tokens of G(x))^2,   CV = standard deviation / mean over the experts

G are the combine weights, 0 where an expert was not chosen. Exactly 0 at balance.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing
from moelab.router import Router
from moelab.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.ScopedLoss):
    """Penalises the spread of the experts' summed combine weights."""

    def sums(self, routing: Routing, router: Router) -> dict[str, jax.Array]:
        """Combine weights of each token."""
        columns = router.num_columns
        return {"weight_C": balancing.column_weights(routing, router.num_experts, columns)}

    def value(self, total: dict[str, jax.Array]) -> jax.Array:
        """Squared coefficient of variation."""
        return balancing.squared_variation(total["weight_C"])

    def balanced(self, router: Router) -> dict[str, jax.Array]:
        """Equal sums."""
        columns = router.num_columns
        return {"weight_C": jnp.full((columns,), 1 / columns, jnp.float32)}


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    return balancing.check_scope(fields, config)
