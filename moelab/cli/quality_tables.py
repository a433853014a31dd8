"""Prints what was injected, and what filters did to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab.cli import output
from moelab.report import formatting as fmt


def print_labels(found: Mapping[str, Any]) -> None:
    """Prints documents and bytes per domain and label, before and after the filters.

    Args:
      found: the manifest's "quality".
    """
    print()
    output.print_table(
        ("domain", "label", "documents", "bytes", "documents kept", "bytes kept"),
        [
            (domain, kind, counts["documents"], counts["bytes"], *_kept(found, domain, kind))
            for domain, kinds in found["labels"].items()
            for kind, counts in kinds.items()
        ],
    )


def _kept(found: Mapping[str, Any], domain: str, kind: str) -> tuple[int, int]:
    counts = found["kept_labels"].get(domain, {}).get(kind, {})
    return counts.get("documents", 0), counts.get("bytes", 0)


def print_outcomes(
    outcomes: Sequence[Mapping[str, Any]], together: Mapping[str, Any] | None = None
) -> None:
    """Prints precision and recall of each filter, the share that it removed of each label, and what it keeps where.

    Args:
      outcomes: of each filter (truth.outcome).
      together: of a chain (truth.of_all), for a last row; one filter alone is the chain, and gets none.
    """
    if not outcomes:
        return
    each = outcomes
    if together and len(each) > 1:
        outcomes = [*each, together]
    print()
    output.print_table(
        ("filter", "documents", "removed", "precision", "recall", "clean removed", "AUC"),
        [
            (
                one["filter"],
                one["documents"],
                one["removed"],
                *(_number(one[key]) for key in ("precision", "recall", "clean_removed", "auc")),
            )
            for one in outcomes
        ],
    )
    kinds = list(dict.fromkeys(kind for one in outcomes for kind in one["kinds"]))
    if len(kinds) > 1:
        _by_name("removed of label", outcomes, "kinds", kinds, _removed)
        _by_name("AUC against clean", each, "kinds", kinds[1:], lambda row: _number(row["auc"]))
    domains = list(dict.fromkeys(name for one in outcomes for name in one["domains"]))
    _by_name("bytes kept of domain", outcomes, "domains", domains, _share)


def _by_name(title: str, outcomes, section: str, names: Sequence[str], cell) -> None:
    print()
    output.print_table(
        (title, *names),
        [
            (one["filter"], *(cell(one[section][name]) for name in names if name in one[section]))
            for one in outcomes
        ],
    )


def _removed(row: Mapping[str, int]) -> str:
    return fmt.percent(row["removed"] / row["documents"], 1) if row["documents"] else "-"


def _share(row: Mapping[str, int]) -> str:
    return fmt.percent(row["kept_bytes"] / row["bytes"], 1) if row["bytes"] else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
