"""Loss-free balancing: a bias per expert steers selection, moved by the sign of its load error.

    b_i <- b_i + rate * sign(mean_j N_j - N_i)

Wang et al., arXiv:2408.15664, algorithm 1. N counts the choices of the whole global batch; the bias moves once per
optimizer step, takes no gradient and no weight decay, and is added to the scores for selection only. torchtitan
subtracts the mean of the step (`zero_mean`), against a common drift of all biases.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing, routing
from moelab.router import Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.Mechanism):
    """Raises the bias of experts below the mean load and lowers it above."""

    steers = "bias"

    rate: float = 0.0  # step of the bias per optimizer step; 0: off; 0.001 in the paper
    zero_mean: bool = (
        False  # subtract the mean of the step, so that the biases do not drift together
    )

    def init(self, router: Router) -> balancing.State:
        """A zero bias: (C,) float32."""
        return {"bias_C": jnp.zeros((router.num_columns,), jnp.float32)}

    def observe(
        self, routed: routing.Routing, state: balancing.State, router: Router
    ) -> dict[str, jax.Array]:
        """Counts the router's choices, before any capacity: (C,) float32."""
        del state
        return {"count_C": routing.load(routed.aux.choice_N, router.num_columns)}

    def update(
        self, state: balancing.State, total: dict[str, jax.Array], router: Router
    ) -> balancing.State:
        """Moves each bias by one rate toward balance."""
        del router
        count_C = total["count_C"]
        step_C = self.rate * jnp.sign(jnp.mean(count_C) - count_C)
        if self.zero_mean:
            step_C = step_C - jnp.mean(step_C)
        return {"bias_C": state["bias_C"] + step_C}

    def selection_bias(self, state: balancing.State) -> jax.Array:
        """The bias itself."""
        return state["bias_C"]


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    return balancing.check_strength(fields, "rate")
