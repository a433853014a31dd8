"""The result table, for the terminal, Markdown, CSV and HTML from one set of rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import IO, Any

from moelab import metrics
from moelab.report import conventions, statistics
from moelab.report import formatting as fmt
from moelab.report.runs import REFERENCE, Run

_PLAIN = str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "x", "\N{INFINITY}": "inf"}
)
BASELINES = {"kneser_ney_bigram": "Kneser-Ney bigram"}  # names for readers


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown, and the value to sort by (None sorts last)."""

    text: str
    value: float | str | None = None
    bounds: str = ""  # of the value, behind the text; on a line of their own in HTML
    detail: str = ""  # a remark, shown in HTML only
    wide: bool = False  # a sentence: wrapped in HTML, left aligned

    @property
    def line(self) -> str:
        """The cell on one line."""
        return f"{self.text} {self.bounds}".strip()


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row, the others are right-aligned.

    Attributes:
      title: what the table shows, with its unit.
      columns: one heading per column.
      rows: one Cell per column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def result_rows(run: Run) -> list[dict[str, Any]]:
    """Lists the numbers of the result table, unrounded, one dict per precision.

    Returns:
      Dicts with precision, label, bits_per_byte.<domain>, loss, loss_delta and its bounds (nats per token against
      float32, paired bootstrap over documents), expert_bytes, router_agreement. None: not measured.
    """
    rows = []
    for row in run.rows:
        bounds = loss_interval(run, row["precision"])
        bits = row["bits_per_byte"]
        rows.append(
            {"precision": row["precision"], "label": row.get("label") or row["precision"]}
            | {f"bits_per_byte.{d}": fmt.number(bits.get(d)) for d in (*run.domains, "all")}
            | {
                "loss": fmt.number(row.get("loss")),
                "loss_delta": fmt.number(row.get("loss_delta")),
                "loss_delta_low": bounds.low if bounds else None,
                "loss_delta_high": bounds.high if bounds else None,
                "expert_bytes": fmt.number(row.get("expert_bytes")),
                "router_agreement": fmt.number(row.get("router_agreement")),
            }
        )
    return rows


def loss_interval(run: Run, precision: str) -> statistics.Interval | None:
    """Bootstraps a precision's loss against float32; None where the documents do not allow it."""
    table = run.documents
    if table is None or precision not in table.nats or REFERENCE not in table.nats:
        return None
    interval = statistics.loss_difference(table, REFERENCE, precision)
    return None if math.isnan(interval.low) else interval


def result_table(run: Run) -> Table:
    """Builds the one table of a run: quality, cost and router agreement of every precision."""
    rows = result_rows(run)
    reference = next((r["expert_bytes"] for r in rows if r["precision"] == REFERENCE), None)
    return Table(
        "Bits per byte by domain; loss against float32 in nats per token with its 95 % interval",
        (
            "precision",
            *run.domains,
            "all",
            "loss vs float32 [95 %]",
            "expert weights",
            "router agreement",
        ),
        tuple(_result_row(row, run.domains, reference) for row in rows),
    )


def _result_row(row: dict[str, Any], domains: Sequence[str], reference: Any) -> tuple[Cell, ...]:
    bits = [row[f"bits_per_byte.{domain}"] for domain in (*domains, "all")]
    delta = difference_cell(
        row["loss_delta"],
        row["loss_delta_low"],
        row["loss_delta_high"],
        row["precision"] == REFERENCE,
    )
    label = row["label"] if row["label"] != row["precision"] else ""
    ratio = ""
    if reference and row["expert_bytes"] and row["precision"] != REFERENCE:
        ratio = fmt.fixed(reference / row["expert_bytes"], 2, suffix="× smaller")
    return (
        Cell(row["precision"], row["precision"], detail=label),
        *(Cell(fmt.fixed(b, 4), b) for b in bits),
        delta,
        Cell(fmt.size(row["expert_bytes"]), row["expert_bytes"], detail=ratio),
        Cell(fmt.percent(row["router_agreement"], 2), row["router_agreement"]),
    )


def difference_cell(estimate: Any, low: Any, high: Any, is_reference: bool) -> Cell:
    """Makes the cell of a difference with its interval, or of the reference itself."""
    if is_reference:
        return Cell("reference", fmt.number(estimate))
    if fmt.number(estimate) is None:
        return Cell(fmt.NOT_MEASURED)
    return Cell(fmt.fixed(estimate, 4, sign=True), fmt.number(estimate), fmt.bounds(low, high))


def baseline_table(run: Run) -> Table | None:
    """Compares the float32 model with the card's baselines, bits per byte per domain."""
    baselines = run.card["evaluation"].get("baselines") or {}
    if not baselines or run.reference is None:
        return None
    model = run.reference["bits_per_byte"]
    rows = [("this model, float32", model, "")]
    for name, bits in baselines.items():
        wins = [_lower(model.get(d), bits.get(d)) for d in run.domains]
        beaten = f"beaten on {wins.count(True)} of {len(wins)} domains"
        rows.append((BASELINES.get(name, name.replace("_", " ")), bits, beaten))
    columns = (*run.domains, "all")
    return Table(
        "Bits per byte of the trained model and of baselines on the same documents",
        ("model", *columns),
        tuple(
            (
                Cell(name, name, detail=detail),
                *(Cell(fmt.fixed(bits.get(d), 4), fmt.number(bits.get(d))) for d in columns),
            )
            for name, bits, detail in rows
        ),
    )


