"""GShard's top-2 gating with a random second expert (arXiv:2006.16668, algorithm 1).

    g = softmax(z),  e1, e2 = top 2,  g1, g2 divided by g1 + g2
    in training the second expert is used with probability min(1, 2 * g2); in evaluation always

Its capacity is `moe.capacity_factor` and its loss `balance.switch_loss` with `first_choice_only`. The authors' code
(lingvo) multiplies the loss by E^2; ours is scaled to 1 at balance.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import router, routing, scores


class Router(router.Router):
    """Sends each token to its best expert, and to the second best as often as that one's weight deserves."""

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        logit_TC = self.kernel_logits(x_TD)
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        column_TK = self.choose(prob_TC, selection_bias_C, inputs)
        weight_TK = scores.renormalise(scores.select(prob_TC, column_TK))
        if inputs.train and inputs.replay_TK is None:
            chance_T1 = routing.uniform_noise(inputs, 1)
            # Not (2 g2 > chance): a NaN weight stays, and stays visible.
            left_T1 = 2 * weight_TK[:, 1:2] <= chance_T1
            unused_TK = jnp.concatenate([jnp.zeros_like(left_T1), left_T1], axis=1)
            column_TK = jnp.where(unused_TK, self.num_columns, column_TK)
        found = routing.Scores(logit_TC, prob_TC, prob_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    if fields["k"] != 2:
        return [("k", f"must be 2: this is top-2 gating, got {fields['k']}")]
    return router.check_count(fields, config)
