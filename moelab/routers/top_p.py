"""Dynamic routing: the fewest experts whose probabilities reach a threshold (Huang et al., arXiv:2403.07652).

    p = softmax(z),   S = smallest set of the largest p with sum >= threshold,   weight = p[S]

Uncertain tokens take more experts. Without the entropy loss (`balance.entropy_loss`) the router flattens p and takes
many; the paper uses a threshold of 0.4 with E = 16.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import router, routing, scores, selection


class Router(router.Router):
    """Sends each token to as many experts as it needs to reach the threshold.

    k is only what reports compare with: the mean number of experts per token that a fair comparison expects.
    """

    threshold: float = 0.4  # probability that a token's experts have together, at least
    max_experts: int = 0  # bound on the experts of a token; 0: none
    renormalise: bool = False  # divide the weights by their sum; not in the paper

    @property
    def slots(self) -> int:
        """A place for every expert that can be needed."""
        return self.max_experts or self.num_experts

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        logit_TC = self.kernel_logits(x_TD)
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        column_TK = inputs.replay_TK
        if column_TK is None:
            rank_TC = prob_TC if selection_bias_C is None else prob_TC + selection_bias_C[None]
            column_TK = selection.top_k(rank_TC, self.slots)
            # An expert is needed while those before it have not reached the threshold. NaN is needed, and visible.
            weight_TK = jax.lax.stop_gradient(scores.select(prob_TC, column_TK))
            before_TK = jnp.cumsum(weight_TK, axis=-1) - weight_TK
            column_TK = jnp.where(before_TK >= self.threshold, self.num_columns, column_TK)
        weight_TK = scores.select(prob_TC, column_TK)
        if self.renormalise:
            # A token with one expert keeps its p, or the gradient through that weight would be gone.
            several_T1 = jnp.sum(column_TK < self.num_columns, axis=1, keepdims=True) > 1
            weight_TK = jnp.where(several_T1, scores.renormalise(weight_TK), weight_TK)
        found = routing.Scores(logit_TC, prob_TC, prob_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = router.check_count(fields, config)
    if not 0 < fields["threshold"] <= 1:
        problems.append(("threshold", f"must be above 0 and at most 1, got {fields['threshold']}"))
    bound, experts = fields["max_experts"], config.moe.num_experts
    if bound < 0 or 0 < experts < bound:
        problems.append(("max_experts", f"must be in 0..moe.num_experts={experts}, got {bound}"))
    return problems
