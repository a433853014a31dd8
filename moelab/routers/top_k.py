"""Token choice: each token takes its k best experts.

    score = softmax(z) or sigmoid(z),  S = top-k of (score + bias),  weight = scale * score[S] (/ sum over S)

Softmax before selection without renormalisation is OLMoE (arXiv:2409.02060); with it, Mixtral's weights
(arXiv:2401.04088), which equal softmax after selection; sigmoid with a selection bias and renormalisation is
DeepSeek-V3 (arXiv:2412.19437, eq. 12-16), where the bias selects and never enters the weight.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import routing


class Router(nn.Module):
    """Selects k experts per token by score, with ties to the lowest expert."""

    num_experts: int
    k: int = 2  # experts per token
    score: str = "softmax"  # softmax over the experts, or sigmoid of each logit
    score_before_selection: bool = (
        True  # score over all experts; False: over the selected ones only
    )
    renormalise: bool = True  # divide the selected scores by their sum
    scale: float = 1.0  # factor of the combined output of the routed experts
    init_scale: float = 1.0  # the kernel's standard deviation is init_scale / sqrt(D)

    causal = True
    token_choice = True
    takes_bias = True

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_E: jax.Array | None = None,
    ) -> routing.Routing:
        init = nn.initializers.normal(self.init_scale * x_TD.shape[1] ** -0.5)
        kernel_DE = self.param("kernel", init, (x_TD.shape[1], self.num_experts), jnp.float32)
        logit_TE = routing.logits(x_TD, kernel_DE)
        score_TE, prob_TE = scores(logit_TE, self.score)
        rank_TE = score_TE if self.score_before_selection else logit_TE
        if selection_bias_E is not None:
            rank_TE = rank_TE + selection_bias_E[None, :]
        expert_TK = inputs.replay_TK
        if expert_TK is None:
            _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(rank_TE), self.k)
        weight_TK = combine_weights(self, logit_TE, score_TE, expert_TK)
        return routing.from_token_choice(expert_TK, weight_TK, logit_TE, prob_TE, inputs)


def scores(logit_TE: jax.Array, score: str) -> tuple[jax.Array, jax.Array]:
    """Returns the scores and their normalisation over the experts, both (T, E) float32.

    The sigmoid's normalisation is softmax(log sigmoid(z)): no epsilon that the router could hide behind.
    """
    if score == "softmax":
        prob_TE = jax.nn.softmax(logit_TE, axis=-1)
        return prob_TE, prob_TE
    return jax.nn.sigmoid(logit_TE), jax.nn.softmax(jax.nn.log_sigmoid(logit_TE), axis=-1)


def combine_weights(
    router: Router, logit_TE: jax.Array, score_TE: jax.Array, expert_TK: jax.Array
) -> jax.Array:
    """Returns the factors of the selected experts, (T, K) float32; the bias is not in them."""
    if router.score_before_selection:
        weight_TK = routing.select(score_TE, expert_TK)
    else:
        weight_TK, _ = scores(routing.select(logit_TE, expert_TK), router.score)
    if router.renormalise and router.k > 1:  # one weight divided by itself would lose its gradient
        weight_TK = weight_TK / jnp.maximum(jnp.sum(weight_TK, axis=-1, keepdims=True), 1e-20)
    return router.scale * weight_TK


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = []
    num_experts = config.moe.num_experts
    if fields["k"] < 1:
        problems.append(("k", f"must be at least 1, got {fields['k']}"))
    if 0 < num_experts < fields["k"]:
        problems.append(("k", f"must be at most moe.num_experts={num_experts}, got {fields['k']}"))
    if fields["score"] not in ("softmax", "sigmoid"):
        problems.append(("score", f"must be softmax or sigmoid, got {fields['score']!r}"))
    if fields["init_scale"] < 0:
        problems.append(("init_scale", f"must not be negative, got {fields['init_scale']}"))
    return problems
