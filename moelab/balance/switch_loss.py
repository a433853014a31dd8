"""The load-balancing loss of Switch and GShard, for any k and over any scope.

    loss = C * sum_i f_i P_i,   f_i = N_i / sum_j N_j,   P_i = mean over tokens of the normalised score of i

Switch Transformer, arXiv:2101.03961, eq. 4-6 (k = 1). For k > 1 the count is divided by all assignments, as in
Megatron-LM and OLMo-core, so that perfect balance is exactly 1; MaxText and Hugging Face leave that division out, and
their coefficient means k times ours (`moelab.report.conventions`). Over a sequence it is DeepSeek-V3's loss
(arXiv:2412.19437, eq. 17-20), over the global batch that of arXiv:2501.11873; counted on first choices only, GShard's
(arXiv:2006.16668, algorithm 1).
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
    """Pulls the router's mean score away from the experts that are chosen most."""

    steers = "load"

    first_choice_only: bool = False  # count only each token's first choice (GShard)

    def sums(self, routing: Routing, router: Router) -> dict[str, jax.Array]:
        """Choices and normalised scores of each token."""
        slots = 1 if self.first_choice_only and router.slots else None
        return {
            "count_C": balancing.column_counts(routing, router.num_columns, slots),
            "prob_C": jnp.where(routing.aux.mask_T[:, None], routing.aux.prob_TC, 0),
        }

    def value(self, total: dict[str, jax.Array]) -> jax.Array:
        """C * sum_i f_i P_i."""
        count_C = jax.lax.stop_gradient(total["count_C"])
        share_C = count_C / jnp.maximum(jnp.sum(count_C), 1.0)
        mean_C = total["prob_C"] / jnp.maximum(total["token_T"], 1.0)
        return share_C.shape[0] * jnp.sum(share_C * mean_C)

    def balanced(self, router: Router) -> dict[str, jax.Array]:
        """Equal shares."""
        columns = router.num_columns
        return {
            "count_C": jnp.full((columns,), router.k / columns, jnp.float32),
            "prob_C": jnp.full((columns,), 1 / columns, jnp.float32),
        }


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    return balancing.check_scope(fields, config)
