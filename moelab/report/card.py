"""The result card `result.json`: everything that a reader needs to trust, cite or repeat a run.

The card names the files that it stands on by their SHA-256 and carries its own: `card_sha256` is the SHA-256 of the
canonical JSON of all its other keys. A digest shows accidents and careless edits, not a determined forger; verify.py
also recomputes the numbers from the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moelab import atomic
from moelab.metrics import plain
from moelab.report import card_outline, documents

SCHEMA = 1
NAME = "result.json"
FILES = ("config.json", "metrics.jsonl", documents.NAME)
SECTIONS = {  # key -> type, in the order in which the card is written
    "schema": int,
    "name": str,
    "created": str,
    "command": str,
    "config": dict,
    "config_sha256": str,
    "overrides": list,
    "seeds": dict,
    "environment": dict,
    "data": dict,
    "parameters": dict,
    "leak": str,  # why outputs depend on later tokens; empty where they do not
    "group": str,  # among which tokens choices depend on one another; empty: none do
    "bound": str,  # why the run is never ranked with others; empty where it may be
    "training": dict,
    "evaluation": dict,
    "checkpoint": dict,
    "files": dict,
    "card_sha256": str,
}
NEWER = ("bound", "group")  # cards of earlier versions have none


class CardError(ValueError):
    """A result card that cannot be read; the message names the file and says why."""


def canonical(value: Any) -> str:
    """Writes JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(card: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the canonical JSON of the card without `card_sha256`."""
    rest = {key: value for key, value in card.items() if key != "card_sha256"}
    return hashlib.sha256(canonical(rest).encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(
    run_directory: Path | str,
    *,
    name: str,
    command: str,
    config: Mapping[str, Any],
    config_sha256: str,
    overrides: list[str],
    seeds: Mapping[str, int],
    environment: Mapping[str, Any],
    data: Mapping[str, Any],
    parameters: Mapping[str, Any],
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    leak: str = "",
    group: str = "",
    bound: str = "",
    created: str | None = None,
) -> dict[str, Any]:
    """Puts a card together and signs it; call it when every file of the run is complete.

    Args:
      run_directory: holds the FILES, which are hashed now.
      created: UTC time in ISO 8601; None is now.
      The rest: the sections of the card, JSON-like; numpy and jax values are converted.

    Returns:
      The card with `files` and `card_sha256` filled in.

    Raises:
      FileNotFoundError: one of FILES is missing.
      TypeError: a value without a JSON form.
    """
    run_directory = Path(run_directory)
    sections = {
        "schema": SCHEMA,
        "name": name,
        "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "config": config,
        "config_sha256": config_sha256,
        "overrides": overrides,
        "seeds": seeds,
        "environment": environment,
        "data": data,
        "parameters": parameters,
        "leak": leak,
        "group": group,
        "bound": bound,
        "training": training,
        "evaluation": evaluation,
        "checkpoint": checkpoint,
        "files": {path: file_sha256(run_directory / path) for path in FILES},
    }
    card = plain(sections)
    return card | {"card_sha256": digest(card)}


def write(card: Mapping[str, Any], run_directory: Path | str) -> Path:
    """Writes the card as `result.json` by an atomic replacement and returns its path."""
    text = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False)
    return atomic.write_text(Path(run_directory) / NAME, text + "\n")


def read(path: Path | str) -> dict[str, Any]:
    """Reads a card from its file or its run directory and checks its outline.

    Raises:
      CardError: missing, not JSON, another schema, or a section missing or of another type.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    card = read_json(path)
    if card.get("schema") != SCHEMA:
        raise CardError(
            f"{path.name}: schema is {card.get('schema')!r}; this moelab reads {SCHEMA}"
        )
    problems = outline_problems(card)
    if problems:
        raise CardError("; ".join(problems))
    return card


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      CardError: the file is missing, or no JSON object; the message has the file's name.
    """
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CardError(f"{path.name}: missing") from None
    except OSError as error:
        raise CardError(f"{path.name}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CardError(f"{path.name}: damaged JSON ({error})") from None
    if not isinstance(value, dict):
        raise CardError(f"{path.name}: wants a JSON object; got {type(value).__name__}")
    return value


def outline_problems(card: Mapping[str, Any]) -> list[str]:
    """Lists the sections, rows, values within them and file names that are missing or of another type."""
    problems = []
    for key, kind in SECTIONS.items():
        if key not in card:
            if key in NEWER:
                continue
            problems.append(f"{NAME}: section {key!r} is missing")
        elif not isinstance(card[key], kind) or isinstance(card[key], bool):
            got = type(card[key]).__name__
            problems.append(f"{NAME}: section {key!r} wants {kind.__name__}, not {got}")
    if problems:
        return problems
    rows = card["evaluation"].get("rows")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        problems.append(f"{NAME}: evaluation.rows wants a list of rows with precision and numbers")
    else:
        problems += [f"{NAME}: damaged card: {text}" for text in card_outline.problems(card)]
    for path, sha in card["files"].items():
        if not re.fullmatch(r"[0-9a-f]{64}", str(sha)):
            problems.append(f"{NAME}: files[{path!r}] is no SHA-256")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            problems.append(f"{NAME}: files[{path!r}] points outside the run directory")
    return problems


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("precision"), str)
        and isinstance(row.get("bits_per_byte"), dict)
    )
