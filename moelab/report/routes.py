"""What the route traces of a run say, in rows and tables: load, balance, specialisation, pairs, flips. No jax.

M MoE layers, C columns of the routers' scores, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelab import diagnostics, metrics, placement, segregation, trace
from moelab.report import formatting as fmt
from moelab.report.tables import Cell, Table

NAME = "routes.npz"
PERMUTATIONS = 200


@dataclasses.dataclass(frozen=True)
class Routes:
    """The traces that lie in a run directory.

    Attributes:
      final: routes.npz.
      early: (step, trace) of each routes_<step>.npz of the same text, by step.
      precisions: (name, trace) of each routes_<name>.npz of the same text and step.
      notes: what could not be read or compared, one line each.
    """

    final: trace.Trace
    early: tuple[tuple[int, trace.Trace], ...] = ()
    precisions: tuple[tuple[str, trace.Trace], ...] = ()
    notes: tuple[str, ...] = ()


def load(directory: Path) -> tuple[Routes | None, tuple[str, ...]]:
    """Reads the traces of a run directory; None and why where there is none to show."""
    path = directory / NAME
    if not path.is_file():
        return None, ()
    try:
        final = trace.load(path)
    except trace.TraceError as error:
        return None, (f"No routes: {_named(error, path)}",)
    early, precisions, notes = [], [], []
    for other in sorted(directory.glob("routes_*.npz")):
        name = other.stem.removeprefix("routes_")
        try:
            found = trace.load(other)
            if not name.isdigit() and not _same_but_precision(found, final, name):
                continue  # of another split, say
            diagnostics.saturation(found, final)
        except trace.TraceError as error:
            notes.append(f"{other.name} is left out: {_named(error, other)}")
        else:
            (early if name.isdigit() else precisions).append((name, found))
    by_step = sorted(((int(name), found) for name, found in early), key=lambda pair: pair[0])
    return Routes(final, tuple(by_step), tuple(precisions), tuple(notes)), ()


def _same_but_precision(found: trace.Trace, final: trace.Trace, name: str) -> bool:
    a, b = ({key: h.get(key) for key in ("step", "split")} for h in (found.header, final.header))
    return a == b and found.header.get("precision") == name


def _named(error: Exception, path: Path) -> str:
    return " ".join(str(error).split()).replace(f"{path.parent}/", "")


def origin(found: trace.Trace) -> str:
    """Says in a few words where a trace comes from."""
    header, parts = found.header, []
    if isinstance(header.get("step"), int):
        parts.append(f"step {header['step']}")
    parts += [str(header[key]) for key in ("precision", "router") if header.get(key)]
    if header.get("split"):
        parts.append(f"{header['split']} split")
    documents = len(np.unique(found.document_T))
    parts.append(f"{fmt.count(len(found.token_id_T))} tokens of {fmt.count(documents)} documents")
    return ", ".join(parts)


def summary(found: trace.Trace, pairs: int = 3, permutations: int = PERMUTATIONS) -> list[dict]:
    """Describes each MoE layer of a trace.

    Returns:
      One dict per layer: layer; load (shares of the computing experts), max_violation, entropy, dead_experts;
      idle_share (assignments to experts without computation), unused_share (slots without expert); dropped_share and
      logit_norm where the header has them; mutual_information, its null_mean, null_q95 and p_value and that of the
      oracle router (nats; None where there are not two domains); quality_information of expert and quality bucket
      within domains, quality_null_q95 and quality_p_value (None without buckets); pairs, the columns that serve the
      same tokens most often beyond chance: (columns, share of tokens, ratio to independent choices).
    """
    load_ME = placement.expert_load(found)
    filled_M = (found.expert_MTK < found.num_columns).sum((1, 2))
    share_MCC = diagnostics.co_activation(found)
    ratio_MCC = diagnostics.independence_ratio(share_MCC)
    domains = _specialisation(found, permutations) + _quality(found, permutations)
    rows = []
    for m, layer in enumerate(found.layers):
        computed = load_ME[m].sum()
        row = {
            "layer": layer,
            "load": (load_ME[m] / max(computed, 1)).tolist(),
            "max_violation": float(metrics.max_violation(load_ME[m])),
            "entropy": float(metrics.normalized_entropy(load_ME[m])),
            "dead_experts": int(metrics.dead_experts(load_ME[m])),
            "idle_share": float((filled_M[m] - computed) / max(filled_M[m], 1)),
            "unused_share": float(1 - filled_M[m] / found.expert_MTK[m].size),
        }
        for key in ("dropped_share", "logit_norm"):
            row[key] = _at(found.header.get(key), m)
        row |= {key: None if values is None else float(values[m]) for key, values in domains}
        rows.append(row | {"pairs": _top_pairs(share_MCC[m], ratio_MCC[m], pairs)})
    return rows


def _at(values: Any, index: int) -> float | None:
    return fmt.number(values[index]) if isinstance(values, list) and index < len(values) else None


def _specialisation(found: trace.Trace, permutations: int) -> list[tuple[str, Any]]:
    keys = ("mutual_information", "null_mean", "null_q95", "p_value", "oracle")
    try:
        given = diagnostics.specialisation(found, permutations)
    except trace.TraceError:  # one domain, or documents across domains: nothing to say
        return [(key, None) for key in keys]
    values = (given.mi_M, given.null_mean_M, given.null_q95_M, given.p_value_M)
    return list(zip(keys, (*values, diagnostics.oracle_information(found)), strict=True))


def _quality(found: trace.Trace, permutations: int) -> list[tuple[str, Any]]:
    keys = ("quality_information", "quality_null_q95", "quality_p_value")
    given = segregation.specialisation(found, permutations)
    values = (given.mi_M, given.null_q95_M, given.p_value_M) if given else (None,) * 3
    return list(zip(keys, values, strict=True))


def quality(found: trace.Trace) -> list[dict[str, Any]]:
    """Says how much of each quality bucket every expert gets.

    Returns:
      One dict per bucket that occurs, [] where the text has none: bucket, documents, tokens, share (of the assignments
      to computing experts, per layer), ratio (per layer and expert: the bucket's share of the expert's assignments over
      its share of all; None for an expert without any).
    """
    given = segregation.bucket_of(found)
    if given is None:
        return []
    names, bucket_T = given
    load_MQE = segregation.load(found)[:, :, : found.num_experts].astype(np.float64)
    total_MQ, total_ME = load_MQE.sum(2), load_MQE.sum(1)
    rows = []
    for q, name in enumerate(names):
        here_T = bucket_T == q
        if not here_T.any():
            continue
        share_M = total_MQ[:, q] / np.maximum(total_MQ.sum(1), 1)
        expert_ME = load_MQE[:, q] / np.maximum(total_ME, 1)
        ratio_ME = expert_ME / np.where(share_M > 0, share_M, 1)[:, None]
        rows.append(
            {
                "bucket": name,
                "documents": len(np.unique(found.document_T[here_T])),
                "tokens": int(here_T.sum()),
                "share": share_M.tolist(),
                "ratio": [
                    [ratio if total else None for ratio, total in zip(r_E, t_E, strict=True)]
                    for r_E, t_E in zip(ratio_ME.tolist(), total_ME.tolist(), strict=True)
                ],
            }
        )
    return rows


def _top_pairs(share_CC: np.ndarray, ratio_CC: np.ndarray, count: int) -> list[dict[str, Any]]:
    first_P, second_P = np.triu_indices(len(share_CC), 1)
    share_P, ratio_P = share_CC[first_P, second_P], ratio_CC[first_P, second_P]
    # Of the excess over chance, so that neither a rare pair nor a pair of two busy experts leads.
    excess_P = np.where(share_P > 0, share_P - share_P / np.where(ratio_P > 0, ratio_P, 1), 0)
    best = np.argsort(-excess_P, kind="stable")[:count]
    return [
        {
            "columns": [int(first_P[i]), int(second_P[i])],
            "share": float(share_P[i]),
            "ratio": float(ratio_P[i]),
        }
        for i in best
        if share_P[i] > 0
    ]


_COLUMNS = (  # heading, key, digits after the point; None: a percentage
    ("MaxVio", "max_violation", 3),
    ("entropy", "entropy", 4),
    ("dead experts", "dead_experts", 0),
    ("idle", "idle_share", None),
    ("no expert", "unused_share", None),
    ("dropped", "dropped_share", None),
    ("logit norm", "logit_norm", 2),
    ("domain information [nats]", "mutual_information", 4),
    ("95 % of the null", "null_q95", 4),
    ("p", "p_value", 3),
    ("of the oracle's", "oracle_share", None),
    ("quality information in a domain [nats]", "quality_information", 4),
    ("95 % of its null", "quality_null_q95", 4),
    ("p of it", "quality_p_value", 3),
)
_ALWAYS = ("dead_experts", "dropped_share")  # 0 is news


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Lays the rows of `summary` out, one line per MoE layer; what does not apply to the router is left out."""
    rows = [row | {"oracle_share": _share(row)} for row in rows]
    shown = [c for c in _COLUMNS if c[1] in _ALWAYS or any(row[c[1]] for row in rows)]
    lines = []
    for row in rows:
        cells = [Cell(f"block {row['layer']}", row["layer"])]
        for _, key, digits in shown:
            value = row[key]
            text = fmt.percent(value, 2) if digits is None else fmt.fixed(value, digits)
            cells.append(Cell(text, fmt.number(value)))
        cells.append(Cell(pairs_text(row["pairs"]) or "none"))
        lines.append(tuple(cells))
    headings = ("layer", *(name for name, _, _ in shown), "pairs beyond chance")
    return Table(title, headings, tuple(lines))


def _share(row: Mapping[str, Any]) -> float | None:
    oracle = row["oracle"]
    return row["mutual_information"] / oracle if oracle else None


def pairs_text(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Writes pairs of columns as `3+7 ×1.8`: how often together, over independent choices."""
    return ", ".join("{}+{} ×{:.1f}".format(*pair["columns"], pair["ratio"]) for pair in pairs)


def differences(a: trace.Trace, b: trace.Trace) -> dict[str, Any]:
    """Compares two routings of the same tokens.

    Returns:
      rows (layer, flip_rate, overlap, saturation of a against b) and token_flip_rate, the share of tokens with another
      set of experts in any layer.

    Raises:
      TraceError: the traces are not of the same tokens, layers and columns.
    """
    flips, overlap_M = diagnostics.flip_rate(a, b), diagnostics.overlap(a, b)
    saturation_M = diagnostics.saturation(a, b)
    keys = ("layer", "flip_rate", "overlap", "saturation")
    arrays = (a.layers, flips.layer_M.tolist(), overlap_M.tolist(), saturation_M.tolist())
    rows = [dict(zip(keys, values, strict=True)) for values in zip(*arrays, strict=True)]
    return {"rows": rows, "token_flip_rate": flips.token}