def _lower(a: Any, b: Any) -> bool:
    a, b = fmt.number(a), fmt.number(b)
    return a is not None and b is not None and a < b


def router_table(run: Run) -> Table | None:
    """Shows the routers' health per MoE layer: last training step, and the evaluation set's MaxVio."""
    trained = [r for r in run.records("train") if r.get("router", {}).get("layers")]
    if not trained:
        return None
    router = trained[-1]["router"]
    over_set = (run.reference or {}).get("max_violation") or []
    names = (
        ("max_violation", "MaxVio", 3),
        ("entropy", "entropy", 4),
        ("dead_experts", "dead experts", 0),
        ("dropped_share", "dropped", None),
        ("logit_norm", "logit norm", 2),
    )
    rows = []
    for i, layer in enumerate(router["layers"]):
        cells = [Cell(f"block {layer}", layer)]
        for key, _, digits in names:
            value = _at(router.get(key), i)
            text = fmt.percent(value, 2) if digits is None else fmt.fixed(value, digits)
            cells.append(Cell(text, fmt.number(value)))
        value = _at(over_set, i)
        cells.append(Cell(fmt.fixed(value, 3), fmt.number(value)))
        rows.append(tuple(cells))
    return Table(
        f"Router health per MoE layer at training step {trained[-1]['step']}, and over the evaluation set",
        ("layer", *(title for _, title, _ in names), "MaxVio, evaluation"),
        tuple(rows),
    )


def coefficient_table(run: Run) -> Table | None:
    """Lists what the run's balancing coefficient is called in other systems; None where that loss is off."""
    layers = run.card["evaluation"].get("layers") or []
    rows = conventions.of_config(run.card["config"], len(layers))
    if rows is None:
        return None
    coefficient = run.card["config"]["balance"]["switch_loss"]["coefficient"]
    return Table(
        f"balance.switch_loss.coefficient = a = {coefficient:g} in other systems' conventions",
        ("system", "setting", "value", "formula", "loss at balance", "what else differs"),
        tuple(
            (
                Cell(row.system, row.system),
                Cell(row.setting, row.setting),
                Cell(
                    "depends on the batch" if row.value is None else f"{row.value:.4g}", row.value
                ),
                Cell(row.formula),
                Cell(f"{row.at_balance:g}", row.at_balance),
                Cell(row.caveat, wide=True),
            )
            for row in rows
        ),
    )


def _at(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, list) and index < len(values) else None


def to_markdown(table: Table) -> str:
    """Writes a GitHub table; pipes and line breaks in cells are escaped."""
    lines = [
        _markdown_line(table.columns),
        _markdown_line(["---"] + ["---:"] * (len(table.columns) - 1)),
    ]
    lines += [_markdown_line([cell.line for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = (c.replace("\\", "\\\\").replace("|", "\\|") for c in map(markdown_text, cells))
    return "| " + " | ".join(escaped) + " |"


def markdown_text(value: Any) -> str:
    """Makes text safe within a line of Markdown: it stays on that line, and no tag begins in it.

    >>> markdown_text("more than <b>\\n\\na")
    'more than &lt;b> a'
    """
    return " ".join(str(value).split()).replace("<", "&lt;")


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Writes unrounded rows (`result_rows`) as CSV; an empty cell is not measured, a non-finite number has its name."""
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(metrics.plain(row) for row in rows)
    return out.getvalue()


def print_table(table: Table, file: IO[str] | None = None, width: int | None = None) -> None:
    """Prints a table to a terminal, in blocks of columns where it is too narrow for all of them.

    Args:
      table: what to print.
      file: stdout where None.
      width: columns of the terminal; None asks it (and takes 200 where there is none).
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(file=file, width=width, highlight=False, markup=False, emoji=False)
    if width is None and not console.is_terminal:
        console = Console(file=file, width=200, highlight=False, markup=False, emoji=False)
    table = _encodable(table, console.encoding)
    console.print(table.title)
    for block in _blocks(table, console.width):
        rich = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for i, column in enumerate(block):
            rich.add_column(table.columns[column], justify="right" if i else "left", no_wrap=not i)
        for row in table.rows:
            rich.add_row(*(row[column].line for column in block))
        console.print(rich)
        console.print()


def _encodable(table: Table, encoding: str) -> Table:
    """Writes what an encoding has not as what is nearest, else as question marks: no table ends in its middle."""

    def written(text: str) -> str:
        try:
            text.encode(encoding)
            return text
        except UnicodeEncodeError:
            return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)

    def cell(of: Cell) -> Cell:
        return dataclasses.replace(of, text=written(of.text), bounds=written(of.bounds))

    rows = tuple(tuple(map(cell, row)) for row in table.rows)
    return Table(written(table.title), tuple(map(written, table.columns)), rows)


def _blocks(table: Table, width: int) -> list[list[int]]:
    need = [
        max(len(text) for text in (heading, *(row[i].line for row in table.rows))) + 2
        for i, heading in enumerate(table.columns)
    ]
    blocks, used = [[0]], need[0]
    for i in range(1, len(need)):
        if used + need[i] > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = need[0]
        blocks[-1].append(i)
        used += need[i]
    return blocks
