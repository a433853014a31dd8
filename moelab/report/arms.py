"""Arms of an ablation: runs that differ in nothing but their seed, and what their paired seeds say about them.

S seeds, A arms.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moelab import schema, spelling
from moelab.report import formatting as fmt
from moelab.report import paired, statistics, two_levels
from moelab.report.documents import ALL
from moelab.report.runs import REFERENCE, ReportError, Run, check_comparable

VALIDATION = "the validation split"  # in place of a precision: as trained, for tuning


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs of one config under several seeds.

    Attributes:
      name: for readers; unique.
      runs: by seed.
    """

    name: str
    runs: Mapping[int, Run]

    @property
    def first(self) -> Run:
        """The run of the lowest seed: what is the same for all of them is read from it."""
        return self.runs[min(self.runs)]

    @property
    def apart(self) -> str:
        """Why the arm is not ranked with others; empty where it may be."""
        card = self.first.card
        return str(card.get("bound") or card.get("leak") or "")

    def bits(self, precision: str) -> dict[int, float]:
        """Returns bits per byte over all domains by seed; of the last look at the validation split for VALIDATION.

        Raises:
          ReportError: a run was not evaluated in this precision.
        """
        read = (
            _validated if precision == VALIDATION else functools.partial(_bits, precision=precision)
        )
        return {seed: read(run) for seed, run in sorted(self.runs.items())}

    def mean(self, *path: str) -> float | None:
        """Averages a number of the cards over the seeds; None where a card lacks it."""
        values = []
        for run in self.runs.values():
            value: Any = run.card
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            values.append(fmt.number(value))
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None


def _validated(run: Run) -> float:
    records = [r for r in run.records("evaluation") if r.get("split") == "validation"]
    value = fmt.number((records[-1].get("bits_per_byte") or {}).get(ALL)) if records else None
    if value is None:
        raise ReportError(
            f"{run.directory} never looked at the validation split: set evaluation.every, as to train.num_steps"
        )
    return value


def _bits(run: Run, precision: str) -> float:
    row = next((row for row in run.rows if row["precision"] == precision), None)
    value = fmt.number(row["bits_per_byte"].get(ALL)) if row else None
    if value is None:
        there = [row["precision"] for row in run.rows]
        guess = spelling.hint(precision, there, "--precision=") or f"; it has {', '.join(there)}"
        raise ReportError(f"{run.directory} has no bits per byte in {precision!r}{guess}")
    return value


def group(runs: Sequence[Run]) -> list[Arm]:
    """Puts runs that differ in their seed alone into one arm, in order of first appearance.

    Raises:
      ReportError: one seed twice in an arm.
    """
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        by_config.setdefault(_key(run), []).append(run)
    names = _names(list(by_config.values()))
    arms = []
    for name, members in zip(names, by_config.values(), strict=True):
        seeds: dict[int, Run] = {}
        for run in members:
            seed = run.card["seeds"].get("seed")
            if seed in seeds:
                raise ReportError(
                    f"{seeds[seed].directory} and {run.directory} are one config with one seed, {seed}: name one"
                )
            seeds[seed] = run
        arms.append(Arm(name, seeds))
    return arms


def several(runs: Sequence[Run]) -> bool:
    """Says whether there are several arms of which one has several seeds."""
    seeds: dict[str, set] = {}
    for run in runs:
        seeds.setdefault(_key(run), set()).add(run.card["seeds"].get("seed"))
    return len(seeds) > 1 and any(len(found) > 1 for found in seeds.values())


def _key(run: Run) -> str:
    config = {k: v for k, v in run.card["config"].items() if k not in (*schema.UNHASHED, "seed")}
    return json.dumps(config, sort_keys=True)


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names arms by their points in a sweep, else by their cards, else by what their configs differ in."""
    labels = [re.sub(r"-?\bseed=\d+", "", runs[0].label).strip("-") for runs in groups]
    cards = [str(runs[0].card["name"]) for runs in groups]
    chosen = [label or card for label, card in zip(labels, cards, strict=True)]
    if len(set(chosen)) == len(chosen):
        return chosen
    differing = _differing([runs[0].card["config"] for runs in groups])
    told = [f"{name} {text}".strip() for name, text in zip(chosen, differing, strict=True)]
    if len(set(told)) == len(told):
        return told
    return [f"{name} ({i})" for i, name in enumerate(chosen, 1)]


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Returns a nested config by dotted path."""
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{path}.{key}" if path else str(key))
    return flat


