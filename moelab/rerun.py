"""Runs a committed baseline again: the same seed must land within the measured drift, a new one within its prediction.

The drift is what the same seed gave on other machines or core counts (experiments/baselines/drift.json): sums in
another order, carried through a training. It grows with the training, so that runs of as many tokens are asked, of
whatever family. On the machine that made a card a run is bit-exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from moelab import atomic, launch, schema
from moelab import config as configs
from moelab.report import arm_file, baselines, paired
from moelab.report import card as cards
from moelab.report.arms import VALIDATION
from moelab.report.documents import ALL
from moelab.report.runs import REFERENCE, ReportError
from moelab.report.statistics import CONFIDENCE, Interval

_SAME = 1e-9  # bits per byte: bit-exact, summed
_ROUNDING = 1e-6  # bits per byte: no drift is known better
_MACHINE = ("cpu", "simd", "cores")


@dataclasses.dataclass(frozen=True)
class Rerun:
    """What a re-run gave.

    Attributes:
      name: FAMILY/ARM.
      seed: that was run.
      directory: of the run.
      bits_per_byte: that it reached.
      expected: what it was to reach: the card's value or the seeds' mean, with the bounds.
      rule: what the bounds are.
      passed: whether it lies within them; None where there is nothing to judge by.
      difference: to the card of the same seed; None for a new seed.
    """

    name: str
    seed: int
    directory: Path
    bits_per_byte: float
    expected: Interval
    rule: str
    passed: bool | None
    difference: float | None = None


def rerun(
    name: str,
    *,
    seed: int | None = None,
    workdir: Path | str = "",
    folder: Path | str = baselines.FOLDER,
    progress: bool = False,
    command: str = "",
) -> Rerun:
    """Trains one arm of a committed baseline again and judges the result.

    Args:
      name: FAMILY/ARM.
      seed: one of the arm's, or a new one; None: its first.
      workdir: of the run, which goes on there if it was interrupted; empty: runs/rerun-FAMILY-ARM-sSEED, with a number
        behind it where such a run has ended.
      folder: of the baselines.
      progress: draw a progress bar.
      command: recorded in the new card.

    Raises:
      ReportError: no such baseline; made under another schema of configs, or on other data; workdir holds a finished
        run, whose card would be read, not made.
      ConfigError: the run cannot be made.
    """
    path = baselines.find(name, folder)
    entries = arm_file.read(path).entries
    name = f"{path.parent.name}/{path.stem}"
    seed = min(entries) if seed is None else seed
    card = entries[seed if seed in entries else min(entries)]["card"]
    _check_schema(entries, path)
    drift, precision = (
        drifts(folder),
        _precision(name, folder),
    )  # what is damaged is found before the training
    config = configs.from_dict({**card["config"], "seed": seed})
    directory = Path(workdir) if workdir else _unused(f"rerun-{name.replace('/', '-')}-s{seed}")
    if (directory / cards.NAME).exists():
        raise ReportError(
            f"{directory}: holds a run that has ended; a re-run wants a new --workdir"
        )
    result = launch.run(config, directory, progress=progress, command=command)
    if result.card is None:
        raise ReportError(f"{directory}: the run stopped with exit code {result.exit_code}")
    _check_data(card, result.card, path)
    return judge(name, seed, entries, result.card, precision, drift, directory)


def _unused(stem: str) -> Path:
    """The first folder runs/STEM, runs/STEM-2, ... without a run that has ended."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    paths = (Path("runs") / name for name in names)
    return next(path for path in paths if not (path / cards.NAME).exists())


def _check_schema(entries: Mapping[int, Mapping], path: Path) -> None:
    for seed, entry in entries.items():
        if entry.get("config_schema") != schema.SCHEMA:
            raise ReportError(
                f"{path}, seed {seed}: made under schema {entry.get('config_schema')!r} of configs; this moelab has "
                f"{schema.SCHEMA}: run it with the moelab that made it"
            )


def _check_data(old: Mapping, new: Mapping, path: Path) -> None:
    for key in ("sha256", "tokenizer_sha256"):
        if old["data"].get(key) != new["data"].get(key):
            texts = [str(card["data"].get(key))[:12] for card in (old, new)]
            raise ReportError(
                f"{path}: data {key} was {texts[0]} and is {texts[1]}: not the same run"
            )


def _precision(name: str, folder: Path | str) -> str:
    """The precision of the first table that shows FAMILY/ARM."""
    family, _, arm = name.partition("/")
    known = baselines.families(folder)
    tables = known[family].tables if family in known else ()
    shown = [table for table in tables if arm in table.get("arms", (arm,))]
    precision = shown[0].get("precision", REFERENCE) if shown else REFERENCE
    return REFERENCE if precision == VALIDATION else precision  # cards have the test split's rows


