"""ReMoE: ReLU gates, as many experts as are positive (arXiv:2412.14711).

    weight = ReLU(z),   S = {i : z_i > 0}

Fully differentiable; how many experts are active is steered to k on average by an adaptive L1 penalty
(`balance.relu_l1`). Early in training almost all experts are active, as in the paper's dense first stage: time and
memory are those of a dense model then, unless `max_experts` bounds them.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import router, routing, scores, selection


class Router(router.Router):
    """Sends each token to every expert whose logit is positive, largest first.

    k is the mean number of experts per token that `balance.relu_l1` steers to.
    """

    max_experts: int = 0  # bound on the experts of a token, the largest stay; 0: none

    takes_bias = False

    @property
    def slots(self) -> int:
        """A place for every expert that can be active."""
        return self.max_experts or self.num_experts

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        logit_TC = self.kernel_logits(x_TD)
        gate_TC = jax.nn.relu(logit_TC)
        column_TK = inputs.replay_TK
        if column_TK is None:
            column_TK = selection.top_k(logit_TC, self.slots)
        weight_TK = scores.select(gate_TC, column_TK)
        # Not (weight > 0): a NaN gate stays active, and stays visible.
        column_TK = jnp.where(weight_TK <= 0, self.num_columns, column_TK)
        total_T1 = jnp.sum(gate_TC, axis=-1, keepdims=True)
        prob_TC = gate_TC / jnp.maximum(total_T1, 1e-20)
        found = routing.Scores(logit_TC, prob_TC, logit_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = router.check_count(fields, config)
    bound, experts = fields["max_experts"], config.moe.num_experts
    if bound and experts and not fields["k"] <= bound <= experts:
        problems.append(
            ("max_experts", f"must be 0 or in k..moe.num_experts={experts}, got {bound}")
        )
    return problems
