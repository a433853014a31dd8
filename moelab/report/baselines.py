"""Committed baselines: cards of finished runs with their curves, and the leaderboard that is generated from them.

    experiments/baselines/families.json         what each family asks, its config, its tables
    experiments/baselines/cards/FAMILY/ARM.json  the result cards of an arm's seeds, each with its curve; no weights
    experiments/baselines/README.md             generated; a test fails when it is stale
    experiments/baselines/drift.json            the same seed on another machine: what was measured

A card is kept whole, so that its own digest still holds; what it stands on (documents, checkpoint) stays where it ran.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelab import config_file, spelling
from moelab.report import arms
from moelab.report import card as cards
from moelab.report import formatting as fmt
from moelab.report.runs import ReportError, Run

SCHEMA = 1
FOLDER = [Path("experiments"), *config_file.folders()][
    -1
] / "baselines"  # beside the package, or here
CARDS, FAMILIES, DRIFT, README = "cards", "families.json", "drift.json", "README.md"
_POINTS = 48  # of a curve


@dataclasses.dataclass(frozen=True)
class Family:
    """A question that several arms answer, and how its tables are made.

    Attributes:
      name: of its folder.
      title, text: what is asked, and what to know before reading.
      config: the experiment file whose sweeps make it.
      commands: that make it, one after the other.
      tables: {"precision": ..., "reference": ..., "arms": [names], "picture": FILE.png} each; no arms: all of them;
        the picture is validation against training FLOPs.
      different_tokens: whether arms may train on different numbers of tokens.
    """

    name: str
    title: str
    text: str
    config: str
    commands: tuple[str, ...]
    tables: tuple[Mapping[str, Any], ...] = ({},)
    different_tokens: bool = False


def families(folder: Path | str = FOLDER) -> dict[str, Family]:
    """Reads the families in the order of their file.

    Raises:
      ReportError: no such file, or a family with other fields.
    """
    path = Path(folder) / FAMILIES
    try:
        values = cards.read_json(path)
        found = {}
        for name, fields in values.items():
            lists = {key: tuple(fields[key]) for key in ("commands", "tables") if key in fields}
            found[name] = Family(name, **(fields | lists))
        return found
    except (cards.CardError, TypeError) as error:
        raise ReportError(f"{path}: {error}") from None


def family(name: str, folder: Path | str = FOLDER) -> Family:
    """Returns one family.

    Raises:
      ReportError: no such family, with the one that was meant.
    """
    known = families(folder)
    if name not in known:
        guess = spelling.hint(name, known) or f"; there are {', '.join(known)}"
        raise ReportError(f"no family {name!r} in {Path(folder) / FAMILIES}{guess}")
    return known[name]


def add(runs: Sequence[Run], family_name: str, folder: Path | str = FOLDER) -> list[Path]:
    """Writes finished runs as cards of a family; a seed that is there already is replaced.

    Args:
      runs: from `runs.load_all`; of one config schema, with their journals.
      family_name: of families.json.
      folder: of the baselines.

    Returns:
      The files written.

    Raises:
      ReportError: no such family; an arm's name that another config has; a run without a journal.
    """
    family(family_name, folder)
    written = []
    for arm in arms.group(runs):
        path = Path(folder) / CARDS / family_name / f"{_file_name(arm.name)}.json"
        earlier = read_arm(path) if path.is_file() else {}
        new = {seed: _entry(run) for seed, run in arm.runs.items()}
        for seed, entry in earlier.items():
            if _config(entry) != _config(next(iter(new.values()))):
                raise ReportError(
                    f"{path} holds another config under the name {arm.name!r}; name the point otherwise, or remove it"
                )
            new.setdefault(seed, entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_arm_text(family_name, arm.name, new), encoding="utf-8")
        written.append(path)
    return written


def _file_name(arm: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=+,-]+", "_", arm)


def _config(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in entry["card"]["config"].items() if key != "seed"}


def _arm_text(family_name: str, name: str, entries: Mapping[int, dict]) -> str:
    """A run per line: a seed that is added is a line in the diff."""
    head = json.dumps({"schema": SCHEMA, "family": family_name, "arm": name})[:-1]
    lines = [
        json.dumps(entries[seed], separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        for seed in sorted(entries)
    ]
    return head + ', "runs": [\n' + ",\n".join(lines) + "\n]}\n"


def _entry(run: Run) -> dict[str, Any]:
    if run.config_schema is None or not run.records("train"):
        raise ReportError(f"{run.directory}: a baseline wants the run's config.json and journal")
    return {
        "config_schema": run.config_schema,
        "documents_sha256": run.documents_sha256,
        "card": run.card,
        "curve": curve(run),
    }


def curve(run: Run) -> dict[str, list]:
    """Shortens a run's journal: loss and MaxVio as means over equal stretches of steps, validation as it is.

    Returns:
      step: last one of each stretch; loss, max_violation (mean over layers; empty where there are no experts);
      validation: [step, loss, bits per byte]. Means to five digits.
    """
    train = run.records("train")
    stretches = np.array_split(np.arange(len(train)), min(_POINTS, len(train)))
    losses = [fmt.number(record.get("loss")) for record in train]
    violations = [record.get("router", {}).get("max_violation") or () for record in train]

    def mean(values: Sequence[Any], places: np.ndarray) -> float | None:
        known = [v for i in places for v in np.ravel(values[i]) if v is not None and np.isfinite(v)]
        return float(f"{np.mean(known):.5g}") if known else None

    shortened = {
        "step": [train[places[-1]]["step"] for places in stretches],
        "loss": [mean(losses, places) for places in stretches],
        "max_violation": [mean(violations, places) for places in stretches],
        "validation": [
            [
                r["step"],
                fmt.number(r.get("loss")),
                fmt.number((r.get("bits_per_byte") or {}).get("all")),
            ]
            for r in run.records("evaluation")
            if r.get("split") == "validation"
        ],
    }
    if not any(v is not None for v in shortened["max_violation"]):
        shortened["max_violation"] = []
    return shortened


def read_arm(path: Path | str) -> dict[int, dict[str, Any]]:
    """Reads an arm's entries by seed.

    Raises:
      ReportError: damaged, of another schema, or with a card that cannot be read.
    """
    path = Path(path)
    try:
        value = cards.read_json(path)
        if value.get("schema") != SCHEMA:
            raise ReportError(
                f"{path}: schema is {value.get('schema')!r}; this moelab reads {SCHEMA}"
            )
        found = {}
        for entry in value["runs"]:
            if entry["card"].get("schema") != cards.SCHEMA:
                got = entry["card"].get("schema")
                raise ReportError(
                    f"{path}: a card of schema {got!r}; this moelab reads {cards.SCHEMA}"
                )
            problems = cards.outline_problems(entry["card"])
            if problems:
                raise ReportError(f"{path}: {'; '.join(problems)}")
            found[entry["card"]["seeds"]["seed"]] = entry
        return found
    except (cards.CardError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: {type(error).__name__}: {error}") from None


def is_arm(path: Path | str) -> bool:
    """Says whether a file holds an arm's cards."""
    path = Path(path)
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        value = cards.read_json(path)
    except cards.CardError:
        return False
    return "runs" in value and "family" in value