def _differing(configs: Sequence[Mapping]) -> list[str]:
    flat = [flatten(config) for config in configs]
    paths = [p for p in dict.fromkeys(k for c in flat for k in c) if p != "seed"]
    paths = [p for p in paths if len({str(c.get(p)) for c in flat}) > 1][:3]
    return [" ".join(f"{p.rpartition('.')[2]}={c.get(p)}" for p in paths) for c in flat]


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm against the reference over the seeds that both have, in bits per byte.

    Attributes:
      pairs: (reference, arm) by seed.
      mean, low, high: of the differences, paired t over seeds; of a single pair, over its documents; NaN where a run
        of the arm or a reference of a pair has no finite number, which leaves no test either.
      over: what the interval is over: seeds, documents, or nothing.
      both: the interval where seeds and documents vary; None without two pairs and their documents.
      t: p of the paired t test; NaN for a single pair.
      holm: t's, corrected for the number of arms in the table.
      sign_flip: the exact test.
      detectable: smallest mean difference found with power 0.8, given the spread seen.
      correlation: of the two arms over seeds.
    """

    pairs: Mapping[int, tuple[float, float]]
    mean: float
    low: float
    high: float
    over: str
    both: two_levels.TwoLevels | None = None
    t: float = math.nan
    holm: float = math.nan
    sign_flip: paired.SignFlip | None = None
    detectable: float | None = None
    correlation: statistics.Interval | None = None

    @property
    def n(self) -> int:
        """The number of pairs."""
        return len(self.pairs)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms against one of them.

    Attributes:
      arms: ranked ones by their mean difference, those that diverged last, then those that are not ranked.
      reference: the arm that the others are compared with.
      precision: of the evaluation that is compared.
      differences: by arm name; the reference has none, nor has an arm that shares no seed with it.
      diverged: how many runs of an arm have no finite number, by arm name; only of arms that have such runs.
    """

    arms: tuple[Arm, ...]
    reference: Arm
    precision: str
    differences: Mapping[str, Difference]
    diverged: Mapping[str, int] = dataclasses.field(default_factory=dict)


def compare(
    arms: Sequence[Arm],
    reference: str = "",
    precision: str = REFERENCE,
    *,
    different_tokens: bool = False,
) -> Comparison:
    """Compares every arm with the reference over the seeds that both have.

    Args:
      arms: from `group`.
      reference: an arm's name; empty: the first.
      precision: of the evaluation.
      different_tokens: allow arms that trained on different numbers of tokens.

    Raises:
      ReportError: no arms, no such arm or precision, or runs that do not compare.
    """
    if not arms:
        raise ReportError("a comparison wants at least one run")
    check_comparable([r for a in arms for r in a.runs.values()], different_tokens=different_tokens)
    by_name = {arm.name: arm for arm in arms}
    if reference and reference not in by_name:
        there = f"; there are {', '.join(by_name)}"
        guess = spelling.hint(reference, by_name, "--reference=") or there
        raise ReportError(f"no arm {reference!r}{guess}")
    base = by_name[reference] if reference else arms[0]
    found = {
        arm.name: difference
        for arm in arms
        if arm is not base and (difference := _difference(base, arm, precision)) is not None
    }
    ranked = [a.name for a in arms if a.name in found and not a.apart]  # bounds are no hypotheses
    corrected = paired.holm([found[name].t for name in ranked])
    for name, p in zip(ranked, corrected, strict=True):
        found[name] = dataclasses.replace(found[name], holm=p)

    bits = {arm.name: list(arm.bits(precision).values()) for arm in arms}
    lost = {name: np.count_nonzero(~np.isfinite(values)) for name, values in bits.items()}
    diverged = {name: int(count) for name, count in lost.items() if count}

    def place(arm: Arm) -> tuple:
        mean = 0.0 if arm is base else found[arm.name].mean if arm.name in found else math.inf
        own = math.inf if arm.name in diverged else float(np.mean(bits[arm.name]))
        known = mean if math.isfinite(mean) else math.inf
        return bool(arm.apart), arm.name in diverged, known, own

    return Comparison(tuple(sorted(arms, key=place)), base, precision, found, diverged)


def _difference(base: Arm, arm: Arm, precision: str) -> Difference | None:
    ours, theirs = arm.bits(precision), base.bits(precision)
    pairs = {seed: (theirs[seed], ours[seed]) for seed in ours if seed in theirs}
    if not pairs:
        return None
    tables = [(base.runs[s].documents, arm.runs[s].documents) for s in pairs]
    known = all(t is not None and precision in t.nats for pair in tables for t in pair)
    a, b = zip(*pairs.values(), strict=True)
    if not np.isfinite([*ours.values(), *a]).all():
        return Difference(pairs, math.nan, math.nan, math.nan, "nothing")
    if len(pairs) == 1:
        mean = b[0] - a[0]
        if not known:
            return Difference(pairs, mean, math.nan, math.nan, "nothing")
        interval = statistics.bits_per_byte_between(*tables[0], precision)
        return Difference(pairs, mean, interval.low, interval.high, "documents")
    t = statistics.paired_t(a, b)
    spread = float(np.std(np.subtract(b, a), ddof=1))
    return Difference(
        pairs,
        t.mean,
        t.low,
        t.high,
        "seeds",
        both=two_levels.between_arms(tables, precision) if known else None,
        t=t.p,
        sign_flip=paired.sign_flip(a, b),
        detectable=paired.detectable(spread, len(pairs)),
        correlation=paired.correlation(a, b),
    )
