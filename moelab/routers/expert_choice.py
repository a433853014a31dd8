"""Expert choice: each expert takes its C best tokens (arXiv:2202.09368, section 3.2).

    S = softmax over experts of XW,   G, I = top-C of S^T,   C = T * k / E

Perfectly balanced by construction. Not causal: which tokens an expert takes depends on later ones, so a language model
trained with it sees the future, and generation token by token differs from the parallel pass.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import routing


class Router(nn.Module):
    """Lets each expert choose its tokens among all tokens that the device holds (the router's group)."""

    num_experts: int
    k: int = 2  # mean experts per token (the paper's capacity factor c)
    init_scale: float = 1.0  # the kernel's standard deviation is init_scale / sqrt(D)

    causal = False
    token_choice = False
    takes_bias = False

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_E: jax.Array | None = None,
    ) -> routing.Routing:
        num_tokens = x_TD.shape[0]
        init = nn.initializers.normal(self.init_scale * x_TD.shape[1] ** -0.5)
        kernel_DE = self.param("kernel", init, (x_TD.shape[1], self.num_experts), jnp.float32)
        logit_TE = routing.logits(x_TD, kernel_DE)
        prob_TE = jax.nn.softmax(logit_TE, axis=-1)
        limit = min(num_tokens, routing.capacity(num_tokens * self.k, self.num_experts, 1.0))
        # Padding goes last, so that an expert takes it only when the group has too few valid tokens.
        rank_TE = jnp.where(inputs.mask_T[:, None], prob_TE, -jnp.inf)
        _, token_EC = jax.lax.top_k(jax.lax.stop_gradient(rank_TE).T, limit)
        weight_EC = jnp.take_along_axis(prob_TE.T, token_EC, axis=1)
        return routing.from_expert_choice(token_EC, weight_EC, logit_TE, prob_TE, inputs)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = []
    if fields["k"] < 1:
        problems.append(("k", f"must be at least 1, got {fields['k']}"))
    if 0 < config.moe.num_experts < fields["k"]:
        problems.append(
            ("k", f"must be at most moe.num_experts={config.moe.num_experts}, got {fields['k']}")
        )
    if config.moe.capacity_factor > 0:
        problems.append(("k", "expert choice has its capacity built in: set moe.capacity_factor=0"))
    if fields["init_scale"] < 0:
        problems.append(("init_scale", f"must not be negative, got {fields['init_scale']}"))
    return problems
