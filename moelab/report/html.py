"""report.html: one run on one self-contained page."""

from __future__ import annotations

import json

from moelab.report import canvas, facts, page, plots, route_plots, routes, tables, task_table
from moelab.report.runs import Run

NO_PLOTS = (
    "This report has no plots: matplotlib is not installed. Install the extra `report` "
    "(pip install 'moelab[report]') and run `moelab report` again."
)


def render(run: Run) -> str:
    """Writes the page of one run: the table first, then the plots, then what they stand on."""
    card = run.card
    body = [
        page.header(str(card["name"]), "moelab run", _meta(run)),
        *map(page.notice, facts.warnings(run)),
        *([] if canvas.available() else [page.notice(NO_PLOTS)]),
        page.tiles(facts.key_figures(run)),
        page.section(
            "Quality and cost by precision",
            page.paragraph(facts.result_note(run)),
            page.table(tables.result_table(run)),
        ),
        *_baselines(run),
        *_tasks(run),
        *_plots(run),
        *_routers(run),
        *_routes(run),
        *_coefficients(run),
        _facts(run),
        _repeat(run),
        _footer(run),
    ]
    return page.document(f"{card['name']} - moelab", body)


def _meta(run: Run) -> list[str]:
    card = run.card
    git = card["environment"].get("git") or {}
    commit = str(git.get("commit") or "unknown")[:10] + ("+" if git.get("dirty") else "")
    return [
        str(card["created"]),
        f"config {card['config_sha256'][:12]}",
        f"commit {commit}",
        f"card {card['card_sha256'][:12]}",
    ]


def _baselines(run: Run) -> list[str]:
    table = tables.baseline_table(run)
    return [] if table is None else [page.section("Against baselines", page.table(table))]


def _tasks(run: Run) -> list[str]:
    table = task_table.of_run(run)
    if table is None:
        return []
    notes = task_table.notes(run.card["evaluation"]["tasks"])
    return [page.section("Beyond the loss", *map(page.notice, notes), page.table(table))]


def _plots(run: Run) -> list[str]:
    drawn = plots.figures(run) if canvas.available() else []
    return [page.section("Plots", page.figures(drawn))] if drawn else []


def _routers(run: Run) -> list[str]:
    table = tables.router_table(run)
    if table is None:
        return []
    note = page.paragraph(
        "MaxVio: busiest expert's load over the mean, minus 1. Entropy: of the load, normalised to "
        "1 when balanced. Dropped: share of assignments that a capacity removed."
    )
    return [page.section("Routers", note, page.table(table))]


def _routes(run: Run) -> list[str]:
    """What the run's route traces show, where `moelab routes record` has left some."""
    found, problems = routes.load(run.directory)
    if found is None:
        return [page.section("Routes", *map(page.notice, problems))] if problems else []
    rows = routes.summary(found.final, pairs=2)
    drawn = route_plots.figures(found, rows) if canvas.available() else []
    return [
        page.section(
            "Routes",
            page.paragraph(
                f"Every token's experts, recorded in {routes.NAME}. Domain information: of the expert on the "
                "text's domain, against the same text with its documents' domains dealt at random. Pairs: "
                "experts that serve the same token so many times as often as if chosen independently."
            ),
            *map(page.notice, found.notes),
            page.table(routes.table(rows, f"Routes per MoE layer: {routes.origin(found.final)}")),
            *([page.figures(drawn)] if drawn else []),
        )
    ]


def _coefficients(run: Run) -> list[str]:
    table = tables.coefficient_table(run)
    if table is None:
        return []
    note = page.paragraph(
        "The number to write elsewhere for the same balancing loss. Formulas as read in each system's code."
    )
    return [page.section("The balancing coefficient elsewhere", note, page.table(table))]


def _facts(run: Run) -> str:
    blocks = [
        f"<div><h3>{page.escape(heading)}</h3>{page.pairs(values)}</div>"
        for heading, values in facts.sections(run)
    ]
    config = json.dumps(run.card["config"], indent=2, ensure_ascii=False)
    return page.section(
        "What it stands on",
        f'<div class="columns">{"".join(blocks)}</div>',
        page.details("The complete configuration", page.code(config)),
    )


def _repeat(run: Run) -> str:
    return page.section(
        "Repeat, re-check, cite",
        page.code(f"{run.card['command']}\n{facts.verify_command(run)}"),
        page.paragraph(
            "verify recomputes the hashes and every loss and bits-per-byte number from the files of "
            "the run directory."
        ),
        page.code(facts.bibtex(run)),
    )


def _footer(run: Run) -> str:
    return (
        f"<footer>Made by moelab from result.json {page.escape(run.card['card_sha256'])}.</footer>"
    )