def arm_files(path: Path | str) -> list[Path]:
    """Returns the arms that a path names: a file of cards, or those in a folder; none where it is something else."""
    path = Path(path)
    return [
        one for one in (sorted(path.glob("*.json")) if path.is_dir() else [path]) if is_arm(one)
    ]


def names(folder: Path | str = FOLDER) -> list[str]:
    """Lists FAMILY/ARM of every committed arm."""
    found = Path(folder) / CARDS
    return [f"{p.parent.name}/{p.stem}" for p in sorted(found.glob("*/*.json"))]


def find(name: str, folder: Path | str = FOLDER) -> Path:
    """Returns the file of FAMILY/ARM, or of an arm's name that only one family has.

    Raises:
      ReportError: none, or several; with what was meant.
    """
    known = names(folder)
    chosen = [full for full in known if name in (full, full.partition("/")[2])]
    if len(chosen) == 1:
        return Path(folder) / CARDS / f"{chosen[0]}.json"
    if chosen:
        raise ReportError(f"several baselines are called {name!r}: {', '.join(chosen)}")
    guess = spelling.hint(name, known) or (
        f"; there are {', '.join(known)}" if known else "; there is none"
    )
    raise ReportError(f"no baseline {name!r} in {Path(folder) / CARDS}{guess}")


