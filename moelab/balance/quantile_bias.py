"""Quantile balancing: the bias that would have balanced the last batch, estimated from its scores.

    alpha_t = (k+1)-th largest of (s_t + b),   beta_i = quantile_(1 - k/C) over t of (s_ti - alpha_t)
    b <- (1 - rate) * b + rate * (mean(beta) - beta)

J. Su, kexue.fm, article 11619. Expert i beats the threshold of a share k/C of the tokens exactly if its bias is
-beta_i; only differences of biases matter, so their mean is taken off. Signs differ between codes: s - beta there is
s + b here. The published estimators:

    exact        over the whole batch; with rate < 1 a moving average (Megatron-LM)
    histogram    counts in fixed bins add up over devices and need no sort; they resolve 2 span / bins, so that small
                 scores, as of a softmax over many experts, want more bins
    local_mean   the mean of the micro-batches' own quantiles (Marin)

Under `group_limited` the threshold ignores the groups, and the balance is not exact.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing
from moelab.router import Router
from moelab.routing import Routing

ESTIMATORS = ("exact", "histogram", "local_mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.Mechanism):
    """Moves the bias to what the last batch's scores call for."""

    steers = "bias"

    rate: float = 0.0  # share of the way to the new estimate per step; 0: off; 1: no memory
    estimator: str = "exact"  # exact, histogram or local_mean
    bins: int = 1000  # of the histogram
    span: float = (
        1.0  # the histogram covers margins from -span to span; 1 is right for scores in 0..1
    )

    def __post_init__(self):
        if problems := _check_fields(dataclasses.asdict(self)):
            raise ValueError("; ".join(f"{name} {message}" for name, message in problems))

    @property
    def invariant(self) -> bool:
        """The mean of local quantiles depends on what is local."""
        return self.estimator != "local_mean"

    def init(self, router: Router) -> balancing.State:
        """A zero bias: (C,) float32."""
        return {"bias_C": jnp.zeros((router.num_columns,), jnp.float32)}

    def observe(
        self, routing: Routing, state: balancing.State, router: Router
    ) -> dict[str, jax.Array]:
        """What the estimator adds up over micro-batches."""
        mask_T = routing.aux.mask_T
        if self.estimator == "exact":
            return {}
        margin_TC = margins(routing, state["bias_C"], router.k)
        if self.estimator == "local_mean":
            tokens = jnp.sum(mask_T).astype(jnp.float32)
            beta_C = quantile(margin_TC, mask_T, 1 - router.k / router.num_columns)
            return {"beta_C": jnp.where(tokens > 0, beta_C * tokens, 0.0), "tokens": tokens}
        place_TC = jnp.clip(
            jnp.floor((margin_TC / self.span + 1) * (self.bins / 2)), 0, self.bins - 1
        )
        column_TC = jnp.broadcast_to(jnp.arange(router.num_columns)[None], place_TC.shape)
        count_CB = jnp.zeros((router.num_columns, self.bins), jnp.float32)
        added_TC = jnp.broadcast_to(mask_T[:, None].astype(jnp.float32), place_TC.shape)
        return {"count_CB": count_CB.at[column_TC, place_TC.astype(jnp.int32)].add(added_TC)}

    def rows(
        self, routing: Routing, state: balancing.State, router: Router
    ) -> dict[str, jax.Array]:
        """Margins of all tokens for the exact quantile, infinite for padding."""
        if self.estimator != "exact":
            return {}
        margin_TC = margins(routing, state["bias_C"], router.k)
        return {"margin_TC": jnp.where(routing.aux.mask_T[:, None], margin_TC, jnp.inf)}

    def update(
        self, state: balancing.State, total: dict[str, jax.Array], router: Router
    ) -> balancing.State:
        """Moves the bias to minus the estimated quantiles, mean taken off."""
        level = 1 - router.k / router.num_columns
        if self.estimator == "exact":
            margin_TC = total["margin_TC"]
            valid_T = margin_TC[:, 0] < jnp.inf
            seen, beta_C = jnp.any(valid_T), quantile(margin_TC, valid_T, level)
        elif self.estimator == "local_mean":
            seen = total["tokens"] > 0
            beta_C = total["beta_C"] / jnp.maximum(total["tokens"], 1.0)
        else:
            seen = jnp.sum(total["count_CB"]) > 0
            beta_C = self.span * histogram_quantile(total["count_CB"], level)
        bias_C = state["bias_C"] * (1 - self.rate) + self.rate * (jnp.mean(beta_C) - beta_C)
        return balancing.moved_if(seen, {"bias_C": bias_C}, state)

    def selection_bias(self, state: balancing.State) -> jax.Array:
        """The bias itself."""
        return state["bias_C"]


