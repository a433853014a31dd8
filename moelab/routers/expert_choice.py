"""Expert choice: each expert takes its best tokens (arXiv:2202.09368).

    S = softmax over experts of XW,   G, I = top-C of S^T,   C = T * k / E rounded up

T counts the valid tokens: padding makes no room and is never taken. Perfectly balanced by
construction. Not causal: which tokens an expert takes depends on later ones, so a language model trained with it sees
the future, and generation token by token differs from the parallel pass.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import capacity, router, routing


class Router(router.Router):
    """Lets each expert choose its tokens among all tokens that the device holds (the router's group).

    k is the mean number of experts per token, the paper's capacity factor c.
    """

    causal = False
    reason = "experts choose among all tokens of the batch, later ones included"
    competes = True
    takes_bias = False
    balanced = True

    @property
    def slots(self) -> None:
        """Experts choose: a token has any number of them."""
        return None

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        logit_TC = self.kernel_logits(x_TD)
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        num_tokens = x_TD.shape[0]
        places = min(num_tokens, capacity.limit(num_tokens * self.k, self.num_experts, 1.0))
        limit = capacity.limit_of_valid(inputs.mask_T, self.k, self.num_experts, 1.0)
        # NaN goes first: left to top_k, one with a sign bit is below everything, and nobody would see it.
        rank_TC = jnp.where(jnp.isnan(prob_TC), jnp.inf, prob_TC)
        # Padding goes last, behind the places that the valid tokens make.
        rank_TC = jnp.where(inputs.mask_T[:, None], rank_TC, -jnp.inf)
        _, token_EC = jax.lax.top_k(jax.lax.stop_gradient(rank_TC).T, places)
        weight_EC = jnp.take_along_axis(prob_TC.T, token_EC, axis=1)
        found = routing.Scores(logit_TC, prob_TC, prob_TC)
        return routing.from_expert_choice(token_EC, weight_EC, found, inputs, limit)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    return router.check_count(fields, config)
