"""The value that routers make and experts consume, and how assignments are listed in it.

T tokens, E experts, S experts without computation, C = E + S columns of scores, K slots per token, N assignments,
D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterInput(NamedTuple):
    """What a router may look at besides the token's vector. T is local to the device.

    Attributes:
      token_id_T: int32 vocabulary ids.
      sequence_T: int32, which sequence of the batch a token belongs to.
      position_T: int32, index of the token in the step's whole batch: what noise is keyed by (`noise`).
      mask_T: bool, False for padding: routed nowhere, counted nowhere.
      domain_T: int32 domain of the text; -1 where unknown.
      key: (2,) uint32 key data of this step and layer.
      previous_logit_TC: float32 logits of the MoE layer before (zeros in the first), or None.
      replay_TK: int32 columns to select instead of the router's own choice (C: nobody), or None.
      train: Python bool; noise and dropping may differ between training and evaluation.
    """

    token_id_T: jax.Array
    sequence_T: jax.Array
    position_T: jax.Array
    mask_T: jax.Array
    domain_T: jax.Array
    key: jax.Array
    previous_logit_TC: jax.Array | None = None
    replay_TK: jax.Array | None = None
    train: bool = False


class RoutingAux(NamedTuple):
    """What balancing and diagnostics need of a routing decision.

    Attributes:
      logit_TC: float32 raw router logits, before bias and noise.
      prob_TC: float32 scores normalised over the columns: each row sums to 1 (to 0 where all gates of `remoe` are
        closed).
      rank_TC: float32 what the selection compared, without the balancing bias.
      choice_N: int32 column chosen before a capacity removed it; C where nothing was chosen or the token is padding.
      mask_T: bool, valid tokens.
      sequence_T: int32, as in RouterInput.
      margin_TC: float32 distance to selection in standard deviations of the router's noise: the normal distribution
        function of it is the chance that fresh noise would select the column (without the bias). None without noise.
    """

    logit_TC: jax.Array
    prob_TC: jax.Array
    rank_TC: jax.Array
    choice_N: jax.Array
    mask_T: jax.Array
    sequence_T: jax.Array
    margin_TC: jax.Array | None = None


class Routing(NamedTuple):
    """N assignments of tokens to experts, whatever made them (token choice N = T*K, expert choice N = E*capacity).

    Invariants: 0 <= token_N < T; expert_N == E means "no expert" (dropped, padded or inactive: computed by nobody,
    counted nowhere), and its weight is 0; expert_N > E names an expert without computation (`Router.idle_experts`):
    column j >= E of the scores has the id j + 1. weight_N is float32; token choice lists n = t*K + slot.

    Attributes:
      token_N: int32 row of the token.
      expert_N: int32 expert, E for none, above E for an expert without computation.
      weight_N: float32 factor of the expert's output in the combined output.
      aux: scores and masks for balancing and diagnostics.
    """

    token_N: jax.Array
    expert_N: jax.Array
    weight_N: jax.Array
    aux: RoutingAux


class Scores(NamedTuple):
    """What a router computed on the way to its choice; becomes part of `RoutingAux`, which documents the arrays."""

    logit_TC: jax.Array
    prob_TC: jax.Array
    rank_TC: jax.Array
    margin_TC: jax.Array | None = None


def from_token_choice(
    column_TK: jax.Array,
    weight_TK: jax.Array,
    scores: Scores,
    inputs: RouterInput,
    num_experts: int,
) -> Routing:
    """Lists the assignments token by token, slot by slot; padding is sent to no expert.

    Args:
      column_TK: int column of the scores; C where a slot is not used.
      weight_TK: float factors, 0 where a slot is not used.
      scores: what the router computed.
      inputs: of the router.
      num_experts: E.
    """
    num_tokens, slots = column_TK.shape
    num_columns = scores.logit_TC.shape[1]
    valid_T1 = inputs.mask_T[:, None]
    choice_TK = jnp.where(valid_T1, column_TK, num_columns).astype(jnp.int32)
    used_TK = choice_TK < num_columns
    expert_TK = jnp.where(choice_TK < num_experts, choice_TK, choice_TK + 1)
    expert_TK = jnp.where(used_TK, expert_TK, num_experts)
    token_N = jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), slots)
    weight_N = jnp.where(used_TK, weight_TK, 0).reshape(-1)
    aux = _aux(scores, choice_TK.reshape(-1), inputs)
    return Routing(token_N, expert_TK.reshape(-1), weight_N, aux)


def from_expert_choice(
    token_EC: jax.Array,
    weight_EC: jax.Array,
    scores: Scores,
    inputs: RouterInput,
    limit: jax.Array,
) -> Routing:
    """Lists the assignments expert by expert; what is past the limit, or padding, is sent to no expert.

    Args:
      token_EC: int tokens of each expert, its first choice first; as many as without padding.
      weight_EC: float32 factors.
      scores: what the router computed.
      inputs: of the router.
      limit: int32 scalar, the tokens that an expert may take of those valid in this batch.
    """
    num_experts = scores.logit_TC.shape[1]
    token_N = token_EC.astype(jnp.int32).reshape(-1)
    owner_N, rank_N = jnp.indices(token_EC.shape, dtype=jnp.int32).reshape(2, -1)
    valid_N = inputs.mask_T[token_N] & (rank_N < limit)
    expert_N = jnp.where(valid_N, owner_N, num_experts)
    weight_N = jnp.where(valid_N, weight_EC.reshape(-1), 0)
    return Routing(token_N, expert_N, weight_N, _aux(scores, expert_N, inputs))


def _aux(scores: Scores, choice_N: jax.Array, inputs: RouterInput) -> RoutingAux:
    return RoutingAux(
        logit_TC=scores.logit_TC,
        prob_TC=scores.prob_TC,
        rank_TC=jax.lax.stop_gradient(scores.rank_TC),
        choice_N=choice_N,
        mask_T=inputs.mask_T,
        sequence_T=inputs.sequence_T,
        margin_TC=scores.margin_TC,
    )


def load(expert_N: jax.Array, num_experts: int) -> jax.Array:
    """Counts the assignments of each expert: (E,) float32; ids from E on are left out."""
    count_E = jnp.zeros((num_experts + 1,), jnp.int32).at[expert_N].add(1, mode="drop")
    return count_E[:num_experts].astype(jnp.float32)


def plain_inputs(num_tokens: int, *, train: bool = False, seed: int = 0) -> RouterInput:
    """Describes the tokens of one sequence of which nothing else is known: id 0, no padding, no domain."""
    zeros_T = jnp.zeros((num_tokens,), jnp.int32)
    return RouterInput(
        token_id_T=zeros_T,
        sequence_T=zeros_T,
        position_T=jnp.arange(num_tokens, dtype=jnp.int32),
        mask_T=jnp.ones((num_tokens,), bool),
        domain_T=zeros_T - 1,
        key=jnp.asarray([0, seed], jnp.uint32),
        train=train,
    )


def normal_noise(inputs: RouterInput, width: int) -> jax.Array:
    """Standard normal numbers, (T, width) float32, that depend on step, layer and token only: not on batching."""
    return _noise(inputs, lambda key: jax.random.normal(key, (width,)))


def uniform_noise(inputs: RouterInput, width: int) -> jax.Array:
    """Uniform numbers in [0, 1), (T, width) float32, keyed as in `normal_noise`."""
    return _noise(inputs, lambda key: jax.random.uniform(key, (width,)))


def _noise(inputs: RouterInput, draw) -> jax.Array:
    key = jax.random.wrap_key_data(inputs.key, impl="threefry2x32")
    return jax.vmap(lambda position: draw(jax.random.fold_in(key, position)))(inputs.position_T)
