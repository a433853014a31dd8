"""MoE++: some experts compute nothing (Jin et al., arXiv:2410.07348, sections 3.1-3.2).

    z_l = x W + z_(l-1) W_residual,   p = softmax over all columns,   S = top-k of p,   weight = p[S]

Besides the feed-forward experts a token can take a zero expert (adds nothing), a copy expert (adds itself) or a
constant expert (adds a1 x + a2 v with [a1, a2] = softmax(x W_c), v and W_c learned; `idle.py`). The gating residual
passes the logits of one MoE layer to the next. Its balancing is `balance.heterogeneous_loss`.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from moelab import router, routing, scores


class Router(router.Router):
    """Selects k of the feed-forward and the idle experts together."""

    num_zero: int = 1  # experts that add nothing
    num_copy: int = 1  # experts that add the token itself
    num_constant: int = 1  # experts that mix the token with a learned vector
    gating_residual: bool = True  # add the previous MoE layer's logits times a learned matrix
    renormalise: bool = False  # divide the selected weights by their sum; not in the paper

    @property
    def idle_experts(self) -> tuple[str, ...]:
        """The kinds of the columns after the feed-forward experts."""
        counts = {"zero": self.num_zero, "copy": self.num_copy, "constant": self.num_constant}
        return tuple(kind for kind, count in counts.items() for _ in range(count))

    @property
    def uses_previous_logits(self) -> bool:
        """The gating residual reads them."""
        return self.gating_residual

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        logit_TC = self.kernel_logits(x_TD)
        if self.gating_residual:
            shape = (self.num_columns, self.num_columns)
            residual_CC = self.param("residual", nn.initializers.zeros, shape)
            if inputs.previous_logit_TC is not None:
                logit_TC = logit_TC + scores.logits(inputs.previous_logit_TC, residual_CC)
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        column_TK = self.choose(prob_TC, selection_bias_C, inputs)
        weight_TK = scores.select(prob_TC, column_TK)
        if self.renormalise:
            weight_TK = scores.renormalise(weight_TK)
        found = routing.Scores(logit_TC, prob_TC, prob_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    names = ("num_zero", "num_copy", "num_constant")
    problems = router.check_count(fields, config)
    problems += [(n, f"must not be negative, got {fields[n]}") for n in names if fields[n] < 0]
    if sum(fields[n] for n in names) < 1:
        problems.append(("num_zero", "leaves no expert without computation; use router.kind=top_k"))
    return problems
