"""Checks committed cards without their runs: digests, hashes of configs, sums, and what curve and card both tell.

Every failure is one line, never a traceback: an entry whose shape no check expected is a finding too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moelab import schema
from moelab.report import arm_file, baselines, verify
from moelab.report import card as cards
from moelab.report import formatting as fmt
from moelab.report.runs import ReportError


def problems(path: Path | str) -> list[str]:
    """Checks an arm's file.

    Returns:
      One line per problem; an empty list is a pass.
    """
    path = Path(path)
    try:
        found = arm_file.read(path)
    except ReportError as error:
        return [str(error)]
    told = _guarded(str(path), _of_file(path, found))
    for seed, entry in found.entries.items():
        told += _guarded(f"{path}, seed {seed}", _of_entry(entry))
    return told


def _guarded(where: str, problems: Iterator[str]) -> list[str]:
    told = []
    try:
        told.extend(f"{where}: {text}" for text in problems)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        told.append(f"{where}: cannot be checked ({type(error).__name__}: {error})")
    return told


def _of_file(path: Path, found: arm_file.ArmFile) -> Iterator[str]:
    if arm_file.digest(found.family, found.arm, found.entries) != found.sha256:
        yield "changed after it was written: sha256 does not match its content"
    configs = [baselines.config_of(entry) for entry in found.entries.values()]
    if any(config != configs[0] for config in configs):
        yield "its runs differ in more than their seed"
    folder = path.resolve().parent
    if folder.parent.name == baselines.CARDS:
        named = f"{found.family}/{baselines.file_name(found.arm)}"
        if named != f"{folder.name}/{path.stem}":
            yield f"it says that it is {named}"


def _of_entry(entry: Mapping[str, Any]) -> Iterator[str]:
    card = entry["card"]
    if cards.digest(card) != card["card_sha256"]:
        yield "changed after it was written: card_sha256 does not match its content"
    if entry.get("config_schema") != schema.SCHEMA:
        got = entry.get("config_schema")
        yield (
            f"configs have schema {schema.SCHEMA} now, this one {got!r}: verify it with the moelab that made it"
        )
        return
    yield from verify.config_hash_problems(card)
    if card["config"].get("seed") != card["seeds"]["seed"]:
        yield f"the seed is {card['seeds']['seed']}; the config has {card['config'].get('seed')}"
    yield from _numbers(card)
    yield from _curve(card["training"], entry["curve"])


def _numbers(card: Mapping[str, Any]) -> Iterator[str]:
    """What must hold between the numbers of a card."""
    for row in card["evaluation"]["rows"]:
        bits = {key: fmt.number(value) for key, value in row["bits_per_byte"].items()}
        overall = bits.pop("all", None)
        known = [v for v in bits.values() if v is not None and math.isfinite(v)]
        lost = overall is None or (math.isnan(overall) and len(known) == len(bits) > 0)
        if lost or (
            known
            and not min(known) - 1e-9 <= overall <= max(known) + 1e-9
            and not math.isnan(overall)
        ):
            yield f"bits per byte of {row['precision']} over all domains lie outside those of the domains"
    parameters = card["parameters"]
    if not 0 < parameters.get("active", 0) <= parameters.get("total", 0):
        yield f"{parameters.get('active')} active of {parameters.get('total')} parameters"


def _curve(training: Mapping[str, Any], curve: Mapping[str, list]) -> Iterator[str]:
    """What the curve and the card both tell: the steps. Losses are means over stretches, and not the card's."""
    steps = curve["step"]
    if steps != sorted(set(steps)):
        yield "the curve's steps do not rise"
    if steps[-1:] != [training.get("steps")]:
        yield f"the curve ends at step {steps[-1] if steps else None}, the card at {training.get('steps')}"
