"""The file of a committed arm: the cards of its seeds, each with a short curve, under one digest.

A line per run, so that a seed that is added is a line in the diff. A card is kept whole: its own digest still holds,
and that of the file is over what the cards' do not cover: curves, evaluation sets, schemas of configs, and the names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moelab.report import card as cards
from moelab.report.runs import ReportError

SCHEMA = 2


class ArmFile(NamedTuple):
    """An arm as it is committed.

    Attributes:
      family, arm: names.
      sha256: that the file states.
      entries: by seed: config_schema, documents_sha256, card, curve.
    """

    family: str
    arm: str
    sha256: str
    entries: dict[int, dict[str, Any]]


def digest(family: str, arm: str, entries: Mapping[int, Mapping[str, Any]]) -> str:
    """SHA-256 of the names and the entries in canonical JSON, in the order of their seeds."""
    runs = [entries[seed] for seed in sorted(entries)]
    content = {"family": family, "arm": arm, "runs": runs}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def text(family: str, arm: str, entries: Mapping[int, Mapping[str, Any]]) -> str:
    """Writes an arm."""
    names = {"schema": SCHEMA, "family": family, "arm": arm}
    head = json.dumps(names | {"sha256": digest(family, arm, entries)}, ensure_ascii=False)[:-1]
    lines = [
        json.dumps(entries[seed], separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        for seed in sorted(entries)
    ]
    return head + ', "runs": [\n' + ",\n".join(lines) + "\n]}\n"


def read(path: Path | str) -> ArmFile:
    """Reads an arm.

    Raises:
      ReportError: damaged, of another schema, without a run, or with an entry of another shape; it names the seed.
    """
    path = Path(path)
    try:
        value = cards.read_json(path)
    except cards.CardError as error:
        raise ReportError(f"{path.parent}/{error}") from None
    if value.get("schema") != SCHEMA:
        raise ReportError(f"{path}: schema is {value.get('schema')!r}; this moelab reads {SCHEMA}")
    for key in ("family", "arm", "sha256"):
        if not isinstance(value.get(key), str):
            raise ReportError(f"{path}: {key!r} wants a text; got {value.get(key)!r}")
    if not isinstance(value.get("runs"), list) or not value["runs"]:
        raise ReportError(f"{path}: holds no run")
    found: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(value["runs"], start=1):
        problem = next(_problems(entry), None)
        if problem:
            raise ReportError(f"{path}, run {number}: {problem}")
        seed = entry["card"]["seeds"]["seed"]
        if seed in found:
            raise ReportError(f"{path}: seed {seed} comes twice")
        found[seed] = entry
    return ArmFile(value["family"], value["arm"], value["sha256"], found)


def _problems(entry: Any) -> Iterator[str]:
    """What is wrong with an entry's shape, the card's outline included."""
    if not isinstance(entry, dict) or not isinstance(entry.get("card"), dict):
        yield "wants an object with a card"
        return
    card, curve = entry["card"], entry.get("curve")
    if card.get("schema") != cards.SCHEMA:
        yield f"a card of schema {card.get('schema')!r}; this moelab reads {cards.SCHEMA}"
        return
    yield from cards.outline_problems(card)
    if not isinstance(entry.get("documents_sha256", ""), str):
        yield "documents_sha256 wants a text"
    if not isinstance(curve, dict):
        yield f"curve wants an object; got {type(curve).__name__}"
        return
    yield from _curve_problems(curve)


def _curve_problems(curve: Mapping[str, Any]) -> Iterator[str]:
    steps = curve.get("step")
    if not isinstance(steps, list) or not all(type(step) is int for step in steps):
        yield "curve.step wants a list of integers"
        return
    for key in ("loss", "max_violation"):
        values = curve.get(key)
        if not isinstance(values, list) or not all(_is_number(v) for v in values):
            yield f"curve.{key} wants a list of numbers"
        elif len(values) != len(steps) and not (key == "max_violation" and not values):
            yield f"curve.{key} has {len(values)} values for {len(steps)} steps"
    looks = curve.get("validation", [])
    if not isinstance(looks, list) or not all(
        isinstance(look, list)
        and len(look) == 3
        and type(look[0]) is int
        and all(map(_is_number, look))
        for look in looks
    ):
        yield "curve.validation wants a list of [step, loss, bits per byte]"


def _is_number(value: Any) -> bool:
    """A number, one that was not measured, or one that is none, as metrics.plain spells it."""
    if isinstance(value, str):
        return value in ("NaN", "Infinity", "-Infinity")
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def is_arm(path: Path | str) -> bool:
    """Says whether a file holds an arm's cards, or damaged JSON in a folder of committed cards."""
    path = Path(path)
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        value = cards.read_json(path)
    except cards.CardError:
        return path.resolve().parent.parent.name == "cards"
    return "runs" in value and "family" in value


def files(path: Path | str) -> list[Path]:
    """Returns the arms that a path names: a file of cards, or those in a folder and one below; none where it is else.

    Damaged files beside arms are among them, so that reading them says so; other JSON is not.
    """
    path = Path(path)
    if not path.is_dir():
        return [path] if is_arm(path) else []
    if (path / "config.json").exists() or (path / "sweep.json").exists():
        return []
    there = [*sorted(path.glob("*.json")), *sorted(path.glob("*/*.json"))]
    found = [one for one in there if is_arm(one) or _damaged(one)]
    return found if any(map(is_arm, found)) else []


def _damaged(path: Path) -> bool:
    try:
        cards.read_json(path)
    except cards.CardError:
        return True
    return False
