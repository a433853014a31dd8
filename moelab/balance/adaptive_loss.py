"""The Switch loss with a coefficient that follows the imbalance.

    c <- c * (1 + rate)^sign(MaxVio - target),   MaxVio = max_i N_i / mean_i N_i - 1 of the global batch

Pushes only as hard as it must: the idea of axlearn's AdaptiveLoadBalanceLoss, whose coefficient follows the
over-capacity of experts, with the multiplicative rule of ReMoE (arXiv:2412.14711). No paper has exactly this form.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing, routing
from moelab.balance import switch_loss
from moelab.router import Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.Mechanism):
    """Raises the loss's coefficient while the load is worse than the target, lowers it while better."""

    steers = "load"

    coefficient: float = 0.0  # of the first step; 0: off
    rate: float = 0.05  # relative change of the coefficient per step
    target: float = 0.1  # MaxVio that is good enough
    smallest: float = 1e-4  # the coefficient stays above
    largest: float = 1.0  # and below

    @property
    def invariant(self) -> bool:
        """The loss itself is the micro-batch's."""
        return False

    def init(self, router: Router) -> balancing.State:
        """The coefficient, () float32."""
        del router
        return {"coefficient": jnp.asarray(self.coefficient, jnp.float32)}

    def weight(self, state: balancing.State) -> jax.Array:
        """The coefficient in force."""
        return state["coefficient"]

    def loss(self, routed: routing.Routing, state: balancing.State, router: Router) -> jax.Array:
        """The Switch loss of the micro-batch."""
        del state
        return switch_loss.Mechanism(coefficient=1.0).loss(routed, {}, router)

    def observe(
        self, routed: routing.Routing, state: balancing.State, router: Router
    ) -> dict[str, jax.Array]:
        """Counts the router's choices, before any capacity: (C,) float32."""
        del state
        return {"count_C": routing.load(routed.aux.choice_N, router.num_columns)}

    def update(
        self, state: balancing.State, total: dict[str, jax.Array], router: Router
    ) -> balancing.State:
        """Moves the coefficient by one factor."""
        del router
        count_C = total["count_C"]
        violation = jnp.max(count_C) / jnp.maximum(jnp.mean(count_C), 1e-9) - 1
        factor = (1 + self.rate) ** jnp.sign(violation - self.target)
        moved = jnp.clip(state["coefficient"] * factor, self.smallest, self.largest)
        return balancing.moved_if(jnp.sum(count_C) > 0, {"coefficient": moved}, state)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = balancing.check_strength(fields, "coefficient", "rate", "target")
    if not 0 < fields["smallest"] <= fields["largest"]:
        problems.append(
            ("smallest", f"must be above 0 and at most largest, got {fields['smallest']}")
        )
    return problems
