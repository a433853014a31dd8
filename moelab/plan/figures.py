"""A number with where it comes from: no constant of the planner is without a source and a date."""

from __future__ import annotations

import dataclasses
import re

# How well a figure is known. Of memory: to be checked before it is cited, and printed with the word "unverified".
STATUSES = ("vendor", "measured", "third party", "computed", "assumed", "unverified")
_DATE = re.compile(r"\d{4}(-\d{2}(-\d{2})?)?")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where figures come from.

    Attributes:
      text: what to look up: a file, a page, a paper.
      date: of the source, or of the day it was read: YYYY, YYYY-MM or YYYY-MM-DD.
      status: one of STATUSES.
    """

    text: str
    date: str
    status: str = "vendor"

    def __post_init__(self):
        if not self.text.strip() or not _DATE.fullmatch(self.date) or self.status not in STATUSES:
            raise ValueError(f"a source wants a text, a date and one of {STATUSES}; got {self}")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One constant.

    Attributes:
      value: in the unit.
      unit: "FLOP/s", "B/s", "B", "W", "GPUs", "$/GPU-hour", "tokens/s/GPU" ...
      source: where it comes from.
      others: contradictory values that are in circulation: (value in the same unit, who says it and why it differs).
    """

    value: float
    unit: str
    source: Source
    others: tuple[tuple[float, str], ...] = ()

    @property
    def unverified(self) -> bool:
        """Whether it may be printed only with the word."""
        return self.source.status == "unverified"

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        word = " (unverified)" if self.unverified else ""
        return f"{scaled(self.value, self.unit)}{word}"


_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def scaled(value: float, unit: str) -> str:
    """Writes a number with its unit and a prefix that leaves few digits.

    >>> scaled(1.979e15, "FLOP/s"), scaled(8e10, "B"), scaled(700, "W"), scaled(2.35, "$/GPU-hour")
    ('1979 TFLOP/s', '80 GB', '700 W', '2.35 $/GPU-hour')
    """
    if unit == "FLOP/s" and value:
        return f"{value / 1e12:.5g} TFLOP/s"
    if unit in ("B", "B/s"):
        for scale, prefix in _SCALES[1:]:
            if abs(value) >= scale:
                return f"{value / scale:.5g} {prefix}{unit}"
    return f"{value:.5g} {unit}"
