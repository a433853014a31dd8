"""A comparison of arms as a page, as Markdown, as CSV and as a table for a paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moelab.report import (
    arms_measures,
    arms_plots,
    arms_rows,
    arms_tables,
    canvas,
    citations,
    compare,
    crossing,
    facts,
    latex,
    page,
    tables,
)
from moelab.report import fitted as fitted_arms
from moelab.report import html as run_page
from moelab.report.arms import Comparison
from moelab.report.fitted import Fitted
from moelab.report.runs import Run
from moelab.report.tables import Table


def render(
    comparison: Comparison,
    suffix: str,
    notes: Sequence[str],
    name: str,
    fitted: Fitted | None = None,
) -> str:
    """Writes the comparison in the form that a suffix names.

    Args:
      comparison: from `arms.compare`.
      suffix: .html, .md, .csv or .tex.
      notes: what the reader must know, as that a sweep is not finished.
      name: of the report, for the label of a LaTeX table.
      fitted: a curve through the arms, to be told and drawn.
    """
    if suffix == ".csv":
        return tables.to_csv(arms_rows.rows(comparison))
    if suffix == ".tex":
        told = [*notes, *_told(comparison, fitted), arms_tables.limits(comparison)]
        return latex.table(_for_paper(comparison), told, name)
    if suffix == ".md":
        return _markdown(comparison, notes, fitted)
    return _html(comparison, notes, fitted)


def _told(comparison: Comparison, fitted: Fitted | None) -> list[str]:
    told = [arms_tables.PAIRED, *arms_tables.notes(comparison), *crossing.notes(comparison)]
    return told + ([fitted.sentence] if fitted else [])


def _for_paper(comparison: Comparison) -> Table:
    """The main table without what a paper's column has no room for."""
    table = arms_tables.main_table(comparison)
    left_out = {"detectable", "training"}
    keep = [i for i, head in enumerate(table.columns) if head not in left_out]
    return dataclasses.replace(
        table,
        columns=tuple(table.columns[i] for i in keep),
        rows=tuple(tuple(row[i] for i in keep) for row in table.rows),
    )


def warnings(comparison: Comparison) -> list[str]:
    """Lists what facts.warnings says of the arms' runs: once per arm, with how many of its runs it is true of."""
    found = []
    for arm in comparison.arms:
        told = [note for run in arm.runs.values() for note in facts.warnings(run)]
        for note in dict.fromkeys(told):
            count, of = told.count(note), len(arm.runs)
            found.append(f"{arm.name}{'' if count == of else f' ({count} of {of} runs)'}: {note}")
    return _merged(found)


def _merged(notes: list[str]) -> list[str]:
    """Says what is true of many arms in one line."""
    arms_of: dict[str, list[str]] = {}
    for note in notes:
        arm, _, text = note.partition(": ")
        arms_of.setdefault(text, []).append(arm)
    return [
        f"{', '.join(names) if len(names) <= 3 else f'{len(names)} arms'}: {text}"
        for text, names in arms_of.items()
    ]


def _markdown(comparison: Comparison, notes: Sequence[str], fitted: Fitted | None) -> str:
    text = tables.markdown_text
    parts = [f"# {len(comparison.arms)} arms\n"]
    parts += [f"> **Note.** {text(note)}\n" for note in (*notes, *warnings(comparison))]
    main, points = arms_tables.main_table(comparison), arms_tables.points_table(comparison)
    parts += [f"{text(main.title)}.\n", tables.to_markdown(main)]
    parts += ["\n".join(f"- {text(note)}" for note in _told(comparison, fitted)) + "\n"]
    parts += [text(arms_tables.limits(comparison)) + "\n"]
    for table in arms_measures.all_tables(comparison):
        parts += [f"{text(table.title)}.\n", tables.to_markdown(table)]
    parts += ["## Every point\n", f"{text(points.title)}.\n", tables.to_markdown(points)]
    differing = compare.config_table(_named(comparison))
    if differing is not None:
        parts += ["## Config fields that differ\n", tables.to_markdown(differing)]
    return "\n".join(parts)


def _named(comparison: Comparison) -> list[Run]:
    """The arms' first runs, under the arms' names; the seed is no difference of arms."""
    found = []
    for arm in comparison.arms:
        config = {key: v for key, v in arm.first.card["config"].items() if key != "seed"}
        card = arm.first.card | {"name": arm.name, "config": config}
        found.append(dataclasses.replace(arm.first, card=card))
    return found


def _html(comparison: Comparison, notes: Sequence[str], fitted: Fitted | None) -> str:
    reference, runs = comparison.reference.name, sum(len(a.runs) for a in comparison.arms)
    meta = [f"{runs} runs", f"reference {reference}", f"evaluated in {comparison.precision}"]
    body = [page.header(f"{len(comparison.arms)} arms", "moelab report", meta)]
    body += map(page.notice, (*notes, *warnings(comparison)))
    if not canvas.available():
        body.append(page.notice(run_page.NO_PLOTS))
    body.append(
        page.section(
            "Arms over paired seeds",
            page.table(arms_tables.main_table(comparison)),
            *map(page.paragraph, _told(comparison, fitted)),
            page.paragraph(arms_tables.limits(comparison)),
        )
    )
    drawn = arms_plots.figures(comparison) if canvas.available() else []
    if fitted is not None and canvas.available():
        drawn.insert(1, fitted_arms.figure(fitted))
    if drawn:
        body.append(page.section("Plots", page.figures(drawn)))
    measured = arms_measures.all_tables(comparison)
    if measured:
        body.append(page.section("Domains and tasks", *map(page.table, measured)))
    body.append(page.section("Every point", page.table(arms_tables.points_table(comparison))))
    differing = compare.config_table(_named(comparison))
    if differing is not None:
        body.append(page.section("Configs", page.table(differing)))
    papers = citations.bibtex(arm.first.card["config"] for arm in comparison.arms)
    if papers:
        body.append(page.section("Cite the methods", page.details("BibTeX", page.code(papers))))
    return page.document(f"{len(comparison.arms)} arms - moelab", body)
