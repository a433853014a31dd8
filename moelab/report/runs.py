"""A finished run as the report reads it, and the question whether several runs may stand in one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moelab import metrics, sweep_file
from moelab.errors import UserError
from moelab.report import card as cards
from moelab.report import documents
from moelab.report import journal as journals

REFERENCE = "float32"


class ReportError(UserError):
    """A report that cannot be made; the message is ready for the user."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
      directory: the run directory, or the folder of a card that stands alone.
      card: the result card.
      journal: records of metrics.jsonl in order; empty where there is none.
      documents: the document table, or None where there is none.
      notes: what could not be read, one line each, to be shown in the report.
      label: the point's name in its sweep; empty for other runs.
      config_schema: the schema of configs under which it ran; None where a card stands alone.
      documents_sha256: of the evaluation set (`documents.Documents.sha256`); empty where it is not known.
    """

    directory: Path
    card: dict[str, Any]
    journal: list[dict[str, Any]]
    documents: documents.Documents | None
    notes: tuple[str, ...] = ()
    label: str = ""
    config_schema: int | None = None
    documents_sha256: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The card's evaluation rows, one per precision."""
        return self.card["evaluation"]["rows"]

    @property
    def domains(self) -> tuple[str, ...]:
        """The evaluated domains in the card's order."""
        return tuple(self.card["evaluation"].get("domains") or ())

    @property
    def reference(self) -> dict[str, Any] | None:
        """The float32 row, or None."""
        return next((row for row in self.rows if row["precision"] == REFERENCE), None)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Returns the journal's records of one kind: train, evaluation or event."""
        return [record for record in self.journal if record.get("kind") == kind]


def load(path: Path | str) -> Run:
    """Reads a run directory, or a result card that stands alone (a committed baseline).

    Missing or damaged metrics and documents are noted, not fatal: the card is what is reported.

    Raises:
      ReportError: there is no such path or no readable card.
    """
    path = Path(path)
    if not path.exists():
        raise ReportError(f"no such run: {path}")
    try:
        card = cards.read(path)
    except cards.CardError as error:
        hint = " (did the run finish?)" if path.is_dir() and "missing" in str(error) else ""
        raise ReportError(f"{path}: {error}{hint}") from None
    if not path.is_dir():
        note = "This report is made from a result card alone: no curves, no intervals."
        return Run(path.parent, card, [], None, (note,))
    notes, journal, table = [], [], None
    try:
        journal = journals.read(path / "metrics.jsonl")
    except (OSError, metrics.MetricsError) as error:
        notes.append(f"No curves: metrics.jsonl cannot be read ({_reason(error)}).")
    try:
        table = documents.read(path / documents.NAME)
    except (OSError, documents.DocumentsError) as error:
        notes.append(f"No intervals: {documents.NAME} cannot be read ({_reason(error)}).")
    return Run(
        path,
        card,
        journal,
        table,
        tuple(notes),
        config_schema=_config_schema(path),
        documents_sha256=table.sha256 if table else "",
    )


def load_all(paths: Sequence[Path | str]) -> tuple[list[Run], list[str]]:
    """Reads runs, finished points of sweep directories, and cards of committed baselines (an arm, or a folder).

    Returns:
      The runs, and one line for each sweep that is not finished.

    Raises:
      ReportError: as `load`; nothing is named; a sweep without a finished point.
    """
    if not paths:
        raise ReportError("a report wants at least one run")
    from moelab.report import arm_file, baselines

    found, notes = [], []
    for path in paths:
        if files := arm_file.files(path):
            found += [run for file in files for run in baselines.load(file)]
            continue
        if not sweep_file.is_sweep(path):
            found.append(load(path))
            continue
        points = sweep_file.read(path).points
        finished = [p for p in points if p.status == sweep_file.FINISHED]
        if not finished:
            raise ReportError(f"{path}: none of the sweep's {len(points)} points is finished")
        if len(finished) < len(points):
            notes.append(
                f"{path}: {len(finished)} of {len(points)} points of the sweep are finished."
            )
        for point in finished:
            run = load(Path(path) / point.directory)
            found.append(dataclasses.replace(run, label=point.name))
    return found, notes


def _config_schema(directory: Path) -> int | None:
    try:
        return cards.read_json(directory / "config.json").get("schema")
    except cards.CardError:
        return None


def _reason(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else str(error)


def check_comparable(runs: Sequence[Run], *, different_tokens: bool = False) -> None:
    """Refuses runs whose numbers do not belong into one table.

    Args:
      runs: at least one.
      different_tokens: allow different numbers of training tokens, as at equal FLOPs.

    Raises:
      ReportError: names the two runs and the first difference in tokenizer, evaluation split or documents, schema of
        configs, or training tokens.
    """
    first = runs[0]
    for other in runs[1:]:
        difference = _difference(first, other) or _other_training(first, other, different_tokens)
        if difference:
            raise ReportError(
                f"{first.directory} and {other.directory} cannot be compared: {difference}"
            )


def _other_training(first: Run, other: Run, different_tokens: bool) -> str:
    schemas = first.config_schema, other.config_schema
    if None not in schemas and schemas[0] != schemas[1]:
        return "schemas of configs differ ({} and {}): defaults or meanings changed".format(
            *schemas
        )
    tokens = [run.card["training"].get("tokens") for run in (first, other)]
    if tokens[0] != tokens[1] and not different_tokens:
        return "training tokens differ ({} and {}); --different_tokens compares them anyway".format(
            *tokens
        )
    return ""


def _difference(first: Run, other: Run) -> str:
    tokenizers = [run.card["data"].get("tokenizer_sha256") for run in (first, other)]
    if tokenizers[0] != tokenizers[1]:
        return "tokenizers differ ({} and {})".format(*(str(t)[:12] for t in tokenizers))
    for key in ("split", "domains", "documents", "tokens"):
        values = [run.card["evaluation"].get(key) for run in (first, other)]
        if values[0] != values[1]:
            return f"evaluation {key} differ ({values[0]} and {values[1]})"
    if first.documents is None or other.documents is None:
        shas = first.documents_sha256, other.documents_sha256
        differ = all(shas) and shas[0] != shas[1]
        return (
            "evaluation sets differ ({} and {})".format(*(s[:12] for s in shas)) if differ else ""
        )
    sets = [
        set(zip(t.domain_D, t.document_D, t.bytes_D.tolist(), strict=True))
        for t in (first.documents, other.documents)
    ]
    odd = len(sets[0] ^ sets[1])
    return f"evaluation sets differ in {odd} documents" if odd else ""
