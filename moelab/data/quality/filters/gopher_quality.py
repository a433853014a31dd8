"""Gopher's quality rules: length, length of words, symbols, bullet points, ellipses, letters, stop words.

Reference: arXiv:2112.11446, appendix A.1.1; datatrove's GopherQualityFilter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moelab.data.quality.profiles import STOP_WORDS, Profile
from moelab.data.quality.rules import RuleFilter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(RuleFilter):
    """Removes documents that break one of the rules; stop words and the shortest length are the domain's."""

    min_words: int = 0  # shortest document; 0: the domain's own (profiles.py)
    max_words: int = 100_000  # longest document
    min_word_length: float = 3.0  # smallest mean length of the words, in characters
    max_word_length: float = 10.0  # largest mean length of the words, in characters
    symbol_ratio: float = 0.1  # most # or ... per word
    bullet_ratio: float = 0.9  # most lines that begin with a bullet point
    ellipsis_ratio: float = 0.3  # most lines that end with an ellipsis
    letter_ratio: float = 0.8  # fewest words with a letter
    min_stop_words: int = 2  # fewest different stop words

    shares = ("symbol_ratio", "bullet_ratio", "ellipsis_ratio", "letter_ratio")
    rule = "GopherQualityFilter"

    def options(self, domain: Profile) -> dict[str, Any]:
        """Returns datatrove's arguments for a domain."""
        return {
            "min_doc_words": self.min_words or domain.min_words,
            "max_doc_words": self.max_words,
            "min_avg_word_length": self.min_word_length,
            "max_avg_word_length": self.max_word_length,
            "max_symbol_word_ratio": self.symbol_ratio,
            "max_bullet_lines_ratio": self.bullet_ratio,
            "max_ellipsis_lines_ratio": self.ellipsis_ratio,
            "max_non_alpha_words_ratio": self.letter_ratio,
            "min_stop_words": self.min_stop_words,
            "stop_words": list(STOP_WORDS[domain.language]),
        }
