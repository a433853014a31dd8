"""Filters one after the other: each judges what the earlier ones left, and every score is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moelab.data.document import DataError
from moelab.data.quality import spec, table, truth
from moelab.data.quality.contract import Verdicts
from moelab.data.quality.pool import Pool
from moelab.spelling import hint

DECIMALS = 4  # of the scores that are kept


def run(pool: Pool, filters: Sequence[Any]) -> tuple[table.Table, list[dict[str, Any]]]:
    """Applies filters in order.

    Args:
      pool: nothing of it is removed yet; afterwards it is what the filters left.
      filters: of spec.parse_filters.

    Returns:
      The table of all training documents, and what truth.outcome says of each filter.

    Raises:
      DataError: the training split is empty, or a filter leaves a domain without any document; it is named.
    """
    found, outcomes = table.begin(pool), []
    if not len(found):
        raise DataError("the training split is empty: there is nothing to inject or to filter")
    _check_domains(found.domains, pool, filters)
    pool.alive_N = np.ones(len(found), bool)
    for tool in filters:
        verdicts = tool.judge(pool)
        found = _with(found, pool.alive_N, tool, verdicts)
        outcomes.append(truth.outcome(found, len(found.filters) - 1))
        _refuse_empty(found, pool.alive_N, tool)
        pool.alive_N = found.kept_N.copy()
    return found, outcomes


def score(pool: Pool, filters: Sequence[Any]) -> tuple[table.Table, list[dict[str, Any]]]:
    """Lets every filter judge all documents, whatever the others say; arguments and results as of `run`.

    removed_by_N is of the last filter alone.
    """
    found, outcomes = table.begin(pool), []
    if not len(found):
        raise DataError("the training split is empty: there is nothing to score")
    _check_domains(found.domains, pool, filters)
    pool.alive_N = np.ones(len(found), bool)
    for tool in filters:
        fresh = dataclasses.replace(
            found,
            removed_by_N=np.full(len(found), -1, np.int32),
            reason_N=np.zeros(len(found), np.int32),
        )
        found = _with(fresh, pool.alive_N, tool, tool.judge(pool))
        outcomes.append(truth.outcome(found, len(found.filters) - 1))
    return found, outcomes


def _check_domains(known: Sequence[str], pool: Pool, filters: Sequence[Any]) -> None:
    """Refuses a domain that the training split has not."""
    for where, tools in (("data.inject", pool.injectors), ("data.filter", filters)):
        for tool in tools:
            for name in tool.domains:
                if name not in known:
                    guess = hint(name, known) or f"; the training split has {', '.join(known)}"
                    raise DataError(f"{where}: {tool.kind}: no domain {name!r}{guess}")


def _with(found: table.Table, alive_N: np.ndarray, tool, verdicts: Verdicts) -> table.Table:
    """Adds what a filter says of the documents that are left."""
    count = int(alive_N.sum())
    if not len(verdicts.score_N) == len(verdicts.kept_N) == len(verdicts.reason_N) == count:
        raise RuntimeError(f"{tool.kind} judged {len(verdicts.kept_N)} of {count} documents")
    score_N = np.full(len(found), np.nan, np.float32)
    # Rounded, so that what machines differ in is not in a dataset's hash; it is judged before.
    score_N[alive_N] = np.round(verdicts.score_N, DECIMALS)
    removed_N = np.zeros(len(found), bool)
    removed_N[alive_N] = ~verdicts.kept_N
    reasons, reason_N = table.index([*found.reasons, *verdicts.reason_N[~verdicts.kept_N].tolist()])
    all_reasons_N = found.reason_N.copy()
    all_reasons_N[removed_N] = reason_N[len(found.reasons) :]
    return dataclasses.replace(
        found,
        filters=(*found.filters, spec.written(tool)),
        reasons=reasons,
        reason_N=all_reasons_N,
        score_FN=np.concatenate([found.score_FN, score_N[None]]),
        removed_by_N=np.where(removed_N, len(found.filters), found.removed_by_N).astype(np.int32),
    )


def _refuse_empty(found: table.Table, alive_N: np.ndarray, tool) -> None:
    size = len(found.domains)
    before_D = np.bincount(found.domain_N[alive_N], minlength=size)
    after_D = np.bincount(found.domain_N[found.kept_N], minlength=size)
    gone = [
        f"{name} (of {before})"
        for name, before, after in zip(found.domains, before_D, after_D, strict=True)
        if before and not after
    ]
    if gone:
        raise DataError(
            f"data.filter: {spec.written(tool)!r} leaves no training document of {', '.join(gone)}; "
            "loosen it, or set its domains to those that it is meant for"
        )
