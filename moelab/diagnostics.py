"""What a route trace says: load, co-activation, saturation, flips, specialisation. No jax.

Every function is pure and works on `moelab.trace.Trace`. A token's experts are a *set*: the order
of the slots and a column that stands in two slots do not count; slots without expert are left out.

M MoE layers, T tokens, K slots per token, C columns of the router's scores, G domains, U documents,
P permutations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moelab.trace import Trace, TraceError

_CHUNK = 1 << 16  # tokens: bounds the (T, C) matrices that are in memory at once
_TIE = 1e-12  # nats: below this two mutual informations are the same number, summed otherwise


class FlipRate(NamedTuple):
    """How often two routings of the same tokens differ.

    Attributes:
      layer_M: float64, share of tokens whose set of experts differs in the layer.
      token: share of tokens with a different set in at least one layer.
    """

    layer_M: np.ndarray
    token: float


class Specialisation(NamedTuple):
    """How much the chosen expert says about the domain; float64, one number per layer.

    Attributes:
      mi_M: mutual information of expert and domain, nats.
      null_mean_M: its mean when the domains are dealt to the documents at random, nats.
      null_q95_M: the 95 % quantile of the same, nats.
      p_value_M: (1 + number of permutations at least as high) / (1 + permutations).
      normalised_M: mi / H(domain), between 0 and 1.
    """

    mi_M: np.ndarray
    null_mean_M: np.ndarray
    null_q95_M: np.ndarray
    p_value_M: np.ndarray
    normalised_M: np.ndarray


def load_by_domain(trace: Trace) -> np.ndarray:
    """Counts the assignments of each column by each domain.

    Returns:
      int64 (M, G, C): filled slots. Tokens of unknown domain (-1) are left out.
    """
    known_T = trace.domain_T >= 0
    domain_T = trace.domain_T[known_T]
    return np.stack(
        [
            count_slots(domain_T, expert_TK[known_T], len(trace.domains), trace.num_columns)
            for expert_TK in trace.expert_MTK
        ]
    )


def co_activation(trace: Trace) -> np.ndarray:
    """Measures how often two columns serve the same token: share_ij = |{t: i, j in S_t}| / T.

    Returns:
      float64 (M, C, C), symmetric: share of all tokens; the diagonal is the share that chose i.
    """
    layers, tokens, _ = trace.expert_MTK.shape
    count_MCC = np.zeros((layers, trace.num_columns, trace.num_columns))
    for m, expert_TK in enumerate(trace.expert_MTK):
        for part in _chunks(tokens):
            chosen_TC = _chosen(expert_TK[part], trace.num_columns).astype(np.float32)
            count_MCC[m] += chosen_TC.T @ chosen_TC  # exact: counts below 2^24
    return count_MCC / tokens


def independence_ratio(share_MCC: np.ndarray) -> np.ndarray:
    """Compares co-activation with independent choices: share_ij / (share_i share_j).

    1 is no association. Choosing without repetition leans below 1 by itself: K of C columns taken
    at random have the ratio (K - 1) C / (K (C - 1)), which is 0 for K = 1.

    Args:
      share_MCC: what `co_activation` returned.

    Returns:
      float64 (M, C, C); NaN on the diagonal and where a column was never chosen.
    """
    share_MCC = np.asarray(share_MCC, np.float64)
    if share_MCC.ndim != 3 or share_MCC.shape[1] != share_MCC.shape[2]:
        raise ValueError(f"wants co-activation shares (M, C, C); got shape {share_MCC.shape}")
    alone_MC = np.diagonal(share_MCC, axis1=1, axis2=2)
    ratio_MCC = _divided(share_MCC, alone_MC[:, :, None] * alone_MC[:, None, :])
    ratio_MCC[:, np.arange(share_MCC.shape[1]), np.arange(share_MCC.shape[1])] = np.nan
    return ratio_MCC


def saturation(early: Trace, final: Trace) -> np.ndarray:
    """Measures how far routing has settled: the mean over tokens of |S_early & S_final| / k.

    Args:
      early: routing by a checkpoint during training.
      final: routing of the same tokens by the last checkpoint.

    Returns:
      float64 (M,) between 0 and 1. k is the number of experts that the token has in `final`; tokens
      without any there are left out (NaN where none is left).

    Raises:
      TraceError: the traces are not of the same tokens, layers and columns.

    Reference:
      Router saturation of OLMoE, arXiv:2409.02060, where k is the same for all tokens.
    """
    shared_M, tokens_M = np.zeros(len(final.layers)), np.zeros(len(final.layers))
    for m, _, early_TC, final_TC in _pairs(early, final):
        size_T = final_TC.sum(1)
        share_T = _divided((early_TC & final_TC).sum(1), size_T)
        shared_M[m] += share_T[size_T > 0].sum()
        tokens_M[m] += (size_T > 0).sum()
    return _divided(shared_M, tokens_M)


def flip_rate(a: Trace, b: Trace) -> FlipRate:
    """Measures how often two routings of the same tokens choose different sets of experts.

    Raises:
      TraceError: the traces are not of the same tokens, layers and columns.

    Reference:
      arXiv:2510.11370 reports both shares for routers in training against inference.
    """
    flipped_M = np.zeros(len(a.layers))
    any_T = np.zeros(a.token_id_T.shape, bool)
    for m, part, a_TC, b_TC in _pairs(a, b):
        flipped_T = (a_TC != b_TC).any(1)
        flipped_M[m] += flipped_T.sum()
        any_T[part] |= flipped_T
    return FlipRate(flipped_M / len(any_T), float(any_T.mean()))


def overlap(a: Trace, b: Trace) -> np.ndarray:
    """Measures the likeness of two routings: the mean over tokens of |A & B| / |A | B| (Jaccard).

    Returns:
      float64 (M,) between 0 and 1; two empty sets count as equal (1).

    Raises:
      TraceError: the traces are not of the same tokens, layers and columns.
    """
    total_M = np.zeros(len(a.layers))
    for m, _, a_TC, b_TC in _pairs(a, b):
        union_T = (a_TC | b_TC).sum(1)
        total_M[m] += np.where(
            union_T > 0, (a_TC & b_TC).sum(1) / np.maximum(union_T, 1), 1.0
        ).sum()
    return total_M / len(a.token_id_T)


def mutual_information(count_GC: np.ndarray) -> np.ndarray:
    """Measures sum_gc p_gc ln(p_gc / (p_g p_c)) of a table of counts.

    Args:
      count_GC: (..., G, C) counts or shares, >= 0.

    Returns:
      float64 (...), nats, >= 0; NaN for a table without any count.

    >>> round(float(mutual_information(np.eye(2))), 6)  # ln 2: each column has its own row
    0.693147
    """
    count_GC = np.asarray(count_GC, np.float64)
    if count_GC.ndim < 2 or (count_GC < 0).any():
        raise ValueError(f"wants counts >= 0 with axes (..., G, C); got shape {count_GC.shape}")
    p_GC = _divided(count_GC, count_GC.sum((-2, -1), keepdims=True))
    even_GC = p_GC.sum(-1, keepdims=True) * p_GC.sum(-2, keepdims=True)
    ratio_GC = np.divide(p_GC, even_GC, where=p_GC > 0, out=np.ones_like(p_GC))
    return np.maximum((p_GC * np.log(ratio_GC)).sum((-2, -1)), 0.0)


def specialisation(trace: Trace, permutations: int = 200, seed: int = 0) -> Specialisation:
    """Measures the mutual information of expert and domain against a permutation null.

    The estimate is biased upwards by finite text, so it is compared with the same text under
    domains dealt anew. They are dealt to whole documents: tokens of one document resemble each
    other, and permuting single tokens would call almost any router specialised. Few documents
    allow few arrangements, and then no small p value. All layers see the same permutations.

    Args:
      trace: with two domains at least; tokens of unknown domain (-1) are left out.
      permutations: P >= 1.
      seed: of the permutations.

    Returns:
      Specialisation; NaN in a layer without any assignment.

    Raises:
      TraceError: fewer than two domains, or a document in two domains.
      ValueError: permutations < 1.

    Reference:
      Permutation p value with +1: Phipson and Smyth 2010, doi:10.2202/1544-6115.1585.
    """
    if permutations < 1:
        raise ValueError(f"permutations wants at least 1; got {permutations}")
    known_T = trace.domain_T >= 0
    document_T, domain_U = _documents(trace, known_T)
    generator = np.random.default_rng(seed)
    domain_PU = np.stack([generator.permutation(domain_U) for _ in range(permutations)])
    mi_M, normalised_M, null_MP = [], [], []
    for expert_TK in trace.expert_MTK:
        count_UC = count_slots(document_T, expert_TK[known_T], len(domain_U), trace.num_columns)
        count_GC = dealt(count_UC, domain_U, len(trace.domains))
        mi_M.append(mutual_information(count_GC))
        normalised_M.append(mi_M[-1] / _entropy(count_GC.sum(1)))
        null_MP.append(
            [mutual_information(dealt(count_UC, g_U, len(trace.domains))) for g_U in domain_PU]
        )
    return against_null(mi_M, null_MP, normalised_M)


def against_null(mi_M, null_MP, normalised_M) -> Specialisation:
    """Puts measured values beside those of P permutations; arguments per layer, as lists."""
    mi_M, null_MP = np.array(mi_M), np.array(null_MP)
    above_M = (null_MP >= mi_M[:, None] - _TIE).sum(1)
    return Specialisation(
        mi_M=mi_M,
        null_mean_M=null_MP.mean(1),
        null_q95_M=np.quantile(null_MP, 0.95, axis=1),
        p_value_M=np.where(np.isnan(mi_M), np.nan, (1 + above_M) / (1 + null_MP.shape[1])),
        normalised_M=np.array(normalised_M),
    )


def oracle_information(trace: Trace) -> np.ndarray:
    """Measures the most that experts can say about the domain: what the `oracle` router would reach.

    Domain d owns the experts e with e mod G = d, so that the expert gives the domain away: H(domain).
    With fewer experts than domains, domain d has expert d mod E, and less is said.

    Returns:
      float64 (M,), nats, for the assignments that each domain has in this trace; 0 for one domain.
    """
    count_MG = load_by_domain(trace).sum(2).astype(np.float64)
    owned = min(len(trace.domains), trace.num_experts)
    owner_G = np.arange(len(trace.domains)) % max(owned, 1)
    count_MGC = count_MG[:, :, None] * (owner_G[:, None] == np.arange(max(owned, 1)))
    return mutual_information(count_MGC)


def vocabulary_specialisation(trace: Trace, minimum: int = 8) -> np.ndarray:
    """Measures how fixed routing is by the token id: mean over ids x of max_e N_xe / N_x.

    Args:
      trace: any trace.
      minimum: ids that occur less often are left out: one occurrence would always count as fixed.

    Returns:
      float64 (M,): 1 where every id has one expert that it always chooses. N_xe is the number of
      occurrences of x that choose e, N_x of all; the mean is over ids, not over occurrences.

    Raises:
      TraceError: no id occurs `minimum` times.

    Reference:
      After the vocabulary specialization of OLMoE, arXiv:2409.02060, here per token id.
    """
    _, id_T, total_V = np.unique(trace.token_id_T, return_inverse=True, return_counts=True)
    often_V = total_V >= minimum
    if not often_V.any():
        raise TraceError(f"no token id occurs {minimum} times; the most is {total_V.max()}")
    kept_T, row_V = often_V[id_T], np.cumsum(often_V) - 1
    row_T, total_V = row_V[id_T[kept_T]], total_V[often_V]
    found_M = []
    for expert_TK in trace.expert_MTK:
        once_TK = np.sort(expert_TK[kept_T], axis=1)
        once_TK[:, 1:][once_TK[:, 1:] == once_TK[:, :-1]] = trace.num_columns  # counted once
        count_VC = count_slots(row_T, once_TK, len(total_V), trace.num_columns)
        found_M.append((count_VC.max(1) / total_V).mean())
    return np.array(found_M)


def _documents(trace: Trace, known_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the documents of the known tokens 0..U-1 and finds each one's domain."""
    domain_T = trace.domain_T[known_T].astype(np.int64)
    if len(np.unique(domain_T)) < 2:
        raise TraceError(
            f"specialisation wants tokens of two domains at least; got {len(np.unique(domain_T))}"
        )
    id_U, first_U, document_T = np.unique(
        trace.document_T[known_T], return_index=True, return_inverse=True
    )
    mixed_T = domain_T != domain_T[first_U][document_T]
    if mixed_T.any():
        raise TraceError(f"document {id_U[document_T[mixed_T][0]]} has tokens of two domains")
    return document_T, domain_T[first_U]


