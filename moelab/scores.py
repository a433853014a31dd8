"""From logits to scores, from scores to a choice, from a choice to weights: the steps that routers share.

T tokens, C columns of scores, K slots per token, D model width, G groups of columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moelab import selection

SCORES = ("softmax", "sigmoid", "sqrt_softplus")


def logits(x_TD: jax.Array, kernel_DC: jax.Array) -> jax.Array:
    """Multiplies tokens by the router's kernel in float32, whatever the dtype of x.

    Args:
      x_TD: (T, D) any float dtype.
      kernel_DC: (D, C) float32.

    Returns:
      (T, C) float32.
    """
    x_TD, kernel_DC = x_TD.astype(jnp.float32), kernel_DC.astype(jnp.float32)
    return jnp.matmul(x_TD, kernel_DC, precision=jax.lax.Precision.HIGHEST)


def score(logit_TC: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Returns scores and their normalisation over the columns, both (T, C) float32.

    softmax: exp(z_i) / sum_j exp(z_j). sigmoid: 1 / (1 + exp(-z_i)). sqrt_softplus: sqrt(log(1 + exp(z_i))) (the
    gate of DeepSeek-V4 as MaxText has it). The last two are normalised in the log domain: there is no epsilon behind
    which a router could hide by pushing all its scores to zero.
    """
    if kind == "softmax":
        prob_TC = jax.nn.softmax(logit_TC, axis=-1)
        return prob_TC, prob_TC
    if kind == "sigmoid":
        log_TC = jax.nn.log_sigmoid(logit_TC)
        return jax.nn.sigmoid(logit_TC), jax.nn.softmax(log_TC, axis=-1)
    if kind == "sqrt_softplus":
        log_TC = 0.5 * _log_softplus(logit_TC)
        return jnp.exp(log_TC), jax.nn.softmax(log_TC, axis=-1)
    raise ValueError(f"score must be one of {', '.join(SCORES)}, got {kind!r}")


def _log_softplus(z: jax.Array) -> jax.Array:
    """log(log(1 + exp(z))), which is z itself to float32 where exp(z) is far below 1."""
    low = z < -15.0
    return jnp.where(low, z, jnp.log(jax.nn.softplus(jnp.where(low, 0.0, z))))


@jax.custom_jvp
def select(value_TC: jax.Array, column_TK: jax.Array) -> jax.Array:
    """Reads value[t, column[t, k]]: (T, K), 0 for columns from C on. The gradient is dense, without a scatter."""
    columns = value_TC.shape[1]
    found_TK = jnp.take_along_axis(value_TC, jnp.minimum(column_TK, columns - 1), axis=1)
    return jnp.where(column_TK < columns, found_TK, jnp.zeros((), value_TC.dtype))


@select.defjvp
def _select_jvp(primals, tangents):
    (value_TC, column_TK), (dvalue_TC, _) = primals, tangents
    columns = jnp.arange(value_TC.shape[1], dtype=column_TK.dtype)
    hit_TKC = column_TK[:, :, None] == columns[None, None]
    picked_TKC = jnp.where(hit_TKC, dvalue_TC[:, None, :], jnp.zeros((), dvalue_TC.dtype))
    return select(value_TC, column_TK), jnp.sum(picked_TKC, axis=-1)


def renormalise(weight_TK: jax.Array) -> jax.Array:
    """Divides each token's weights by their sum; a single weight stays, or its gradient would be gone."""
    if weight_TK.shape[1] == 1:
        return weight_TK
    return weight_TK / jnp.maximum(jnp.sum(weight_TK, axis=-1, keepdims=True), 1e-20)


def entropy(prob_TC: jax.Array) -> jax.Array:
    """Returns -sum p log p over the last axis, in nats. A p of 0 adds nothing, to the gradient neither.

    The slope of p log p is infinite at 0, and 0 * inf is NaN: a closed gate or a softmax that underflows would spoil
    the whole gradient.
    """
    positive = prob_TC > jnp.finfo(jnp.float32).tiny
    log_TC = jnp.log(jnp.where(positive, prob_TC, 1.0))
    return -jnp.sum(jnp.where(positive, prob_TC * log_TC, 0.0), axis=-1)


def keep_best_groups(rank_TC: jax.Array, num_groups: int, kept: int, rule: str) -> jax.Array:
    """Sets the ranks outside of each token's best groups of columns to -inf.

    Args:
      rank_TC: (T, C); group g holds the columns g*C/G to (g+1)*C/G - 1.
      num_groups: G, divides C.
      kept: groups that stay.
      rule: what a group is ranked by: `max` (DeepSeek-V2, arXiv:2405.04434, section 2.2.2) or `sum_top2`
        (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    The mask is -inf: with 0, a masked column beats a kept one whose biased score is negative.
    """
    num_tokens, columns = rank_TC.shape
    grouped_TGC = rank_TC.reshape(num_tokens, num_groups, columns // num_groups)
    best = jax.lax.top_k(grouped_TGC, {"max": 1, "sum_top2": min(2, grouped_TGC.shape[2])}[rule])[0]
    group_TK = selection.top_k(jnp.sum(best, axis=-1), kept)
    hit_TKG = group_TK[:, :, None] == jnp.arange(num_groups, dtype=group_TK.dtype)[None, None]
    stays_TG = jnp.any(hit_TKG, axis=1)
    return jnp.where(stays_TG[:, :, None], grouped_TGC, -jnp.inf).reshape(rank_TC.shape)
