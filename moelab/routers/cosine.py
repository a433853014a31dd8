"""Cosine router: experts by the angle to a low-dimensional projection (X-MoE, Chi et al., arXiv:2204.09179).

    h = x W,   s_i = cos(h, e_i) / temperature,   p = softmax(s),   S = top-k,   weight = p[S]

The temperature is learned and kept above a minimum. Low dimension and unit length keep the routing space from
collapsing to the experts' directions.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import router, routing, scores


class Router(router.Router):
    """Selects k experts per token by cosine similarity to learned directions."""

    projection: int = (
        16  # dimension of the routing space; the paper takes half the number of experts
    )
    temperature: float = 0.07  # start of the learned temperature
    min_temperature: float = 0.01  # it never counts as less
    renormalise: bool = False  # divide the selected weights by their sum

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        width, normal = x_TD.shape[1], nn.initializers.normal
        init = normal(self.init_scale * width**-0.5)
        projection_DP = self.param("projection", init, (width, self.projection), jnp.float32)
        centroid_EP = self.param("centroid", normal(1.0), (self.num_experts, self.projection))
        temperature = self.param("temperature", nn.initializers.constant(self.temperature), ())
        hidden_TP = _unit(scores.logits(x_TD, projection_DP))
        cosine_TC = scores.logits(hidden_TP, _unit(centroid_EP).T)
        logit_TC = cosine_TC / jnp.maximum(temperature, self.min_temperature)
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        column_TK = self.choose(prob_TC, selection_bias_C, inputs)
        weight_TK = scores.select(prob_TC, column_TK)
        if self.renormalise:
            weight_TK = scores.renormalise(weight_TK)
        found = routing.Scores(logit_TC, prob_TC, prob_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def _unit(a: jax.Array) -> jax.Array:
    """Rows over their length; finite, with a finite gradient, for a row of zeros."""
    return a * jax.lax.rsqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + 1e-12)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = router.check_count(fields, config)
    return problems + router.check_positive(fields, "projection", "temperature", "min_temperature")
