"""A bound, not a method: experts at random, new in every step, with equal weights.

What routing is worth is what a router gains over this; never ranked with the others.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import router, routing


class Router(router.Router):
    """Sends each token to k random experts."""

    takes_bias = False
    learns = False
    scores_learn = False
    ranked = False

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        rank_TC = routing.uniform_noise(inputs, self.num_experts)
        column_TK = self.choose(rank_TC, None, inputs)
        weight_TK = jnp.full(column_TK.shape, 1 / self.k, jnp.float32)
        prob_TC = jnp.full_like(rank_TC, 1 / self.num_experts)
        found = routing.Scores(jnp.zeros_like(rank_TC), prob_TC, rank_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    return router.check_count(fields, config)
