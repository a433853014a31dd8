"""Re-checks a run directory against its result card: digests, hashes, and the numbers themselves.

Every failure is one line; a missing or damaged file is a failure, never a traceback. What is recomputed: the hash of
the config, the hash of every listed file, loss, loss difference and bits per byte of every precision from the document
table, step counts and final loss from metrics.jsonl, the checkpoint's digests, the card's own digest. What needs the
model or the machine again is guarded by the card's digest only: times, parameter counts, environment, baselines, router
agreement, bytes of expert weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moelab import metrics, schema
from moelab.report import card as cards
from moelab.report import documents
from moelab.report import formatting as fmt
from moelab.report.runs import REFERENCE

# Sums of the same float64 numbers in another order differ by less; one changed digit of a report by more.
_RELATIVE, _ABSOLUTE = 1e-9, 1e-9


def verify(run_directory: Path | str) -> list[str]:
    """Checks a finished run against its card.

    Args:
      run_directory: holds result.json, config.json, metrics.jsonl, evaluation/ and checkpoints/.

    Returns:
      One line per problem; an empty list is a pass.
    """
    directory = Path(run_directory)
    if not directory.is_dir():
        return [f"{directory}: no such run directory"]
    try:
        card = cards.read(directory)
    except cards.CardError as error:
        return str(error).split("; ")
    problems = []
    for check in (_card, _files, _config, _documents, _metrics, _checkpoint):
        problems += _guarded(check, directory, card)
    return problems


def _guarded(check: Callable, directory: Path, card: dict[str, Any]) -> list[str]:
    found = []
    try:
        found.extend(check(directory, card))
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        # The card or a file has a shape that the check did not expect: that is a finding, too.
        what = check.__name__.lstrip("_")
        found.append(f"{what}: cannot be checked ({type(error).__name__}: {_line(error)})")
    return found


def _card(directory: Path, card: dict[str, Any]) -> Iterator[str]:
    if cards.digest(card) != card["card_sha256"]:
        yield f"{cards.NAME}: changed after it was written: card_sha256 does not match its content"


def _files(directory: Path, card: dict[str, Any]) -> Iterator[str]:
    for name in cards.FILES:
        if name not in card["files"]:
            yield f"{cards.NAME}: files does not list {name}"
    for name, sha in card["files"].items():
        path = directory / name
        if not path.is_file():
            yield f"{name}: missing"
        elif cards.file_sha256(path) != sha:
            yield f"{name}: changed after the run: SHA-256 differs from the card's"


def config_hash_problems(card: Mapping[str, Any]) -> Iterator[str]:
    """Says whether the card's config is one of this moelab's and has the hash that the card states."""
    from moelab import config as configs  # late: reading a config may import routers and so jax

    try:
        sha = configs.sha256(configs.from_dict(card["config"]))
    except configs.ConfigError as error:
        yield f"config cannot be read: {_line(error)}"
        return
    if sha != card["config_sha256"]:
        yield f"config_sha256 is {card['config_sha256'][:12]}; config gives {sha[:12]}"


def _config(directory: Path, card: dict[str, Any]) -> Iterator[str]:
    try:
        recorded = cards.read_json(directory / "config.json")
    except cards.CardError as error:
        yield str(error)
        return
    if recorded.get("schema") != schema.SCHEMA:
        yield (
            f"config.json: configs have schema {schema.SCHEMA} now, this one {recorded.get('schema')!r}: defaults or "
            "meanings differ; verify it with the moelab that made it"
        )
        return
    yield from (f"{cards.NAME}: {text}" for text in config_hash_problems(card))
    # When and where things are written may change when a run is resumed; the rest may not.
    hashed = [
        {key: value for key, value in values.items() if key not in schema.UNHASHED}
        for values in (card["config"], recorded["config"])
    ]
    if hashed[0] != hashed[1]:
        yield f"config.json: {_first_difference(*hashed, 'config')} differs from the card's"
    if recorded["config_sha256"] != card["config_sha256"]:
        yield "config.json: config_sha256 differs from the card's"
    if card["seeds"]["seed"] != card["config"]["seed"]:
        yield f"{cards.NAME}: seeds.seed differs from config.seed"


def _first_difference(a: Any, b: Any, name: str) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{name}.{key}")
    return name


def _documents(directory: Path, card: dict[str, Any]) -> Iterator[str]:
    try:
        table = documents.read(directory / documents.NAME)
    except FileNotFoundError:
        return  # named by _files
    except documents.DocumentsError as error:
        yield f"{documents.NAME}: {_line(error)}"
        return
    evaluation = card["evaluation"]
    for key, value in (
        ("tokens", int(table.tokens_D.sum())),
        ("documents", len(table.document_D)),
    ):
        if evaluation[key] != value:
            yield f"{cards.NAME}: evaluation.{key} is {evaluation[key]}; the documents give {value}"
    if not set(table.domains) <= set(evaluation["domains"]):  # a domain may have no document
        yield f"{cards.NAME}: evaluation.domains differ from those of the documents"
    named = [row["precision"] for row in evaluation["rows"]]
    if sorted(named) != sorted(table.precisions):
        yield f"{cards.NAME}: evaluation.rows have other precisions than the documents"
    for row in evaluation["rows"]:
        if row["precision"] in table.nats:
            yield from _row(table, row)
    yield from _shares(evaluation)


def _row(table: documents.Documents, row: dict[str, Any]) -> Iterator[str]:
    name = row["precision"]
    where = f"{cards.NAME}: evaluation.rows[{name}]"
    loss = table.loss(name)
    checks = [("loss", row.get("loss"), loss)]
    if REFERENCE in table.nats:
        checks.append(("loss_delta", row.get("loss_delta"), loss - table.loss(REFERENCE)))
    bits = table.bits_per_byte(name)
    for domain in sorted(bits.keys() | row["bits_per_byte"].keys()):
        stated = row["bits_per_byte"].get(domain)
        checks.append((f"bits_per_byte.{domain}", stated, bits.get(domain)))
    for key, stated, recomputed in checks:
        if not _close(stated, recomputed):
            yield f"{where}.{key} is {stated}; the documents give {recomputed}"


def _shares(evaluation: dict[str, Any]) -> Iterator[str]:
    shares, layers = evaluation.get("load_by_domain"), evaluation.get("layers")
    if shares is None:
        return
    if len(shares) != len(layers) or any(len(s) != len(evaluation["domains"]) for s in shares):
        yield f"{cards.NAME}: evaluation.load_by_domain wants layers x domains x experts"
        return
    for layer, by_domain in zip(layers, shares, strict=True):
        for domain, share in zip(evaluation["domains"], by_domain, strict=True):
            if not math.isclose(sum(share), 1.0, abs_tol=1e-4) and any(share):
                total = sum(share)
                where = f"evaluation.load_by_domain of block {layer}, {domain}"
                yield f"{cards.NAME}: {where} sums to {total:.6f}, not 1"


def _metrics(directory: Path, card: dict[str, Any]) -> Iterator[str]:
    try:
        train = [r for r in metrics.read(directory / "metrics.jsonl") if r.get("kind") == "train"]
    except FileNotFoundError:
        return  # named by _files
    except metrics.MetricsError as error:
        yield _line(error).replace(f"{directory}/", "")
        return
    if not train:
        yield "metrics.jsonl: no training step in it"
        return
    steps = [record["step"] for record in train]
    if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        yield "metrics.jsonl: training steps do not increase"
    training, last = card["training"], train[-1]
    for key, logged in (
        ("steps", last["step"]),
        ("tokens", last["tokens"]),
        ("nonfinite_steps", last["nonfinite_steps"]),
        ("final_loss", last["loss"]),
    ):
        if not _close(training.get(key), logged):
            stated = training.get(key)
            yield f"{cards.NAME}: training.{key} is {stated}; metrics.jsonl ends with {logged}"


def _checkpoint(directory: Path, card: dict[str, Any]) -> Iterator[str]:
    from moelab import checkpoint  # late: imports jax

    folder = directory / "checkpoints"
    problems = checkpoint.verify(folder)
    yield from map(_line, problems)
    step, stated = card["checkpoint"]["step"], card["checkpoint"]["digest"]
    try:
        digest = checkpoint.read_manifest(folder, step)["digest"]
    except checkpoint.CheckpointError as error:
        if not problems:  # else it is named already
            yield f"checkpoint {step}: {_line(error)}"
    else:
        if digest != stated:
            yield f"{cards.NAME}: checkpoint.digest differs from the manifest of step {step}"
    if step != card["training"]["steps"]:
        yield f"{cards.NAME}: checkpoint.step {step} is not the last training step"


def _close(a: Any, b: Any) -> bool:
    a, b = fmt.number(a), fmt.number(b)
    if a is None or b is None:
        return a is b
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b or (math.isnan(a) and math.isnan(b))
    return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
