"""The load loss of noisy top-k gating: a smooth estimate of the number of tokens per expert, balanced.

    loss = CV(sum over tokens of P(x, i))^2

Shazeer et al., arXiv:1701.06538, appendix A; P(x, i) comes from `routers/noisy_top_k.py` and exists in training only:
in evaluation the loss is 0. Without noise it is undefined.
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
    """Penalises the spread of the experts' expected numbers of tokens."""

    def sums(self, routing: Routing, router: Router) -> dict[str, jax.Array]:
        """The chance of each expert to be selected again."""
        margin_TC = routing.aux.margin_TC
        if margin_TC is None:
            margin_TC = jnp.zeros_like(routing.aux.prob_TC)
        chance_TC = jax.scipy.stats.norm.cdf(margin_TC)
        return {"chance_C": jnp.where(routing.aux.mask_T[:, None], chance_TC, 0)}

    def value(self, total: dict[str, jax.Array]) -> jax.Array:
        """Squared coefficient of variation."""
        return balancing.squared_variation(total["chance_C"])

    def balanced(self, router: Router) -> dict[str, jax.Array]:
        """Equal chances."""
        columns = router.num_columns
        return {"chance_C": jnp.full((columns,), router.k / columns, jnp.float32)}


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = balancing.check_scope(fields, config)
    if config.router.kind != "noisy_top_k":
        problems.append(
            ("coefficient", "wants the selection chances of router.kind=noisy_top_k; set it to 0")
        )
    return problems
