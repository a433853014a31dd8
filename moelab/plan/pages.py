"""The planner's pages: one self-contained HTML file each."""

from __future__ import annotations

from collections.abc import Sequence

from moelab.plan import plots
from moelab.plan.claim import Claim, Setting
from moelab.plan.search import Found
from moelab.report import canvas, page
from moelab.report.tables import Cell, Table

NO_PLOTS = "No plots: matplotlib is not installed (pip install 'moelab[report]')."


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cell = lambda x: Cell(str(x), x if isinstance(x, int | float) else None, wide=_wide(x))  # noqa: E731
    return page.table(Table(title, tuple(columns), tuple(tuple(map(cell, row)) for row in rows)))


def _wide(value: object) -> bool:
    return isinstance(value, str) and len(value) > 40


def _figures(drawn: Sequence) -> list[str]:
    if not canvas.available():
        return [page.notice(NO_PLOTS)]
    made = [figure() for figure in drawn]
    return [page.figures([f for f in made if f is not None])]


def serving(
    results: Sequence[Found],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: Sequence[str],
) -> str:
    """Writes the page of a plan: table, plot, and what the numbers stand on."""
    first = results[0]
    meta = [f"{first.load.isl} in, {first.load.osl} out", *map(plots.name_of, results)]
    body = [
        page.header(f"Serving {first.model.name}", "moelab plan", meta),
        page.section("The front", _table("Best layouts and batches", columns, rows)),
        page.section("Plot", *_figures([lambda: plots.pareto(results)])),
        page.section("What it stands on", *map(page.paragraph, notes)),
    ]
    return page.document(f"{first.model.name} - moelab plan", body)


def claims(shared: Setting, found: Sequence[Claim], joint: Sequence[dict], notes) -> str:
    """Writes the report of the claims."""
    verdicts = [(c.claim, c.verdict, c.because) for c in found]
    body = [
        page.header("FP4, NVLink, new GPUs: the claims", "moelab plan claims", [str(shared.point)]),
        page.section("Verdicts", _table("Every claim", ("claim", "verdict", "because"), verdicts)),
        page.section(
            "Quality and cost at one point",
            _table(
                "moelab's own quality gap beside the modelled gain",
                (
                    "format",
                    "bits per byte lost",
                    "interval",
                    "tokens/s/GPU",
                    "over FP8",
                    "$/M tokens",
                ),
                [joint_row(row) for row in joint],
            ),
            *(_figures([lambda: plots.joint(joint)]) if joint else ()),
        ),
        *(_claim(c) for c in found),
        page.section("What it stands on", *map(page.paragraph, notes)),
    ]
    return page.document("The claims - moelab plan", body)


def joint_row(row: dict) -> tuple:
    """Lays one format of `joint.rows` out."""
    costs = ", ".join(f"{basis} {cost:.2f}" for basis, cost in row["dollars_per_million"].items())
    return (
        row["label"],
        f"{row['bits_per_byte']:+.4f}",
        f"[{row['low']:+.4f}, {row['high']:+.4f}]",
        f"{row['tokens_per_s_gpu']:.0f}",
        f"{row['gain_over_fp8']:.2f}x",
        costs,
    )


def _claim(claim: Claim) -> str:
    parts = [
        page.paragraph(f"Test: {claim.test}."),
        page.notice(f"{claim.verdict}: {claim.because}"),
    ]
    if claim.evidence:
        parts.append(_table("Evidence", ("what", "source"), claim.evidence))
    if claim.bars:
        parts += _figures([lambda: plots.bars(claim)])
    return page.section(claim.claim, *parts)