def margins(routing: Routing, bias_C: jax.Array, k: int) -> jax.Array:
    """Returns s - alpha, (T, C) float32: how far each score is from the best biased score that was not selected."""
    rank_TC = routing.aux.rank_TC
    alpha_T = jax.lax.top_k(rank_TC + bias_C[None, :], k + 1)[0][:, k]
    return rank_TC - alpha_T[:, None]


def quantile(value_TC: jax.Array, mask_T: jax.Array, level: float) -> jax.Array:
    """Returns each column's quantile over the valid rows, linear between two: (C,) float32."""
    sorted_TC = jnp.sort(jnp.where(mask_T[:, None], value_TC, jnp.inf), axis=0)
    place = level * jnp.maximum(jnp.sum(mask_T) - 1, 0).astype(jnp.float32)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(jnp.sum(mask_T) - 1, 0))
    part = place - low.astype(jnp.float32)
    return sorted_TC[low] * (1 - part) + sorted_TC[high] * part


def histogram_quantile(count_CB: jax.Array, level: float) -> jax.Array:
    """Returns each column's quantile from counts in equal bins over [-1, 1], linear inside a bin: (C,) float32."""
    bins = count_CB.shape[1]
    upto_CB = jnp.cumsum(count_CB, axis=1)
    wanted_C1 = level * upto_CB[:, -1:]
    bin_C = jnp.argmax(upto_CB >= wanted_C1, axis=1)[:, None]
    count_C = jnp.take_along_axis(count_CB, bin_C, axis=1)[:, 0]
    before_C = jnp.take_along_axis(upto_CB, bin_C, axis=1)[:, 0] - count_C
    inside_C = (wanted_C1[:, 0] - before_C) / jnp.maximum(count_C, 1.0)
    return (bin_C[:, 0].astype(jnp.float32) + inside_C) * (2 / bins) - 1


def _check_fields(fields: dict) -> list[tuple[str, str]]:
    """Lists what is wrong whatever the router."""
    problems = []
    if not 0 <= fields["rate"] <= 1:
        problems.append(("rate", f"must be in 0..1, got {fields['rate']}"))
    if fields["estimator"] not in ESTIMATORS:
        names = f"{', '.join(ESTIMATORS)} (with rate < 1 a moving average)"
        problems.append(("estimator", f"must be one of {names}, got {fields['estimator']!r}"))
    if fields["bins"] < 2:
        problems.append(("bins", f"must be at least 2, got {fields['bins']}"))
    if not fields["span"] > 0:
        problems.append(("span", f"must be above 0, got {fields['span']}"))
    return problems


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = _check_fields(fields)
    router = balancing.router_of(config)
    if router.k >= router.num_columns:
        problems.append(("rate", "balances nothing where every expert is chosen; set it to 0"))
    if fields["estimator"] == "histogram" and fields["span"] == 1 and not _bounded(config.router):
        message = "must cover the scores, which are not within 0..1 for this router; 10 is a start"
        problems.append(("span", message))
    return problems


def _bounded(router) -> bool:
    """Whether what the router ranks by lies within 0..1."""
    if "score_before_selection" in router:
        return router.score_before_selection and router.score != "sqrt_softplus"
    return router.kind != "noisy_top_k"
