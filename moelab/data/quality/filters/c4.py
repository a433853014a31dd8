"""C4's rules: lines that end like sentences, enough of them, and no curly bracket, javascript, lorem ipsum or cookies.

Reference: arXiv:1910.10683, section 2.2; datatrove's C4QualityFilter. Without the list of bad words, which is fetched
from the network. C4 edits documents; here a document stays whole or goes, and its score says how much of it C4 would
have kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moelab.data.quality.profiles import Profile
from moelab.data.quality.rules import RuleFilter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(RuleFilter):
    """Removes documents without enough good lines. Score: the share of the characters in good lines."""

    min_sentences: int = 0  # fewest sentences in good lines; 0: the domain's own (profiles.py)
    min_words_per_line: int = 3  # of a good line
    end_punctuation: bool = True  # a good line ends with . ! ? or a quote; FineWeb leaves this out

    rule = "C4QualityFilter"

    def options(self, domain: Profile) -> dict[str, Any]:
        """Returns datatrove's arguments for a domain."""
        return {
            "min_num_sentences": self.min_sentences or domain.min_sentences,
            "min_words_per_line": self.min_words_per_line,
            "filter_no_terminal_punct": self.end_punctuation,
        }

    def score(self, text: str, changed: str, kept: bool) -> float:
        """Scores a document by what C4 would leave of it; 0 if nothing."""
        return min(1.0, len(changed) / len(text)) if kept else 0.0
