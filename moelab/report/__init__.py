"""Reports of finished runs: result cards, tables, plots, pages, and their re-check.

render_run(run_directory)              RESULT.md and report.html beside the run
write([run, other], Path("out.html"))  a report, or a comparison, as .html, .md, .csv or .tex
bibtex([run, other])                   the papers of the methods that were used
print_result(run_directory)            the result table on the terminal
print_coefficients(run_directory)      the balancing coefficient in other systems' conventions
verify.verify(run_directory)           the problems of a run's card, none when it holds
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from moelab import atomic
from moelab.report.runs import REFERENCE, ReportError, Run, load, load_all

__all__ = [
    "ReportError",
    "Run",
    "bibtex",
    "load",
    "load_all",
    "print_coefficients",
    "print_result",
    "render_run",
    "write",
]

SUFFIXES = (".html", ".md", ".csv", ".tex")

_log = logging.getLogger("moelab")


def write(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    reference: str = "",
    precision: str = "float32",
    different_tokens: bool = False,
    fit: str = "",
) -> Path:
    """Writes a report of one run, or a comparison of several, without rerunning anything.

    Runs that differ in their seed alone are an arm. Two arms of which one has several seeds, and any sweep directory,
    are compared as arms over paired seeds; other runs one by one.

    Args:
      runs: run directories, sweep directories, or result cards that stand alone.
      out: ends in .html, .md, .csv or .tex.
      reference: the arm that the others are compared with; empty: the first.
      precision: of the evaluation that arms are compared in; arms.VALIDATION: the last look at the validation split.
      different_tokens: compare runs of different numbers of training tokens.
      fit: a curve through the arms: isoflop or granularity.

    Returns:
      The path written.

    Raises:
      ReportError: no runs, an unreadable run, runs that do not compare, or another suffix.
    """
    out = Path(out)
    check_out(out)
    if fit and out.suffix == ".csv":
        raise ReportError("--fit is told and drawn; a .csv has room for neither")
    atomic.check_target(out, make_folders=True)
    loaded, notes = load_all(runs)
    compared = compared_arms(loaded, reference, precision, different_tokens)
    if compared is None:
        fit_of(compared, fit)
    if compared is not None:
        from moelab.report import arms_page

        _warn_without_plots(out.suffix)
        text = arms_page.render(compared, out.suffix, notes, out.stem, fit_of(compared, fit))
    elif len(loaded) == 1:
        text = _render_one(loaded[0], out.suffix)
    else:
        text = _render(loaded, out.suffix, different_tokens)
    return atomic.write_text(out, text)


def check_out(out: Path | str) -> None:
    """Refuses a report of another kind.

    Raises:
      ReportError: it does not end in one of SUFFIXES.
    """
    if Path(out).suffix not in SUFFIXES:
        raise ReportError(f"a report ends in {', '.join(SUFFIXES)}; got {str(out)!r}")


def fit_of(compared, kind: str):
    """Fits a curve through compared arms; None where none is asked for.

    Raises:
      ReportError: there are no arms, or the fit cannot be asked of them.
    """
    if not kind:
        return None
    if compared is None:
        raise ReportError("--fit is for several arms of which one has several seeds")
    from moelab.report import fitted as fitted_arms

    return fitted_arms.fit(compared, kind)


def compared_arms(
    runs: Sequence[Run],
    reference: str = "",
    precision: str = "float32",
    different_tokens: bool = False,
):
    """Compares runs as arms over paired seeds; None where they are to be reported one by one."""
    from moelab.report import arms
    from moelab.report.arms import VALIDATION

    if not (arms.several(runs) or (len(runs) > 1 and any(run.label for run in runs))):
        given = {"--reference": reference, "--precision": precision != REFERENCE}
        if precision == VALIDATION:
            given = {"--reference": reference, "--split=validation": True}
        for name, value in given.items():
            if value:
                raise ReportError(f"{name} is for several arms of which one has several seeds")
        return None
    grouped = arms.group(runs)
    return arms.compare(grouped, reference, precision, different_tokens=different_tokens)


def bibtex(runs: Sequence[Path | str]) -> str:
    """Writes BibTeX of the methods that runs used (citations.py)."""
    from moelab.report import citations

    loaded, _ = load_all(runs)
    return citations.bibtex(run.card["config"] for run in loaded)


def render_run(run_directory: Path | str) -> tuple[Path, Path]:
    """Writes RESULT.md and report.html into the run directory and returns their paths."""
    directory = Path(run_directory)
    return (
        write([directory], directory / "RESULT.md"),
        write([directory], directory / "report.html"),
    )


def print_result(
    run_directory: Path | str | Run, file: IO[str] | None = None, width: int | None = None
) -> None:
    """Prints the result table and the comparison with the baselines to a terminal or a file."""
    from moelab.report import facts, tables

    run = run_directory if isinstance(run_directory, Run) else load(run_directory)
    for warning in facts.warnings(run):
        print(f"Note: {warning}", file=file)
    for table in (tables.result_table(run), tables.baseline_table(run)):
        if table is not None:
            tables.print_table(table, file=file, width=width)


def print_coefficients(run_directory: Path | str | Run, file: IO[str] | None = None) -> None:
    """Prints what the run's balancing coefficient is called elsewhere; nothing where that loss is off."""
    from moelab.report import tables

    run = run_directory if isinstance(run_directory, Run) else load(run_directory)
    table = tables.coefficient_table(run)
    if table is None:
        return
    table = dataclasses.replace(
        table, columns=table.columns[:-1], rows=tuple(row[:-1] for row in table.rows)
    )
    tables.print_table(table, file=file)


def _render_one(run: Run, suffix: str) -> str:
    from moelab.report import facts, html, latex, result_md, tables

    if suffix == ".csv":
        return tables.to_csv(tables.result_rows(run))
    if suffix == ".md":
        return result_md.render(run)
    if suffix == ".tex":
        name = str(run.card["name"])
        return latex.table(tables.result_table(run), [facts.result_note(run)], name)
    _warn_without_plots(suffix)
    return html.render(run)


def _render(runs: list[Run], suffix: str, different_tokens: bool) -> str:
    from moelab.report import compare, latex, tables

    if suffix == ".csv":
        return tables.to_csv(compare.compare_rows(runs, different_tokens=different_tokens))
    if suffix == ".md":
        return compare.render_markdown(runs, different_tokens=different_tokens)
    if suffix == ".tex":
        table = compare.compare_table(runs, different_tokens=different_tokens)
        return latex.table(table, [compare.SEEDS], "runs")
    _warn_without_plots(suffix)
    return compare.render_html(runs, different_tokens=different_tokens)


def _warn_without_plots(suffix: str) -> None:
    from moelab.report import canvas, html

    if suffix == ".html" and not canvas.available():
        _log.warning(html.NO_PLOTS)
