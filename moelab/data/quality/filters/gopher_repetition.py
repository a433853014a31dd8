"""Gopher's repetition rules: lines, paragraphs and runs of 2 to 10 words that occur again within a document.

Reference: arXiv:2112.11446, table A1; datatrove's GopherRepetitionFilter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moelab.data.quality.profiles import Profile
from moelab.data.quality.rules import RuleFilter

_TOP = ((2, 0.20), (3, 0.18), (4, 0.16))
_REPEATED = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(RuleFilter):
    """Removes documents in which more is repeated than the published shares, times `scale`."""

    scale: float = 1.0  # above 1: more repetition is allowed

    counts = ()
    rule = "GopherRepetitionFilter"

    def problems(self):
        """Yields what is wrong with `scale`."""
        yield from super().problems()
        if self.scale <= 0:
            yield f"scale must be above 0, got {self.scale:g}"

    def options(self, domain: Profile) -> dict[str, Any]:
        """Returns datatrove's arguments; they are the same for all domains."""
        del domain
        return {
            "dup_line_frac": 0.3 * self.scale,
            "dup_para_frac": 0.3 * self.scale,
            "dup_line_char_frac": 0.2 * self.scale,
            "dup_para_char_frac": 0.2 * self.scale,
            "top_n_grams": tuple((n, share * self.scale) for n, share in _TOP),
            "dup_n_grams": tuple((n, share * self.scale) for n, share in _REPEATED),
        }
