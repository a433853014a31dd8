"""A bound, not a method: the domain of the text decides, as no router could know it.

Domain d owns the experts e with e mod num_domains = d (E < num_domains: expert d mod E alone); which k of them a token
takes is a fixed function of its id. What a router that found the domains would have; never ranked with the others.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import router, routing


class Router(router.Router):
    """Sends each token to experts of its domain, with equal weights; tokens of unknown domain to domain 0's."""

    k: int = 1  # experts per token
    num_domains: int = 5  # domains that share the experts

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
        experts, domains = self.num_experts, min(self.num_domains, self.num_experts)
        domain_T = jnp.maximum(inputs.domain_T, 0) % domains
        owned_T = (experts - 1 - domain_T) // domains + 1
        slot_K = jnp.arange(self.k, dtype=jnp.int32)
        # Knuth's multiplicative hash spreads neighbouring ids.
        first_T = (inputs.token_id_T.astype(jnp.uint32) * jnp.uint32(2654435761)) >> 16
        turn_TK = (first_T.astype(jnp.int32)[:, None] + slot_K[None]) % owned_T[:, None]
        used_TK = slot_K[None] < owned_T[:, None]
        column_TK = jnp.where(used_TK, domain_T[:, None] + domains * turn_TK, experts)
        if inputs.replay_TK is not None:
            column_TK = inputs.replay_TK
        count_T1 = jnp.minimum(self.k, owned_T)[:, None].astype(jnp.float32)
        weight_TK = jnp.broadcast_to(1 / count_T1, column_TK.shape)
        owner_C = jnp.arange(experts, dtype=jnp.int32) % domains
        prob_TC = jnp.where(owner_C[None] == domain_T[:, None], 1 / owned_T[:, None], 0.0)
        prob_TC = prob_TC.astype(jnp.float32)
        found = routing.Scores(jnp.zeros_like(prob_TC), prob_TC, prob_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, experts)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    return router.check_count(fields, config) + router.check_positive(fields, "num_domains")