def load(path: Path | str) -> list[Run]:
    """Reads an arm's cards as runs, their curves as journals."""
    value = cards.read_json(Path(path))
    return [
        Run(
            Path(path),
            entry["card"],
            list(_journal(entry["curve"])),
            None,
            label=f"{value['arm']}-seed={seed}",
            config_schema=entry.get("config_schema"),
            documents_sha256=entry.get("documents_sha256", ""),
        )
        for seed, entry in sorted(read_arm(path).items())
    ]


def _journal(shortened: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    violations = shortened.get("max_violation") or [None] * len(shortened["step"])
    for step, loss, violation in zip(shortened["step"], shortened["loss"], violations, strict=True):
        router = {"layers": [0], "max_violation": [violation]} if violation is not None else {}
        yield {"kind": "train", "step": step, "loss": loss, "router": router}
    for step, loss, bits in shortened.get("validation", ()):
        found = {"step": step, "loss": loss, "bits_per_byte": {"all": bits}}
        yield {"kind": "evaluation", "split": "validation", **found}


def problems(path: Path | str) -> list[str]:
    """Checks an arm's cards without its runs: digests, hashes of configs, sums, and that curves end where cards do.

    Returns:
      One line per problem; an empty list is a pass.
    """
    from moelab import config as configs  # late: reading a config may import routers and so jax
    from moelab import schema

    try:
        entries = read_arm(path)
    except ReportError as error:
        return [str(error)]
    found = []
    for seed, entry in entries.items():
        card, where = entry["card"], f"{path}, seed {seed}"
        if cards.digest(card) != card["card_sha256"]:
            found.append(
                f"{where}: changed after it was written: card_sha256 does not match its content"
            )
        if entry.get("config_schema") != schema.SCHEMA:
            got = entry.get("config_schema")
            found.append(
                f"{where}: configs have schema {schema.SCHEMA} now, this one {got!r}: verify it with the moelab that "
                "made it"
            )
            continue
        try:
            sha = configs.sha256(configs.from_dict(card["config"]))
        except configs.ConfigError as error:
            found.append(f"{where}: config cannot be read: {error}")
        else:
            if sha != card["config_sha256"]:
                found.append(
                    f"{where}: config_sha256 is {card['config_sha256'][:12]}; config gives {sha[:12]}"
                )
        steps = entry["curve"].get("step") or [None]
        if steps[-1] != card["training"].get("steps"):
            found.append(
                f"{where}: the curve ends at step {steps[-1]}, the card at {card['training'].get('steps')}"
            )
        found += [f"{where}: {text}" for text in _numbers(card, entry["curve"])]
    return found


def _numbers(card: Mapping[str, Any], shortened: Mapping[str, list]) -> Iterator[str]:
    """What must hold between the numbers of a card."""
    for row in card["evaluation"]["rows"]:
        bits = row["bits_per_byte"]
        inside = [fmt.number(v) for key, v in bits.items() if key != "all"]
        overall = fmt.number(bits.get("all"))
        known = [v for v in inside if v is not None and np.isfinite(v)]
        if overall is None or (known and not min(known) - 1e-9 <= overall <= max(known) + 1e-9):
            yield f"bits per byte of {row['precision']} over all domains lie outside those of the domains"
    lengths = {len(shortened.get(key) or ()) for key in ("step", "loss")}
    if len(lengths) != 1:
        yield "the curve's columns have different lengths"
    parameters = card["parameters"]
    if not 0 < parameters.get("active", 0) <= parameters.get("total", 0):
        yield f"{parameters.get('active')} active of {parameters.get('total')} parameters"
