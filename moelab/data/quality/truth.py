"""How well a filter did, against the truth about the dirt: precision, recall, and what it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np

from moelab.data.quality.table import Table


def outcome(found: Table, number: int) -> dict[str, Any]:
    """Says what a filter did to the documents that reached it.

    Args:
      found: right after the filter, the later ones not applied yet.
      number: of the filter.

    Returns:
      filter; documents, removed, bytes, removed_bytes; precision: of what was removed, the share that is not clean;
      recall: of what is not clean, the share that was removed (None where there is none); clean_removed: share of the
      clean documents; auc: the chance that a dirty document scores below a clean one of its domain (ties count half),
      over pairs within a domain; kinds: per label documents, removed, auc; domains: per domain documents, kept, bytes,
      kept_bytes; reasons: how many went for what.
    """
    reached_N = (found.removed_by_N < 0) | (found.removed_by_N == number)
    removed_N = found.removed_by_N == number
    dirty_N, size_N, score_N = found.dirty_N, found.num_bytes_N, found.score_FN[number]
    hit = int((removed_N & dirty_N).sum())
    clean = reached_N & ~dirty_N
    return {
        "filter": found.filters[number],
        "documents": int(reached_N.sum()),
        "removed": int(removed_N.sum()),
        "bytes": int(size_N[reached_N].sum()),
        "removed_bytes": int(size_N[removed_N].sum()),
        "precision": _share(hit, removed_N.sum()),
        "recall": _share(hit, (reached_N & dirty_N).sum()),
        "clean_removed": _share((removed_N & ~dirty_N).sum(), clean.sum()),
        "auc": auc(score_N, reached_N & dirty_N, clean, found.domain_N),
        "kinds": {
            kind: {
                "documents": int((reached_N & (found.kind_N == k)).sum()),
                "removed": int((removed_N & (found.kind_N == k)).sum()),
                "auc": auc(score_N, reached_N & (found.kind_N == k), clean, found.domain_N)
                if k
                else None,
            }
            for k, kind in enumerate(found.kinds)
        },
        "domains": {
            domain: {
                "documents": int((reached_N & (found.domain_N == d)).sum()),
                "kept": int((reached_N & ~removed_N & (found.domain_N == d)).sum()),
                "bytes": int(size_N[reached_N & (found.domain_N == d)].sum()),
                "kept_bytes": int(size_N[reached_N & ~removed_N & (found.domain_N == d)].sum()),
            }
            for d, domain in enumerate(found.domains)
        },
        "reasons": {
            reason: int((removed_N & (found.reason_N == r)).sum())
            for r, reason in enumerate(found.reasons)
            if (removed_N & (found.reason_N == r)).any()
        },
    }


def labels(found: Table, chosen_N: np.ndarray) -> dict[str, dict[str, dict[str, int]]]:
    """Counts documents and bytes by domain and label, of the documents that are chosen."""
    counts = {}
    for d, domain in enumerate(found.domains):
        counts[domain] = {}
        for k, kind in enumerate(found.kinds):
            these_N = chosen_N & (found.domain_N == d) & (found.kind_N == k)
            if these_N.any():
                counts[domain][kind] = {
                    "documents": int(these_N.sum()),
                    "bytes": int(found.num_bytes_N[these_N].sum()),
                }
    return counts


def _share(part, whole) -> float | None:
    return round(float(part / whole), 6) if whole else None


def auc(
    score_N: np.ndarray, dirty_N: np.ndarray, clean_N: np.ndarray, domain_N: np.ndarray
) -> float | None:
    """Measures how well a score tells dirty from clean within a domain, whatever the threshold.

    AUC = P(score of a dirty document < score of a clean one of its domain) + P(equal) / 2.

    Returns:
      Over all pairs of one domain; None where there is none. 0.5 is blind.

    >>> dirty = np.array([True, False, True, False])
    >>> auc(np.array([0.0, 2.0, 1.0, 3.0]), dirty, ~dirty, np.zeros(4, int))
    1.0
    """
    judged_N = ~np.isnan(score_N)
    below, pairs = 0.0, 0
    for domain in np.unique(domain_N[dirty_N & judged_N]):
        here_N = judged_N & (domain_N == domain)
        dirty, clean = score_N[here_N & dirty_N], np.sort(score_N[here_N & clean_N])
        left = np.searchsorted(clean, dirty, side="left")
        right = np.searchsorted(clean, dirty, side="right")
        below += float((len(clean) - (left + right) / 2).sum())
        pairs += len(dirty) * len(clean)
    return round(below / pairs, 4) if pairs else None
