"""Noisy top-k gating (Shazeer et al., arXiv:1701.06538, eq. 3-5 and appendix A).

    H = x W + eps * softplus(x W_noise),  eps ~ N(0, 1),   S = top-k of H,   weight = softmax(H[S])

In training the router also reports the chance that a fresh draw of one expert's noise would select it,

    P(x, i) = Phi((x W_i - k-th largest of H without i) / softplus(x W_noise_i)),

whose column sums the load loss balances (`balance/load_loss.py`). The k-th largest excludes i itself, as in the paper;
V-MoE's code includes it. In evaluation there is no noise and no chance. With k = 1 the weight is the constant 1, as in
the paper: such a router learns through its balancing losses only.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import router, routing, scores


class Router(router.Router):
    """Selects k experts per token by noisy logits; the noise's size is learned."""

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        logit_TC = self.kernel_logits(x_TD)
        spread_TC = jax.nn.softplus(self.kernel_logits(x_TD, "noise_kernel"))
        noisy_TC, margin_TC = logit_TC, None
        if inputs.train:
            noise_TC = routing.normal_noise(inputs, self.num_experts)
            noisy_TC = logit_TC + noise_TC * spread_TC
            margin_TC = selection_margin(logit_TC, noisy_TC, spread_TC, self.k)
        column_TK = self.choose(noisy_TC, selection_bias_C, inputs)
        weight_TK = jax.nn.softmax(scores.select(noisy_TC, column_TK), axis=-1)
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        found = routing.Scores(logit_TC, prob_TC, noisy_TC, margin_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def selection_margin(
    logit_TC: jax.Array, noisy_TC: jax.Array, spread_TC: jax.Array, k: int
) -> jax.Array:
    """Returns how far each clean logit is above its threshold, in standard deviations of its noise: (T, C) float32.

    The distribution function of it is P(x, i), the chance of i to be among the top k if its own noise is drawn again
    (taken in `balance/load_loss.py`: inside shard_map, jax 0.12.0.1 cannot type erf). Far above everywhere where k = C.
    """
    if k >= logit_TC.shape[1]:
        return jnp.full_like(logit_TC, 40.0)
    largest_TK = jax.lax.top_k(noisy_TC, k + 1)[0]
    inside_TC = noisy_TC >= largest_TK[:, k - 1 : k]
    # Without i itself, the k-th largest is the (k+1)-th for those inside and the k-th for those outside.
    threshold_TC = jnp.where(inside_TC, largest_TK[:, k : k + 1], largest_TK[:, k - 1 : k])
    return (logit_TC - threshold_TC) / spread_TC


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    return router.check_count(fields, config)
