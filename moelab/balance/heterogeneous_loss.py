"""MoE++'s balancing loss: experts without computation may be chosen more often (arXiv:2410.07348).

    loss = sum_j (1 / eta_j) * sum_i eta_i f_i P_i,   eta = 1 for feed-forward experts, tau for the others

f and P as in `switch_loss`. The paper's sum of eta_i f_i P_i is scaled here so that the load it aims at, f = P
proportional to 1 / eta, is exactly 1. A smaller tau sends more tokens to the idle experts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing
from moelab.balance import switch_loss
from moelab.router import Router
from moelab.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(switch_loss.Mechanism):
    """Balances feed-forward experts among themselves, and idle ones at a higher load."""

    tau: float = 0.75  # weight of an expert without computation

    def sums(self, routing: Routing, router: Router) -> dict[str, jax.Array]:
        """Choices and scores, and the weights of the columns."""
        columns = jnp.arange(router.num_columns)
        eta_C = jnp.where(columns < router.num_experts, 1.0, self.tau)
        token_T1 = routing.aux.mask_T[:, None].astype(jnp.float32)
        return super().sums(routing, router) | {"eta_C": token_T1 * eta_C[None]}

    def value(self, total: dict[str, jax.Array]) -> jax.Array:
        """The weighted sum of products."""
        count_C = jax.lax.stop_gradient(total["count_C"])
        tokens = jnp.maximum(total["token_T"], 1.0)
        eta_C = jnp.maximum(jax.lax.stop_gradient(total["eta_C"]) / tokens, 1e-9)
        share_C = count_C / jnp.maximum(jnp.sum(count_C), 1.0)
        return jnp.sum(1 / eta_C) * jnp.sum(eta_C * share_C * total["prob_C"] / tokens)

    def balanced(self, router: Router) -> dict[str, jax.Array]:
        """Shares in proportion to 1 / eta."""
        columns = jnp.arange(router.num_columns)
        eta_C = jnp.where(columns < router.num_experts, 1.0, self.tau).astype(jnp.float32)
        share_C = (1 / eta_C) / jnp.sum(1 / eta_C)
        return {"count_C": router.k * share_C, "prob_C": share_C, "eta_C": eta_C}


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = balancing.check_scope(fields, config)
    if not 0 < fields["tau"] <= 1:
        problems.append(("tau", f"must be above 0 and at most 1, got {fields['tau']}"))
    if config.router.kind != "zero_computation":
        problems.append(
            ("coefficient", "weighs the idle experts of router.kind=zero_computation; set it to 0")
        )
    return problems
