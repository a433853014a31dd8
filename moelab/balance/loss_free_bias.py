"""Loss-free balancing: a bias per expert steers selection, moved by the sign of its load error.

    b_i <- b_i + rate * sign(mean_j N_j - N_i)

Wang et al., arXiv:2408.15664, algorithm 1. N counts the choices of the whole global batch; the bias moves once per
optimizer step, takes no gradient and no weight decay, and is added to the scores for selection only.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing
from moelab import routing as routing_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.Mechanism):
    """Raises the bias of experts below the mean load and lowers it above."""

    rate: float = 0.0  # step of the bias per optimizer step; 0: off; 0.001 in the paper
    zero_mean: bool = (
        False  # subtract the mean of the step, so that the biases do not drift together
    )

    def init(self, num_experts: int) -> dict[str, jax.Array]:
        """A zero bias: (E,) float32."""
        return {"bias_E": jnp.zeros((num_experts,), jnp.float32)}

    def observe(self, routing: routing_lib.Routing) -> dict[str, jax.Array]:
        """Counts the router's choices, before any capacity: (E,) float32."""
        return {"count_E": routing_lib.load(routing.aux.choice_N, routing.aux.prob_TE.shape[1])}

    def update(
        self, state: dict[str, jax.Array], total: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Moves each bias by one rate toward balance."""
        count_E = total["count_E"]
        step_E = self.rate * jnp.sign(jnp.mean(count_E) - count_E)
        if self.zero_mean:
            step_E = step_E - jnp.mean(step_E)
        return {"bias_E": state["bias_E"] + step_E}

    def selection_bias(self, state: dict[str, jax.Array]) -> jax.Array:
        """The bias itself."""
        return state["bias_E"]
