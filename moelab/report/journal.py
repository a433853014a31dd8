"""The journal of a run as reports read it: records whose values are of the kinds that curves are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moelab import metrics
from moelab.report import outline

_BY_LAYER = (
    "assigned max_violation entropy dead_experts dropped_share logit_norm log_sum_exp".split()
)

PLACES = {
    "kind": "text!",
    "step": "whole!",
    "split": "text?",
    "precision": "text?",
    "event": "text?",
    "loss": "number?",
    "skipped": "flag?",
    "bits_per_byte": "object?",
    "bits_per_byte.*": "number?",
    "router": "object",
    "router.layers": "numbers",
    **{f"router.{key}": "numbers" for key in _BY_LAYER},
    "router.load": "list",
    "router.load.*": "numbers",
}


def read(path: Path) -> list[dict[str, Any]]:
    """Reads a journal and checks what curves need of it.

    Raises:
      FileNotFoundError: there is no such file.
      metrics.MetricsError: a damaged line, a value of another kind, or layers and experts that change on the way.
    """
    records = metrics.read(path)
    for line, record in enumerate(records, start=1):
        problems = outline.problems(record, PLACES)
        if problems:
            raise metrics.MetricsError(f"{path}, line {line}: {problems[0]}")
    _check_shapes(records, path)
    return records


def _check_shapes(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Refuses routers of other layers or experts than the first that said something."""
    layers, experts = None, None
    for line, record in enumerate(records, start=1):
        router = record.get("router") or {}
        known = [key for key in (*_BY_LAYER, "load") if router.get(key)]
        if not known:
            continue
        sizes = {key: len(router.get(key) or ()) for key in ("layers", *known)}
        layers = layers or sizes["layers"]
        for key, size in sizes.items():
            if size != layers:
                raise metrics.MetricsError(
                    f"{path}, line {line}: router.{key} wants {layers} layers, not {size}"
                )
        for load in router.get("load") or ():
            experts = experts or len(load)
            if len(load) != experts:
                raise metrics.MetricsError(
                    f"{path}, line {line}: router.load wants {experts} experts, not {len(load)}"
                )
