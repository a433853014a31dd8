"""Token choice: each token takes its k best experts.

    score = softmax(z), sigmoid(z) or sqrt(softplus(z)),  S = top-k of (score + bias),
    weight = scale * score[S] (/ sum over S)

Softmax before selection without renormalisation is OLMoE (arXiv:2409.02060); with k=1 and a capacity Switch
(arXiv:2101.03961, where input_jitter is 0.01 and init_scale 0.32); with renormalisation Mixtral's weights
(arXiv:2401.04088), which equal softmax after selection; sigmoid with a selection bias and renormalisation is
DeepSeek-V3 (arXiv:2412.19437, eq. 12-16), where the bias selects and never enters the weight.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import router, routing, scores


class Router(router.Router):
    """Selects k experts per token by score, with ties to the lowest expert."""

    score: str = "softmax"  # softmax over the experts, or sigmoid or sqrt_softplus of each logit
    score_before_selection: bool = (
        True  # score over all experts; False: over the selected ones only
    )
    renormalise: bool = True  # divide the selected scores by their sum
    scale: float = 1.0  # factor of the combined output of the routed experts
    input_jitter: float = 0.0  # in training the router sees x * uniform(1 - jitter, 1 + jitter)

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        if self.input_jitter and inputs.train:
            x_TD = jitter(x_TD, self.input_jitter, inputs)
        logit_TC = self.kernel_logits(x_TD)
        score_TC, prob_TC = scores.score(logit_TC, self.score)
        rank_TC = score_TC if self.score_before_selection else logit_TC
        column_TK = self.pick(rank_TC, selection_bias_C, inputs)
        weight_TK = combine_weights(self, logit_TC, score_TC, column_TK)
        found = routing.Scores(logit_TC, prob_TC, rank_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)

    def pick(
        self, rank_TC: jax.Array, bias_C: jax.Array | None, inputs: routing.RouterInput
    ) -> jax.Array:
        """Returns the selected columns; what relatives of this router change."""
        return self.choose(rank_TC, bias_C, inputs)


def jitter(x_TD: jax.Array, amount: float, inputs: routing.RouterInput) -> jax.Array:
    """Multiplies x by uniform numbers in [1 - amount, 1 + amount) (arXiv:2101.03961, section 2.2)."""
    noise_TD = routing.uniform_noise(inputs, x_TD.shape[1])
    return x_TD.astype(jnp.float32) * (1 - amount + 2 * amount * noise_TD)


def combine_weights(
    router: Router, logit_TC: jax.Array, score_TC: jax.Array, column_TK: jax.Array
) -> jax.Array:
    """Returns the factors of the selected experts, (T, K) float32; the bias is not in them."""
    if router.score_before_selection:
        weight_TK = scores.select(score_TC, column_TK)
    else:
        weight_TK, _ = scores.score(scores.select(logit_TC, column_TK), router.score)
    if router.renormalise:
        weight_TK = scores.renormalise(weight_TK)
    return router.scale * weight_TK


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = router.check_count(fields, config)
    problems += router.check_choice(fields, score=scores.SCORES)
    if not 0 <= fields["input_jitter"] < 1:
        problems.append(("input_jitter", f"must be in [0, 1), got {fields['input_jitter']}"))
    return problems
