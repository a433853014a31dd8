"""Committed baselines: cards of finished runs with their curves, and the leaderboard that is generated from them.

    experiments/baselines/families.json         what each family asks, its config, its tables
    experiments/baselines/cards/FAMILY/ARM.json  the result cards of an arm's seeds, each with its curve; no weights
    experiments/baselines/README.md             generated; a test fails when it is stale
    experiments/baselines/drift.json            the same seed on another machine: what was measured

A card is kept whole, so that its own digest still holds; what it stands on (documents, checkpoint) stays where it ran.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelab import config_file, metrics, spelling
from moelab.report import arm_file, arms
from moelab.report import card as cards
from moelab.report import formatting as fmt
from moelab.report.runs import ReportError, Run

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
    except cards.CardError as error:
        raise ReportError(f"{path.parent}/{error}") from None
    return {name: _read_family(name, fields, f"{path}: {name}") for name, fields in values.items()}


_TEXTS, _LISTS = ("title", "text", "config"), ("commands", "tables")
_TABLE = {"title": str, "precision": str, "reference": str, "arms": list, "picture": str}


def _read_family(name: str, fields: Any, where: str) -> Family:
    known = [field.name for field in dataclasses.fields(Family) if field.name != "name"]
    _check_keys(fields, known, where)
    for key in (*_TEXTS, "commands"):
        if key not in fields:
            raise ReportError(f"{where} has no {key}")
    for key in _TEXTS:
        if not isinstance(fields[key], str):
            raise ReportError(f"{where}.{key} wants a text")
    for key in _LISTS:
        if not isinstance(fields.get(key, []), list):
            raise ReportError(f"{where}.{key} wants a list")
    if not all(isinstance(command, str) for command in fields["commands"]):
        raise ReportError(f"{where}.commands wants a list of texts")
    for number, table in enumerate(fields.get("tables", []), start=1):
        _check_keys(table, _TABLE, f"{where}, table {number}")
        for key, value in table.items():
            if not isinstance(value, _TABLE[key]):
                raise ReportError(f"{where}, table {number}: {key} wants a {_TABLE[key].__name__}")
    lists = {key: tuple(fields[key]) for key in _LISTS if key in fields}
    return Family(name, **(fields | lists))


def _check_keys(value: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ReportError(f"{where} wants an object; got {value!r}")
    for key in value:
        if key not in known:
            guess = spelling.hint(key, list(known)) or f"; there are {', '.join(known)}"
            raise ReportError(f"{where} has no field {key!r}{guess}")


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


def texts(runs: Sequence[Run], family_name: str, folder: Path | str = FOLDER) -> dict[Path, str]:
    """Makes the files that finished runs give as arms of a family; a seed that is there already is replaced.

    Args:
      runs: from `runs.load_all`; of one config schema, with their journals.
      family_name: of families.json.
      folder: of the baselines.

    Raises:
      ReportError: no such family; an arm's name that another has; an arm that was changed by hand; a run without a
        journal.
    """
    family(family_name, folder)
    made = {}
    for arm in arms.group(runs):
        path = Path(folder) / CARDS / family_name / f"{file_name(arm.name)}.json"
        if path in made:
            raise ReportError(
                f"two arms would be {path}, one of them {arm.name!r}: name a point otherwise"
            )
        earlier = _earlier(path) if path.is_file() else {}
        new = {seed: _entry(run) for seed, run in arm.runs.items()}
        for seed, entry in earlier.items():
            if config_of(entry) != config_of(next(iter(new.values()))):
                raise ReportError(
                    f"{path} holds another config under the name {arm.name!r}; name the point otherwise, or remove it"
                )
            new.setdefault(seed, entry)
        made[path] = arm_file.text(family_name, arm.name, new)
    return made


def _earlier(path: Path) -> dict[int, dict[str, Any]]:
    found = arm_file.read(path)
    if arm_file.digest(found.family, found.arm, found.entries) != found.sha256:
        raise ReportError(f"{path} was changed after it was written: nothing is added to it")
    return found.entries


def file_name(arm: str) -> str:
    """The stem of an arm's file."""
    return re.sub(r"[^A-Za-z0-9_.=+,-]+", "_", arm)


def config_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What all seeds of an arm share."""
    return {key: v for key, v in entry["card"]["config"].items() if key != "seed"}


def _entry(run: Run) -> dict[str, Any]:
    if run.config_schema is None or not run.records("train"):
        raise ReportError(f"{run.directory}: a baseline wants the run's config.json and journal")
    return metrics.plain(
        {
            "config_schema": run.config_schema,
            "documents_sha256": run.documents_sha256,
            "card": run.card,
            "curve": curve(run),
        }
    )


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
    found = arm_file.read(path)
    return [
        Run(
            Path(path),
            entry["card"],
            list(_journal(metrics.restored(entry["curve"]))),
            None,
            label=f"{found.arm}-seed={seed}",
            config_schema=entry.get("config_schema"),
            documents_sha256=entry.get("documents_sha256", ""),
        )
        for seed, entry in sorted(found.entries.items())
    ]


def _journal(shortened: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    violations = shortened.get("max_violation") or [None] * len(shortened["step"])
    for step, loss, violation in zip(shortened["step"], shortened["loss"], violations, strict=True):
        router = {"layers": [0], "max_violation": [violation]} if violation is not None else {}
        yield {"kind": "train", "step": step, "loss": loss, "router": router}
    for step, loss, bits in shortened.get("validation", ()):
        found = {"step": step, "loss": loss, "bits_per_byte": {"all": bits}}
        yield {"kind": "evaluation", "split": "validation", **found}
