"""RESULT.md: the run on one page of Markdown, for a repository or an issue."""

from __future__ import annotations

from typing import Any

from moelab.report import facts, tables, task_table
from moelab.report.runs import Run
from moelab.report.tables import markdown_text


def render(run: Run) -> str:
    """Writes the Markdown of one run: the result table first, then what it stands on."""
    card = run.card
    table = tables.result_table(run)
    parts = [f"# {markdown_text(card['name'])}\n", _summary(run)]
    parts += [f"> **Note.** {markdown_text(note)}\n" for note in facts.warnings(run)]
    parts += [
        "## Result\n",
        f"{table.title}. {facts.result_note(run)}\n",
        tables.to_markdown(table),
    ]
    for heading, extra in (
        ("Against baselines", tables.baseline_table(run)),
        ("Beyond the loss", task_table.of_run(run)),
        ("Routers", tables.router_table(run)),
        ("The balancing coefficient elsewhere", tables.coefficient_table(run)),
    ):
        if extra is not None:
            parts += [f"## {heading}\n", extra.title + ".\n", tables.to_markdown(extra)]
    for heading, pairs in facts.sections(run):
        parts += [f"## {heading}\n", _pairs(pairs)]
    parts += ["## Repeat and re-check\n", _commands(run)]
    return "\n".join(parts)


def _summary(run: Run) -> str:
    text = ", ".join(f"{label} {value}" for label, value, _ in facts.key_figures(run))
    return markdown_text(text) + "\n"


def _pairs(pairs: list[tuple[str, Any]]) -> str:
    lines = ["| | |", "| --- | --- |"]
    for key, value in pairs:
        lines.append(
            f"| {markdown_text(key)} | {markdown_text(value).replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines) + "\n"


def _commands(run: Run) -> str:
    command = " ".join(str(run.card["command"]).split())
    return f"```\n{command}\n{facts.verify_command(run)}\n```\n"
