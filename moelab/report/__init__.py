"""Reports of finished runs: result cards, tables, plots, pages, and their re-check.

render_run(run_directory)              RESULT.md and report.html beside the run
write([run, other], Path("out.html"))  a report, or a comparison, as .html, .md or .csv
print_result(run_directory)            the result table on the terminal
print_coefficients(run_directory)      the balancing coefficient in other systems' conventions
verify.verify(run_directory)           the problems of a run's card, none when it holds
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from moelab.report.runs import ReportError, Run, load

__all__ = [
    "ReportError",
    "Run",
    "load",
    "print_coefficients",
    "print_result",
    "render_run",
    "write",
]

_log = logging.getLogger("moelab")


def write(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Writes a report of one run, or a comparison of several, without rerunning anything.

    Args:
      runs: run directories, or result cards that stand alone.
      out: ends in .html, .md or .csv.

    Returns:
      The path written.

    Raises:
      ReportError: no runs, an unreadable run, runs that do not compare, or another suffix.
    """
    out = Path(out)
    if out.suffix not in (".html", ".md", ".csv"):
        raise ReportError(f"a report ends in .html, .md or .csv; got {str(out)!r}")
    if not runs:
        raise ReportError("a report wants at least one run")
    loaded = [load(run) for run in runs]
    text = _render_one(loaded[0], out.suffix) if len(loaded) == 1 else _render(loaded, out.suffix)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out)
    return out


def render_run(run_directory: Path | str) -> tuple[Path, Path]:
    """Writes RESULT.md and report.html into the run directory and returns their paths."""
    directory = Path(run_directory)
    return (
        write([directory], directory / "RESULT.md"),
        write([directory], directory / "report.html"),
    )


def print_result(
    run_directory: Path | str, file: IO[str] | None = None, width: int | None = None
) -> None:
    """Prints the result table and the comparison with the baselines to a terminal or a file."""
    from moelab.report import facts, tables

    run = load(run_directory)
    for warning in facts.warnings(run):
        print(f"Note: {warning}", file=file)
    for table in (tables.result_table(run), tables.baseline_table(run)):
        if table is not None:
            tables.print_table(table, file=file, width=width)


def print_coefficients(run_directory: Path | str, file: IO[str] | None = None) -> None:
    """Prints what the run's balancing coefficient is called elsewhere; nothing where that loss is off."""
    from moelab.report import tables

    table = tables.coefficient_table(load(run_directory))
    if table is None:
        return
    table = dataclasses.replace(
        table, columns=table.columns[:-1], rows=tuple(row[:-1] for row in table.rows)
    )
    tables.print_table(table, file=file)


def _render_one(run: Run, suffix: str) -> str:
    from moelab.report import html, result_md, tables

    if suffix == ".csv":
        return tables.to_csv(tables.result_rows(run))
    if suffix == ".md":
        return result_md.render(run)
    _warn_without_plots()
    return html.render(run)


def _render(runs: list[Run], suffix: str) -> str:
    from moelab.report import compare, tables

    if suffix == ".csv":
        return tables.to_csv(compare.compare_rows(runs))
    if suffix == ".md":
        return compare.render_markdown(runs)
    _warn_without_plots()
    return compare.render_html(runs)


def _warn_without_plots() -> None:
    from moelab.report import canvas, html

    if not canvas.available():
        _log.warning(html.NO_PLOTS)