def dealt(count_UC: np.ndarray, domain_U: np.ndarray, domains: int) -> np.ndarray:
    """Sums the counts of documents by their domain: float64 (domains, C)."""
    one_hot_GU = (domain_U == np.arange(domains)[:, None]).astype(np.float64)
    return one_hot_GU @ count_UC.astype(np.float64)  # exact: integers below 2^53


def _entropy(count_G: np.ndarray) -> float:
    share_G = count_G[count_G > 0] / max(count_G.sum(), 1)
    return float(-(share_G * np.log(share_G)).sum()) or np.nan


def count_slots(row_T: np.ndarray, expert_TK: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Counts the filled slots: int64 (rows, columns)."""
    cell_TK = row_T.astype(np.int64)[:, None] * (columns + 1) + expert_TK
    count = np.bincount(cell_TK.ravel(), minlength=rows * (columns + 1))
    return count.reshape(rows, columns + 1)[:, :columns]


def _pairs(a: Trace, b: Trace) -> Iterator[tuple[int, slice, np.ndarray, np.ndarray]]:
    """Yields (layer, part of the tokens, sets of a, sets of b) after checking that they match."""
    if a.layers != b.layers:
        raise TraceError(f"the traces have different layers: {a.layers} and {b.layers}")
    if a.num_columns != b.num_columns:
        raise TraceError(f"the traces have {a.num_columns} and {b.num_columns} columns")
    for name, left_T, right_T in (
        ("tokens", a.token_id_T, b.token_id_T),
        ("documents", a.document_T, b.document_T),
    ):
        if len(left_T) != len(right_T):
            raise TraceError(f"the traces have {len(left_T)} and {len(right_T)} tokens")
        at = np.flatnonzero(left_T != right_T)
        if len(at):
            raise TraceError(
                f"the traces are of different {name}: {len(at)} of {len(left_T)} differ, first at "
                f"{at[0]} ({left_T[at[0]]} and {right_T[at[0]]})"
            )
    for m in range(len(a.layers)):
        for part in _chunks(len(a.token_id_T)):
            sets = (_chosen(trace.expert_MTK[m, part], trace.num_columns) for trace in (a, b))
            yield m, part, *sets


def _chunks(tokens: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, tokens, _CHUNK))


def _chosen(expert_TK: np.ndarray, columns: int) -> np.ndarray:
    """Turns slots into sets: bool (T, C)."""
    chosen_TC = np.zeros((len(expert_TK), columns + 1), bool)
    np.put_along_axis(chosen_TC, expert_TK.astype(np.int64), True, axis=1)
    return chosen_TC[:, :columns]


def _divided(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divides with NaN where there is nothing to divide by."""
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    return np.divide(part, whole, where=np.asarray(whole) > 0, out=np.full(shape, np.nan))
