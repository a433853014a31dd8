"""Hash layers: the token's id decides (Roller et al., arXiv:2106.04426).

    S = table[token id]

Nothing is learned in the choice and nothing depends on the context. `random` draws k distinct experts for every id
(the paper's random hash); `balanced` gives ids in order of their frequency to the k experts with the least so far (its
balanced hash). Weights are equal, or scores of a learned kernel at the chosen experts, as DeepSeek-V4's first layers
have in MaxText (`tid2eid`).
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moelab import router, routing, scores


class Router(router.Router):
    """Looks the experts of a token up in a fixed table.

    `token_counts` is not a config's: the model fills in how often each id occurs in the training data.
    """

    k: int = 1  # experts per token
    table: str = "random"  # random, or balanced by the frequencies of the training data
    weights: str = "equal"  # equal, or score: softmax of a learned kernel at the chosen experts
    table_seed: int = 0  # of the random table
    token_counts: tuple[int, ...] = ()

    takes_bias = False
    learns = False  # scores weigh, they do not choose

    @property
    def scores_learn(self) -> bool:
        """Those of a learned kernel."""
        return self.weights == "score"

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        if not self.token_counts:
            raise ValueError("hash routing wants token_counts: one number per id of the vocabulary")
        make = {"random": random_table, "balanced": balanced_table}[self.table]
        table_VK = make(self.token_counts, self.num_experts, self.k, self.table_seed)
        column_TK = jnp.asarray(table_VK)[inputs.token_id_T]
        if inputs.replay_TK is not None:
            column_TK = inputs.replay_TK
        if self.weights == "score":
            logit_TC = self.kernel_logits(x_TD)
            prob_TC = jax.nn.softmax(logit_TC, axis=-1)
            weight_TK = scores.renormalise(scores.select(prob_TC, column_TK))
        else:
            logit_TC = jnp.zeros((x_TD.shape[0], self.num_experts), jnp.float32)
            prob_TC = jnp.full_like(logit_TC, 1 / self.num_experts)
            weight_TK = jnp.full(column_TK.shape, 1 / self.k, jnp.float32)
        found = routing.Scores(logit_TC, prob_TC, prob_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


@functools.lru_cache(maxsize=8)
def random_table(counts: tuple[int, ...], num_experts: int, k: int, seed: int) -> np.ndarray:
    """Returns k distinct random experts for each id: (V, k) int32."""
    draw = np.random.default_rng(seed).random((len(counts), num_experts))
    return np.argsort(draw, axis=1)[:, :k].astype(np.int32)


@functools.lru_cache(maxsize=8)
def balanced_table(counts: tuple[int, ...], num_experts: int, k: int, seed: int) -> np.ndarray:
    """Gives ids, most frequent first, to the k experts that have least: (V, k) int32; ties to the lowest expert."""
    del seed
    table_VK = np.zeros((len(counts), k), np.int32)
    total_E = np.zeros(num_experts, np.int64)
    for token in np.argsort(-np.asarray(counts), kind="stable"):
        table_VK[token] = np.argsort(total_E, kind="stable")[:k]
        total_E[table_VK[token]] += max(1, counts[token])  # ids that never occur are spread too
    return table_VK


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = router.check_count(fields, config)
    choices = {"table": ("random", "balanced"), "weights": ("equal", "score")}
    return problems + router.check_choice(fields, **choices)
