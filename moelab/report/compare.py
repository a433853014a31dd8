"""Several runs side by side: one table, overlaid curves, and what differs between their configs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moelab.report import arms, canvas, facts, page, plots, statistics, tables
from moelab.report import formatting as fmt
from moelab.report import html as run_page
from moelab.report.runs import REFERENCE, Run, check_comparable
from moelab.report.tables import Cell, Table

TITLE = (
    "Bits per byte in float32; the difference from the first run with its 95 % interval over "
    "documents"
)
SEEDS = (
    "Intervals resample documents: they do not cover the spread between training seeds. Compare arms "
    "over several paired seeds before calling one better."
)

FLAGS = {"leak": "not causal", "bound": "bound, not ranked"}  # keys of a card, and what they say


def names(runs: Sequence[Run]) -> list[str]:
    """Names runs by their card, and by their folder where names collide."""
    given = [str(run.card["name"]) for run in runs]
    folders = [run.directory.name for run in runs]
    chosen = given if len(set(given)) == len(given) else folders
    if len(set(chosen)) < len(chosen):
        chosen = [f"{name} ({i})" for i, name in enumerate(chosen, start=1)]
    return chosen


def compare_rows(runs: Sequence[Run], *, different_tokens: bool = False) -> list[dict[str, Any]]:
    """Lists the unrounded numbers of the comparison, one dict per run.

    Returns:
      Dicts with run, seed, leak (why it is not causal, or empty), bound (why it is not ranked, or empty), total and
      active parameters, tokens, float32 bits per byte per domain, and the paired difference from the first run with
      its bounds. None: not measured.

    Raises:
      ReportError: the runs cannot be compared.
    """
    check_comparable(runs, different_tokens=different_tokens)
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        card, bits = run.card, (run.reference or {}).get("bits_per_byte") or {}
        difference = _difference(runs[0], run)
        rows.append(
            {"run": name, "seed": card["seeds"].get("seed")}
            | {key: card.get(key) or "" for key in FLAGS}
            | {"config_sha256": card["config_sha256"]}
            | {f"parameters.{k}": card["parameters"].get(k) for k in ("total", "active")}
            | {"tokens": card["training"].get("tokens")}
            | {f"bits_per_byte.{d}": fmt.number(bits.get(d)) for d in (*runs[0].domains, "all")}
            | dict(
                zip(("difference", "difference_low", "difference_high"), difference, strict=True)
            )
        )
    return rows


def _difference(first: Run, run: Run) -> tuple[float | None, ...]:
    documents = first.documents, run.documents
    if any(table is None or REFERENCE not in table.nats for table in documents):
        return None, None, None
    interval = statistics.bits_per_byte_between(*documents, REFERENCE)
    return tuple(None if math.isnan(value) else value for value in interval)


def compare_table(runs: Sequence[Run], *, different_tokens: bool = False) -> Table:
    """Builds the comparison for reading."""
    rows, domains = compare_rows(runs, different_tokens=different_tokens), runs[0].domains
    body = []
    for i, row in enumerate(rows):
        bounds = [row[k] for k in ("difference", "difference_low", "difference_high")]
        bits = [row[f"bits_per_byte.{d}"] for d in (*domains, "all")]
        total, active = row["parameters.total"], row["parameters.active"]
        body.append(
            (
                Cell(
                    row["run"] + "".join(f" ({says})" for key, says in FLAGS.items() if row[key]),
                    row["run"],
                    detail=f"config {row['config_sha256'][:12]}",
                ),
                Cell(str(row["seed"]), fmt.number(row["seed"])),
                Cell(fmt.compact(total), fmt.number(total), detail=f"{fmt.compact(active)} active"),
                Cell(fmt.compact(row["tokens"]), fmt.number(row["tokens"])),
                *(Cell(fmt.fixed(b, 4), b) for b in bits),
                tables.difference_cell(*bounds, i == 0),
            )
        )
    heads = ("run", "seed", "parameters", "tokens", *domains, "all", "difference [95 %]")
    return Table(TITLE, heads, tuple(body))


def config_table(runs: Sequence[Run]) -> Table | None:
    """Lists the config fields that differ between the runs; None where none does."""
    flat = [arms.flatten(run.card["config"]) for run in runs]
    fields = sorted({key for config in flat for key in config})
    rows = []
    for field in fields:
        values = [config.get(field, "absent") for config in flat]
        if any(value != values[0] for value in values):
            rows.append((Cell(field, field), *(Cell(str(v), str(v)) for v in values)))
    if not rows:
        return None
    return Table("Config fields that differ", ("field", *names(runs)), tuple(rows))


def render_markdown(runs: Sequence[Run], *, different_tokens: bool = False) -> str:
    """Writes the comparison as Markdown."""
    parts = [
        f"# {len(runs)} runs\n",
        f"{TITLE}. {SEEDS}\n",
        tables.to_markdown(compare_table(runs, different_tokens=different_tokens)),
    ]
    named = [(tables.markdown_text(name), run) for name, run in zip(names(runs), runs, strict=True)]
    for name, run in named:
        parts += [f"- **{name}**: {tables.markdown_text(note)}" for note in facts.warnings(run)]
    differing = config_table(runs)
    if differing is not None:
        parts += ["## Config fields that differ\n", tables.to_markdown(differing)]
    for name, run in named:
        parts += [f"## {name}\n", tables.to_markdown(tables.result_table(run))]
    return "\n".join(parts)


def render_html(runs: Sequence[Run], *, different_tokens: bool = False) -> str:
    """Writes the comparison as one self-contained page."""
    labels = names(runs)
    body = [page.header("Comparison of runs", "moelab report", labels)]
    for name, run in zip(labels, runs, strict=True):
        body += [page.notice(f"{name}: {note}") for note in facts.warnings(run)]
    if not canvas.available():
        body.append(page.notice(run_page.NO_PLOTS))
    table = compare_table(runs, different_tokens=different_tokens)
    body.append(page.section("Runs", page.paragraph(SEEDS), page.table(table)))
    if canvas.available():
        pairs = list(zip(labels, runs, strict=True))
        overlaid = plots.loss_curves(pairs), plots.violation_curves(pairs)
        drawn = [figure for figure in overlaid if figure is not None]
        body += [page.section("Curves", page.figures(drawn))] if drawn else []
    differing = config_table(runs)
    if differing is not None:
        body.append(page.section("Configs", page.table(differing)))
    for name, run in zip(labels, runs, strict=True):
        body.append(page.section(f"{name} by precision", page.table(tables.result_table(run))))
    return page.document("Comparison of runs - moelab", body)
