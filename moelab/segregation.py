"""Do experts segregate the dirt? Load, and what the chosen expert says about the quality of the text. No jax.

A trace of training text carries the quality bucket of each document in its header (routes.record): the label of what
was injected, or a part of a filter's scores.

M MoE layers, T tokens, C columns of the router's scores, G domains, Q quality buckets, U documents, P permutations.
"""

from __future__ import annotations

import numpy as np

from moelab.diagnostics import (
    Specialisation,
    against_null,
    count_slots,
    dealt,
    mutual_information,
)
from moelab.trace import Trace, TraceError


def bucket_of(trace: Trace) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Finds the quality bucket of each token: of the label or score of its document (data/quality/buckets.py).

    Returns:
      The buckets' names and int64 (T,) indices; None where the text of the trace has none, as evaluation splits do.

    Raises:
      TraceError: the header lists buckets, and not for every document.
    """
    found = trace.header.get("quality")
    if found is None:
        return None
    try:
        names = tuple(map(str, found["names"]))
        bucket_by_document = {
            int(name): int(bucket) for name, bucket in found["of_document"].items()
        }
        wrong = [bucket for bucket in bucket_by_document.values() if not 0 <= bucket < len(names)]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise TraceError(f"header's quality wants names and of_document; {error!r}") from error
    documents_U, document_T = np.unique(trace.document_T, return_inverse=True)
    missing = [name for name in documents_U.tolist() if name not in bucket_by_document]
    if missing or wrong:
        raise TraceError(
            f"header's quality has no bucket for document {missing[0]}"
            if missing
            else f"header's quality has bucket {wrong[0]} of {len(names)}"
        )
    return names, np.array([bucket_by_document[name] for name in documents_U.tolist()])[document_T]


def load(trace: Trace) -> np.ndarray | None:
    """Counts the assignments of each column by each quality bucket.

    Returns:
      int64 (M, Q, C); None where the text has no buckets.
    """
    found = bucket_of(trace)
    if found is None:
        return None
    names, bucket_T = found
    return np.stack(
        [
            count_slots(bucket_T, expert_TK, len(names), trace.num_columns)
            for expert_TK in trace.expert_MTK
        ]
    )


def specialisation(trace: Trace, permutations: int = 200, seed: int = 0) -> Specialisation | None:
    """Measures whether experts tell dirt from clean text of the same domain: I(expert; bucket | domain).

        I(expert; bucket | domain) = sum_g p_g I(expert; bucket) within domain g

    Dirt is not spread evenly over domains, so that experts of a domain would seem experts of its dirt: what they know
    of the domain is conditioned away, and the null deals the buckets anew to the documents of each domain.

    Args:
      trace: of text with buckets; tokens of unknown domain (-1) are left out.
      permutations: P >= 1.
      seed: of the permutations.

    Returns:
      Specialisation, whose normalised_M is over H(bucket | domain); None where no domain of the text has two buckets.

    Raises:
      TraceError: the buckets do not fit the trace.
      ValueError: permutations < 1.
    """
    if permutations < 1:
        raise ValueError(f"permutations wants at least 1; got {permutations}")
    found = bucket_of(trace)
    known_T = trace.domain_T >= 0
    if found is None or not known_T.any():
        return None
    names, bucket_T = found
    _, first_U, document_T = np.unique(
        trace.document_T[known_T], return_index=True, return_inverse=True
    )
    domain_U = trace.domain_T[known_T][first_U].astype(np.int64)
    bucket_U = bucket_T[known_T][first_U]
    if all(len(np.unique(bucket_U[domain_U == g])) < 2 for g in np.unique(domain_U)):
        return None
    generator = np.random.default_rng(seed)
    dealt_PU = np.stack(
        [_permuted_within(bucket_U, domain_U, generator) for _ in range(permutations)]
    )
    shape = (len(trace.domains), len(names))
    mi_M, normalised_M, null_MP = [], [], []
    for expert_TK in trace.expert_MTK:
        count_UC = count_slots(document_T, expert_TK[known_T], len(domain_U), trace.num_columns)
        count_GQC = _within(count_UC, domain_U, bucket_U, shape)
        mi_M.append(_conditional(count_GQC))
        # The bucket itself as the expert says all there is to say.
        all_GQQ = count_GQC.sum(-1, keepdims=True) * np.eye(len(names))
        normalised_M.append(mi_M[-1] / (_conditional(all_GQQ) or np.nan))
        null_MP.append(
            [_conditional(_within(count_UC, domain_U, dealt_U, shape)) for dealt_U in dealt_PU]
        )
    return against_null(mi_M, null_MP, normalised_M)


def _permuted_within(
    bucket_U: np.ndarray, domain_U: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    dealt_U = bucket_U.copy()
    for domain in np.unique(domain_U):
        mine = np.flatnonzero(domain_U == domain)
        dealt_U[mine] = generator.permutation(bucket_U[mine])
    return dealt_U


def _within(
    count_UC: np.ndarray, domain_U: np.ndarray, bucket_U: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Sums documents' counts by domain and bucket: (G, Q, C)."""
    cell_U = domain_U * shape[1] + bucket_U
    return dealt(count_UC, cell_U, shape[0] * shape[1]).reshape(*shape, -1)


def _conditional(count_GQC: np.ndarray) -> float:
    """Mean of the domains' mutual informations, by their assignments; NaN where there are none."""
    total_G = count_GQC.sum((1, 2))
    if not total_G.any():
        return float("nan")
    within_G = mutual_information(count_GQC[total_G > 0])
    return float((within_G * total_G[total_G > 0]).sum() / total_G.sum())
