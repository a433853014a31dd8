"""How many experts a batch touches, and how much the fullest rank has to do.

E experts, k per token, T tokens, R ranks. p_E: probability that a token passes an expert, in sum k.
"""

from __future__ import annotations

import numpy as np

from moelab.errors import UserError


def uniform(experts: int, k: int) -> np.ndarray:
    """Returns p_E where all experts are equally likely."""
    return np.full(experts, k / experts)


def skewed(experts: int, k: int, alpha: float) -> np.ndarray:
    """Returns p_E that falls with the rank as a power: p ~ rank^-alpha, at most 1, in sum k."""
    weight_E = np.arange(1, experts + 1, dtype=float) ** -alpha
    p_E = np.zeros(experts)
    open_E = np.ones(experts, bool)
    while open_E.any():
        scale = (k - p_E[~open_E].sum()) / weight_E[open_E].sum()
        over_E = open_E & (weight_E * scale >= 1)
        if not over_E.any():
            p_E[open_E] = weight_E[open_E] * scale
            break
        p_E[over_E] = 1.0
        open_E &= ~over_E
    return p_E


def of_trace(found, experts: int, k: int) -> np.ndarray:
    """Returns p_E of a real trace: loads of its layers, each sorted, averaged; from `moelab.trace.load`.

    Raises:
      UserError: the trace is of another number of experts.
    """
    if found.num_experts != experts:
        raise UserError(f"the trace has {found.num_experts} experts, the model {experts}")
    loads = [np.bincount(e_TK.ravel(), minlength=experts)[:experts] for e_TK in found.expert_MTK]
    load_E = np.mean([np.sort(load)[::-1] / max(load.sum(), 1) for load in loads], axis=0)
    return np.minimum(load_E * k, 1.0)


def touched(p_E: np.ndarray, tokens) -> np.ndarray:
    """Expects how many experts at least one of T independent tokens passes: sum_e 1 - (1 - p_e)^T.

    Within a token the choices may depend on each other (groups do that): only p_E matters.

    >>> round(float(touched(uniform(256, 8), 64)), 1)
    222.4
    """
    tokens = np.asarray(tokens, float)
    values, counts = np.unique(p_E, return_counts=True)
    missed = np.exp(tokens[..., None] * np.log1p(-np.minimum(values, 1 - 1e-12)))
    return ((1 - missed) * counts).sum(-1)


def fullest(mean, variance, ranks) -> np.ndarray:
    """Expects the maximum over R equal ranks of a nearly normal quantity: mean + sqrt(2 ln R) standard deviations."""
    ranks = np.maximum(np.asarray(ranks, float), 1)
    return mean + np.sqrt(2 * np.log(ranks)) * np.sqrt(np.maximum(variance, 0))


def per_rank(
    p_E: np.ndarray, tokens, ranks, by_load: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Expects experts touched on, and assignments that go to, the fullest of the ranks that share the experts.

    Experts are dealt at random, so ranks differ by chance and, under a skew, by which experts they got.

    Args:
      p_E: probabilities.
      tokens: T of all ranks together.
      ranks: R.
      by_load: experts are placed by load (moelab.placement, EPLB): what is left is chance.

    Returns:
      (touched, assignments) of one rank, at most E/R and at least the mean.
    """
    tokens, ranks = np.asarray(tokens, float), np.asarray(ranks, float)
    experts, k = len(p_E), p_E.sum()
    mean_hit = touched(p_E, tokens) / ranks
    share = 1 - 1 / ranks
    hit_variance = mean_hit * np.maximum(1 - mean_hit * ranks / experts, 0) * share
    hit = np.minimum(fullest(mean_hit, hit_variance, ranks), experts / ranks)
    mean = tokens * k / ranks
    between = 0.0 if by_load else tokens**2 * (p_E.var() * experts / ranks)  # unequal experts
    load = fullest(mean, (mean + between) * share, ranks)
    return np.maximum(hit, mean_hit), np.minimum(load, tokens * np.minimum(k, experts / ranks))


def nodes_of_token(k: int, nodes, limit: float = np.inf) -> np.ndarray:
    """Expects on how many nodes a token's experts are, at most `limit` (node-limited routing)."""
    nodes = np.asarray(nodes, float)
    return np.minimum(nodes * (1 - (1 - 1 / nodes) ** k), limit)