def bits(card: Mapping[str, Any], precision: str) -> float:
    """Returns a card's bits per byte over all domains."""
    row = next((r for r in card["evaluation"]["rows"] if r["precision"] == precision), None)
    if row is None:
        raise ReportError(f"no precision {precision!r} in the card of seed {card['seeds']['seed']}")
    return float(row["bits_per_byte"][ALL])


def judge(
    name: str,
    seed: int,
    entries: Mapping[int, Mapping],
    card: Mapping[str, Any],
    precision: str,
    drift: Sequence[Mapping[str, Any]],
    directory: Path = Path(),
) -> Rerun:
    """Judges a new card against an arm's cards.

    The same seed: |difference| <= t(0.975, n) rms of the n drifts between machines measured in runs of as many tokens,
    so that one in twenty falls outside by chance; the rule says where a machine of the card's own kind, which should be
    bit-exact, was not. Where none was measured such a machine must be equal, and another is judged like a new seed:
    within the 95 % prediction interval of the arm's seeds.
    """
    found = bits(card, precision)
    if seed not in entries:
        return _as_new_seed(name, seed, entries, found, precision, directory)
    old = entries[seed]["card"]
    stated = bits(old, precision)
    tokens = card["training"]["tokens"]
    known = [float(d["difference"]) for d in drift if d["tokens"] == tokens]
    alike, equal = machine(old) == machine(card), abs(found - stated) <= _SAME
    if alike and (equal or not known):
        bound, rule = _SAME, "bit-exact: the same kind of machine"
    elif known:
        bound = _drift_bound(known)
        rule = (
            f"the drift between machines, measured {len(known)} times in runs of {tokens:,} tokens"
        )
        rule += "; not bit-exact, though the machine is of the same kind" if alike else ""
    else:
        judged = _as_new_seed(name, seed, entries, found, precision, directory)
        rule = f"{judged.rule}; no drift has been measured in runs of {tokens:,} tokens, --record writes this one"
        return dataclasses.replace(judged, rule=rule, difference=found - stated)
    expected = Interval(stated, stated - bound, stated + bound)
    passed = abs(found - stated) <= bound
    return Rerun(name, seed, directory, found, expected, rule, passed, found - stated)


def _as_new_seed(name, seed, entries, found, precision, directory) -> Rerun:
    values = [bits(entry["card"], precision) for entry in entries.values()]
    if len(values) < 2:
        expected, rule = Interval(values[0], math.nan, math.nan), "one seed predicts nothing"
        return Rerun(name, seed, directory, found, expected, rule, None)
    expected = paired.prediction(values)
    rule = f"95 % prediction interval of {len(values)} seeds"
    return Rerun(
        name, seed, directory, found, expected, rule, expected.low <= found <= expected.high
    )


def _drift_bound(differences: Sequence[float]) -> float:
    """The 95 % prediction of a difference whose mean is zero."""
    rms = math.sqrt(sum(d * d for d in differences) / len(differences))
    return max(_ROUNDING, float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences))) * rms)


def machine(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a machine's kind is known by."""
    return {key: card["environment"].get(key) for key in _MACHINE}


def drifts(folder: Path | str = baselines.FOLDER) -> list[dict[str, Any]]:
    """Reads the measured drifts; none where there is no file.

    Raises:
      ReportError: the file is damaged.
    """
    path = Path(folder) / baselines.DRIFT
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for entry in found:
            if not math.isfinite(entry["difference"]) or not isinstance(entry["tokens"], int):
                raise ValueError(f"{entry['difference']} after {entry['tokens']} tokens")
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    return found


def record(
    found: Rerun, entries: Mapping[int, Mapping], card: Mapping[str, Any], folder: Path | str
) -> bool:
    """Appends the drift of a re-run on another kind of machine; returns whether it was one.

    Raises:
      ReportError: the re-run diverged.
    """
    old = entries[found.seed]["card"] if found.seed in entries else None
    if old is None or machine(old) == machine(card):
        return False
    if not math.isfinite(found.difference):
        raise ReportError(f"{found.directory}: it diverged, which is no drift; nothing is recorded")
    entry = {
        "name": found.name,
        "seed": found.seed,
        "tokens": card["training"]["tokens"],
        "difference": found.difference,
        "from": machine(old),
        "to": machine(card),
        "card_sha256": card["card_sha256"],
    }
    text = json.dumps([*drifts(folder), entry], indent=1)
    atomic.write_text(Path(folder) / baselines.DRIFT, text + "\n")
    return True
