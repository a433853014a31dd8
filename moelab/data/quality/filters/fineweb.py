"""FineWeb's three rules: lines that end with punctuation, repeated lines, short lines.

Reference: arXiv:2406.17557, section 3.6; datatrove's FineWebQualityFilter, whose default for repeated characters is
0.01 where the paper says 0.1. Here it is always set, to the paper's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moelab.data.quality.profiles import Profile
from moelab.data.quality.rules import RuleFilter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(RuleFilter):
    """Removes documents that break one of the rules."""

    punctuation_ratio: float = 0.12  # fewest lines that end with punctuation
    duplicate_ratio: float = 0.1  # most characters in lines that occurred before
    short_ratio: float = 0.67  # most lines of up to `short_length` characters
    short_length: int = 30  # characters of a short line
    new_line_ratio: float = 0.3  # most line ends per word

    shares = ("punctuation_ratio", "duplicate_ratio", "short_ratio", "new_line_ratio")
    rule = "FineWebQualityFilter"

    def options(self, domain: Profile) -> dict[str, Any]:
        """Returns datatrove's arguments; they are the same for all domains."""
        del domain
        return {
            "line_punct_thr": self.punctuation_ratio,
            "char_duplicates_ratio": self.duplicate_ratio,
            "short_line_thr": self.short_ratio,
            "short_line_length": self.short_length,
            "new_line_ratio": self.new_line_ratio,
        }
