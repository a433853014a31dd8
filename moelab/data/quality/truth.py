"""How well a filter did, against the truth about the dirt: precision, recall, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moelab.data.quality.contract import CLEAN
from moelab.data.quality.table import Table

ALL = "all"  # stands for the filters together where each has its name

# {domain: {label: {"documents": count, "bytes": size}}}
Labels = Mapping[str, Mapping[str, Mapping[str, int]]]


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


def of_all(before: Labels, after: Labels) -> dict[str, Any]:
    """Says what filters one after the other did together; a document counts once, whichever of them removed it.

    Args:
      before: of `labels`, for all documents: "labels" of a dataset's manifest.
      after: the same for those that the last filter left: "kept_labels".

    Returns:
      As `outcome`, for a filter named "all"; there is no score of all, so that every auc is None, and no reasons.

    >>> before = {"d": {"clean": {"documents": 4, "bytes": 40}, "noise": {"documents": 2, "bytes": 10}}}
    >>> after = {"d": {"clean": {"documents": 3, "bytes": 30}}}
    >>> found = of_all(before, after)
    >>> found["removed"], found["precision"], found["recall"], found["clean_removed"]
    (3, 0.666667, 1.0, 0.25)
    """
    domains = {
        domain: {
            "documents": _total(before, "documents", domain),
            "kept": _total(after, "documents", domain),
            "bytes": _total(before, "bytes", domain),
            "kept_bytes": _total(after, "bytes", domain),
        }
        for domain in before
    }
    kinds = {}
    for kind in dict.fromkeys((CLEAN, *(kind for counts in before.values() for kind in counts))):
        count = _total(before, "documents", kind=kind)
        removed = count - _total(after, "documents", kind=kind)
        kinds[kind] = {"documents": count, "removed": removed, "auc": None}
    count, clean = _total(before, "documents"), kinds[CLEAN]
    removed = count - _total(after, "documents")
    hit = removed - clean["removed"]
    size = _total(before, "bytes")
    return {
        "filter": ALL,
        "documents": count,
        "removed": removed,
        "bytes": size,
        "removed_bytes": size - _total(after, "bytes"),
        "precision": _share(hit, removed),
        "recall": _share(hit, count - clean["documents"]),
        "clean_removed": _share(clean["removed"], clean["documents"]),
        "auc": None,
        "kinds": kinds,
        "domains": domains,
    }


def _total(labels: Labels, what: str, domain: str = "", kind: str = "") -> int:
    """Adds up the documents or bytes of a domain, of a label, or of everything."""
    return sum(
        counts[what]
        for name, kinds in labels.items()
        if domain in ("", name)
        for label, counts in kinds.items()
        if kind in ("", label)
    )


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
