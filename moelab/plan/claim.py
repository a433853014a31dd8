"""A claim, where it is tested, and what all tests share."""

from __future__ import annotations

import dataclasses
import datetime

from moelab.errors import UserError
from moelab.plan import attribution, evidence, hardware, published, recipes
from moelab.plan.attribution import Attribution, Way
from moelab.plan.serving import Load
from moelab.plan.work import Layout

VERDICTS = ("supported", "partly", "not supported", "not testable here")


@dataclasses.dataclass(frozen=True)
class Point:
    """Where the claims are tested.

    Attributes:
      model, isl, osl, user: model, prompt, answer, tokens/s/user.
      before, after: system and precision: "h200x8", "fp8".
      software: its date on both sides, the default of `moelab plan`.
    """

    model: str = "deepseek_v3"
    isl: int = 8192
    osl: int = 1024
    user: float = 50.0
    before: tuple[str, str] = ("h200x8", "fp8")
    after: tuple[str, str] = ("b200x8", "nvfp4")
    software: str = "2026-04-01"

    @property
    def years(self) -> float:
        """Of the software after 2026-01-01."""
        day = datetime.date.fromisoformat(self.software)
        return (day - datetime.date(2026, 1, 1)).days / 365.25

    def way(self, system: str, precision: str) -> Way:
        """Makes one side."""
        load = Load(self.isl, self.osl)
        return Way(hardware.system(system), recipes.named(precision), load, self.years)

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.isl} in, {self.osl} out, {self.user:g} tokens/s/user, no speculative decoding, "
            f"software of {self.software}"
        )


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim and what became of it.

    Attributes:
      name, claim, test: short name, the claim, how it is tested.
      evidence: (statement, source) pairs; the planner's own say "modelled".
      verdict: one of VERDICTS.
      because: the rule that gave the verdict, with its numbers.
      bars: (label, value) for a plot, and what they are.
    """

    name: str
    claim: str
    test: str
    evidence: tuple[tuple[str, str], ...]
    verdict: str
    because: str
    bars: tuple[tuple[str, float], ...] = ()
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the claims share: the point, the attributions, the measured pairs and the quality gaps."""

    point: Point
    whole: Attribution
    fp4_alone: Attribution
    equal: Attribution
    pairs: dict[str, evidence.Pairs]
    gaps: tuple[evidence.Gap, ...]


def setting(point: Point) -> Setting:
    """Computes what the claims share.

    Raises:
      UserError: the two sides are the same, --after is not of 4 bits, or there is no such model or system.
    """
    if point.before == point.after:
        raise UserError(f"--before and --after are the same: {':'.join(point.before)}")
    if recipes.named(point.after[1]).bits["experts"] > 5:
        raise UserError(
            f"the claims are about experts in 4 bits: --after wants SYSTEM:nvfp4 or another of 4 bits, got "
            f"{':'.join(point.after)}"
        )
    model = published.find(point.model)
    before, after = point.way(*point.before), point.way(*point.after)
    middle = point.way(point.after[0], point.before[1])
    layout = Layout(min(after.system.count, 8))
    return Setting(
        point,
        attribution.equal_interactivity(model, before, after, point.user),
        attribution.equal_interactivity(model, middle, after, point.user),
        attribution.equal_configuration(model, middle, after, layout, 32),
        evidence.measured_pairs(),
        evidence.quality(),
    )


def published_line(name: str) -> tuple[str, str]:
    """Returns a published figure and its source."""
    figure = evidence.EVIDENCE[name]
    return f"{figure}", f"{figure.source.text}, {figure.source.date} ({figure.source.status})"


def measured_lines(shared: Setting, name: str) -> tuple[tuple[str, str], ...]:
    """Returns measured pairs and their source, or that they are not here."""
    if name not in shared.pairs:
        return (("measured pairs: not here, the extra plan-data is not installed", "-"),)
    return ((f"measured, {shared.pairs[name]}", "aiconfigurator-core 0.12.0, silicon_sample.csv"),)


def gain_words(found: Attribution) -> str:
    """Writes a modelled gain with what it could be by the calibrated values."""
    low, high = found.intervals["gain"]
    return f"{found.gain:.2f}x [{low:.2f}, {high:.2f}]"


def shares_words(found: Attribution) -> str:
    """Writes a gain as the product of its causes."""
    parts = ", ".join(f"{name} {factor:.2f}x" for name, factor in found.factors.items())
    return f"modelled, {found.basis}: {gain_words(found)} = {parts}"
