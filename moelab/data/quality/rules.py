"""The rule filters of `datatrove`, with words and sentences cut by regular expressions.

datatrove would use spaCy: with these expressions the rules take a tenth of the time, and need no more packages.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from moelab.data.document import DataError, Document
from moelab.data.quality.contract import BaseFilter, Verdicts
from moelab.data.quality.profiles import STOP_WORDS, Profile, profile

_WORD = re.compile(r"\w+['’]?|[^\w\s]")  # l' and d' stay whole, as spaCy has them
_SENTENCE = re.compile(r"(?<=[.!?])[\"'”»)\]]*\s+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleFilter(BaseFilter):
    """A class of datatrove, applied to the domains that are prose, each with the thresholds of its profile."""

    language: str = "en"  # of domains that profiles.py does not know: en, fr, es or de

    packages = ("datatrove",)
    rule: ClassVar[str] = ""  # datatrove's class

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with `language`."""
        if self.language not in STOP_WORDS:
            yield f"language must be one of {', '.join(STOP_WORDS)}, got {self.language!r}"

    def applies(self, domain: str) -> bool:
        """Whether a domain is asked for by name, or is prose."""
        if self.domains:
            return super().applies(domain)
        return bool(profile(domain, self.language).language)

    def options(self, domain: Profile) -> dict[str, Any]:
        """Returns the arguments of datatrove's class for a domain."""
        raise NotImplementedError

    def score(self, text: str, changed: str, kept: bool) -> float:
        """Scores a document: 1 if all rules hold, else 0.

        Args:
          text: of the document.
          changed: what the rule would leave of it, if it edits.
          kept: whether the rules hold.
        """
        del text, changed
        return float(kept)

    def judge(self, pool) -> Verdicts:
        """Applies the rules, in several processes."""
        try:
            importlib.import_module("datatrove.pipeline.filters")
        except ImportError as error:
            raise DataError(
                f"data.filter: {self.kind} needs datatrove ({error}): pip install 'moelab[data]'"
            ) from error
        rows = [
            row for part in pool.map(functools.partial(_judge, self), self.kind) for row in part
        ]
        score, kept, reason = zip(*rows, strict=True)
        return Verdicts(np.array(score, np.float32), np.array(kept, bool), np.array(reason, object))


def _judge(tool: RuleFilter, documents: list[Document]) -> list[tuple[float, bool, str]]:
    """Judges a chunk; runs in a worker."""
    from datatrove.data import Document as TroveDocument

    rows = []
    for document in documents:
        if not tool.applies(document.domain):
            rows.append((np.nan, True, ""))
            continue
        domain = profile(document.domain, tool.language)
        rule = _rule(tool, domain._replace(language=domain.language or tool.language))
        trove = TroveDocument(text=document.text, id=document.id)
        if not document.text.split():
            kept, reason = False, "empty"
        else:
            result = rule.filter(trove)
            kept, reason = result if isinstance(result, tuple) else (result, "")
        rows.append((tool.score(document.text, trove.text, kept), bool(kept), reason))
    return rows


@functools.lru_cache(maxsize=64)
def _rule(tool: RuleFilter, domain: Profile):
    filters = importlib.import_module("datatrove.pipeline.filters")
    return getattr(filters, tool.rule)(language=_words(), **tool.options(domain))


@functools.cache
def _words():
    """Makes the tokenizer; the class is datatrove's, so it is not there before datatrove is."""
    from datatrove.utils import word_tokenizers

    class RegexTokenizer(word_tokenizers.WordTokenizer):
        """Words are runs of letters and digits; other characters stand alone, as in spaCy."""

        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [part for part in _SENTENCE.split(text) if part.strip()]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [match.end() for match in _SENTENCE.finditer(text)]
            if not ends or ends[-1] < len(text):
                ends.append(len(text))
            return list(zip([0, *ends[:-1]], ends, strict=True))

    return RegexTokenizer()
