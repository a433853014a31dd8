"""BASE layers: a linear assignment gives every expert the same number of tokens (arXiv:2103.16716).

    maximise sum over tokens of s[t, a(t)]  with  |{t : a(t) = e}| = T / E,     weight = sigmoid(s[t, a(t)])

In training the assignment is solved by an auction: experts bid for tokens until nobody gains more than epsilon per
token by a swap (Bertsekas; the authors' code does likewise). In evaluation each token goes to its best expert; training
and evaluation therefore route differently, which the paper accepts. Where E does not divide T, experts take up to
ceil(T / E), T being the valid tokens. Not causal in training: an assignment depends on all tokens of the batch.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import parallel, router, routing, scores


class Router(router.Router):
    """Assigns the tokens that the device holds (the router's group) to experts of equal load."""

    k: int = 1  # experts per token
    max_iterations: int = 2000  # most rounds of the auction; tokens left then fill free places

    causal = False
    reason = "in training the assignment balances all tokens of the batch, later ones included"
    competes = True
    takes_bias = False
    balanced = True

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        inputs: routing.RouterInput,
        selection_bias_C: jax.Array | None = None,
    ) -> routing.Routing:
        logit_TC = self.kernel_logits(x_TD)
        column_TK = self.choose(logit_TC, None, inputs)
        if inputs.train and inputs.replay_TK is None and x_TD.shape[0]:
            column_T = balanced_assignment(
                jax.lax.stop_gradient(logit_TC), inputs.mask_T, self.max_iterations
            )
            column_TK = column_T[:, None]
        weight_TK = jax.nn.sigmoid(scores.select(logit_TC, column_TK))
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        found = routing.Scores(logit_TC, prob_TC, logit_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)


def balanced_assignment(
    score_TE: jax.Array, mask_T: jax.Array, max_iterations: int, tolerance: float = 1e-3
) -> jax.Array:
    """Assigns the V valid tokens to experts, at most ceil(V / E) each, close to the largest sum of scores.

    A forward auction with similar objects: a token bids for the expert of the best value score - price, where an
    expert's price is the lowest bid among those that it holds once it is full. With increments of epsilon the sum is
    within T * epsilon of the optimum; epsilon is `tolerance` times the spread of the scores.

    Args:
      score_TE: float32.
      mask_T: bool; padding takes no place and gets expert 0.
      max_iterations: rounds, each lets every unassigned token bid once.
      tolerance: epsilon over the spread of scores.

    Returns:
      (T,) int32.
    """
    num_tokens, num_experts = score_TE.shape
    places = (jnp.sum(mask_T) + num_experts - 1) // num_experts
    finite_TE = jnp.nan_to_num(score_TE)
    spread = jnp.max(finite_TE) - jnp.min(finite_TE)
    epsilon = tolerance * spread + jnp.finfo(jnp.float32).tiny
    token_T = jnp.arange(num_tokens)

    def unfinished(carry):
        owner_T, _, iteration = carry
        # Where all scores are equal every assignment is best, and no price could rise.
        goes_on = (iteration < max_iterations) & (spread > 0)
        return jnp.any((owner_T == num_experts) & mask_T) & goes_on

    def round_(carry):
        owner_T, bid_T, iteration = carry
        price_E = _prices(owner_T, bid_T, num_experts, places)
        value_TE = finite_TE - price_E[None, :]
        best_T2, expert_T2 = jax.lax.top_k(value_TE, min(2, num_experts))
        raise_T = best_T2[:, 0] - best_T2[:, -1] + epsilon
        wants_T = (owner_T == num_experts) & mask_T
        target_T = jnp.where(wants_T, expert_T2[:, 0], owner_T)
        offer_T = jnp.where(wants_T, price_E[expert_T2[:, 0]] + raise_T, bid_T)
        # Each expert keeps its `places` best offers; the others are without an expert again.
        order_T = jnp.lexsort((token_T, -offer_T, target_T))
        sorted_T = target_T[order_T]
        rank_T = token_T - jnp.searchsorted(sorted_T, sorted_T, side="left")
        stays_T = jnp.zeros(num_tokens, bool).at[order_T].set(rank_T < places)
        owner_T = jnp.where(stays_T & mask_T, target_T, num_experts)
        return owner_T, offer_T, iteration + 1

    nobody_T = jnp.full(num_tokens, num_experts, jnp.int32)
    start = (nobody_T, jnp.zeros(num_tokens, jnp.float32), jnp.zeros((), jnp.int32))
    start = tuple(parallel.vary_like(a, score_TE) for a in start)
    owner_T, _, _ = jax.lax.while_loop(unfinished, round_, start)
    owner_T = _fill(owner_T, mask_T, num_experts, places)
    return jnp.where(mask_T, owner_T, 0).astype(jnp.int32)


def _prices(owner_T: jax.Array, bid_T: jax.Array, num_experts: int, places: jax.Array) -> jax.Array:
    """The lowest bid that a full expert holds; 0 while it has room."""
    count_E = jnp.zeros(num_experts + 1, jnp.int32).at[owner_T].add(1)
    lowest_E = jnp.full(num_experts + 1, jnp.inf, jnp.float32).at[owner_T].min(bid_T)
    return jnp.where(count_E >= places, lowest_E, 0.0)[:num_experts]


def _fill(owner_T: jax.Array, mask_T: jax.Array, num_experts: int, places: jax.Array) -> jax.Array:
    """Puts the tokens that the auction left into the free places, in order."""
    count_E = jnp.zeros(num_experts + 1, jnp.int32).at[owner_T].add(1)[:num_experts]
    free_E = jnp.cumsum(jnp.maximum(places - count_E, 0))
    left_T = (owner_T == num_experts) & mask_T
    number_T = jnp.cumsum(left_T) - 1
    place_T = jnp.searchsorted(free_E, number_T, side="right")
    return jnp.where(left_T, jnp.minimum(place_T, num_experts - 1), owner_T)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = router.check_count(fields, config)
    if fields["k"] != 1:
        problems.append(
            ("k", f"must be 1: an assignment gives a token one expert, got {fields['k']}")
        )
    return problems + router.check_positive(fields, "max_iterations")
