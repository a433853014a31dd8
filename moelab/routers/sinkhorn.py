"""Sinkhorn routing: selection by a doubly normalised matrix of scores, as Megatron-LM has it.

    P = exp(z - rows' max);  repeat  d0 = (1/T) / rows(P d1),  d1 = (1/E) / columns(d0 P)  until d1 rests
    S = top-k of d0 P d1,   weight = sigmoid(z)[S] for k = 1, softmax(z)[S] for k > 1

Clark et al., arXiv:2202.01169 (S-BASE), derive it as the relaxed linear assignment. Megatron's code takes exp of the
raw logits, which overflows; here each row's maximum is taken off first. A factor of a row goes into its d0 and leaves
every d1, and so every iterate, as it was; with one maximum for all, a row far below it would underflow to zeros and go
to expert 0. In evaluation the raw logits select. Not causal in training: the normalisation runs over all tokens of the
batch.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import parallel, router, routing, scores


class Router(router.Router):
    """Balances the selection over the tokens that the device holds (the router's group), weights by raw scores."""

    k: int = 1  # experts per token
    tolerance: float = 1e-4  # mean change of the column factors at which the iteration ends
    max_iterations: int = 100  # bound of the iteration

    causal = False
    reason = "in training the normalisation runs over all tokens of the batch, later ones included"
    competes = True
    takes_bias = False

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        logit_TC = self.kernel_logits(x_TD)
        rank_TC = logit_TC
        if inputs.train and x_TD.shape[0]:
            rank_TC = normalise(
                jax.lax.stop_gradient(logit_TC), inputs.mask_T, self.tolerance, self.max_iterations
            )
        column_TK = self.choose(rank_TC, None, inputs)
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        score_TC = jax.nn.sigmoid(logit_TC) if self.k == 1 else prob_TC
        weight_TK = scores.select(score_TC, column_TK)
        found = routing.Scores(logit_TC, prob_TC, rank_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def normalise(
    logit_TE: jax.Array, mask_T: jax.Array, tolerance: float, max_iterations: int
) -> jax.Array:
    """Scales exp(z) so that valid rows sum to 1/T and columns to 1/E: (T, E) float32; 0 in rows of padding."""
    valid_T1 = mask_T[:, None]
    peak_T1 = jnp.max(logit_TE, axis=1, keepdims=True)
    cost_TE = jnp.where(valid_T1, jnp.exp(logit_TE - peak_T1), 0.0)
    count = jnp.maximum(jnp.sum(mask_T), 1).astype(jnp.float32)
    tiny = 1e-8  # of Megatron's code

    def rows(d1_E):
        return jnp.where(mask_T, 1 / (count * (jnp.sum(cost_TE * d1_E[None], axis=1) + tiny)), 0)

    def columns(d0_T):
        total_E = jnp.sum(cost_TE * d0_T[:, None], axis=0)
        return 1 / (cost_TE.shape[1] * (total_E + tiny))

    def unfinished(carry):
        _, change, iteration = carry
        return (change > tolerance) & (iteration < max_iterations)

    def body(carry):
        d1_E, _, iteration = carry
        new_E = columns(rows(d1_E))
        return new_E, jnp.mean(jnp.abs(new_E - d1_E)), iteration + 1

    start = (jnp.ones_like(cost_TE[0]), jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))
    start = tuple(parallel.vary_like(a, cost_TE) for a in start)
    d1_E, _, _ = jax.lax.while_loop(unfinished, body, start)
    return cost_TE * rows(d1_E)[:, None] * d1_E[None]


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = router.check_count(fields, config)
    return problems + router.check_positive(fields, "tolerance", "max_iterations")
