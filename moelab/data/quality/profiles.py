"""What the rules of web filters need to know of a domain: its language, and how long its documents are.

The published rules are made for English web pages. Run with their defaults over the five-domain corpus, Gopher's keep
0.2 % of wiki_fr (English stop words) and no code. So each domain has a language and thresholds of its own, and domains
that are no prose are left alone.
"""

from __future__ import annotations

from typing import NamedTuple

# The eight commonest words of each language that carry no meaning; Gopher's own list for English.
STOP_WORDS = {
    "en": ("the", "be", "to", "of", "and", "that", "have", "with"),
    "fr": ("le", "la", "les", "de", "des", "et", "un", "une"),
    "es": ("el", "la", "los", "de", "que", "y", "en", "un"),
    "de": ("der", "die", "das", "und", "in", "von", "zu", "mit"),
}


class Profile(NamedTuple):
    """How the rules treat a domain.

    Attributes:
      language: of STOP_WORDS; empty: no prose, the rules do not apply.
      min_words: Gopher's smallest number of words in a document.
      min_sentences: C4's smallest number of sentences in a document.
    """

    language: str
    min_words: int = 50
    min_sentences: int = 5


# Introductions of articles are short: half of wiki_en has fewer than 5 sentences.
PROFILES = {
    "wiki_en": Profile("en", min_words=20, min_sentences=1),
    "wiki_fr": Profile("fr", min_words=20, min_sentences=1),
    "wiki_es": Profile("es", min_words=20, min_sentences=1),
    "verse": Profile("en"),
    "code": Profile(""),
    "py_reference": Profile("en", min_words=20, min_sentences=1),
    "py_core": Profile(""),
    "py_network": Profile(""),
    "py_desktop": Profile(""),
    "py_tables": Profile(""),
}


def profile(domain: str, language: str) -> Profile:
    """Returns a domain's profile; what is not known here is prose of that language, with published thresholds."""
    return PROFILES.get(domain) or Profile(language)
