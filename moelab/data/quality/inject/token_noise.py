"""Words replaced by words drawn from how often each occurs: the text keeps its words' frequencies and loses its sense.

Only a tool that looks at order sees this; to a bag of words or of few-word pieces it is ordinary text.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from moelab.data.quality import chance
from moelab.data.quality.contract import BaseInjector, Label, Labelled

WORD = re.compile(r"\S+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Replaces each word of the chosen documents with probability `rate`. Strength: `rate`."""

    share: float = 0.25  # of the documents
    rate: float = 0.15  # of their words
    vocabulary: str = "domain"  # words are drawn from those of the domain, or of the document

    shares = ("share", "rate")

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with `vocabulary`."""
        if self.vocabulary not in ("domain", "document"):
            yield f"vocabulary must be domain or document, got {self.vocabulary!r}"

    def fit(self, pool, training):
        """Counts the words of each domain: {domain: (words, cumulative share)}."""
        counts = collections.defaultdict(collections.Counter)
        if self.vocabulary == "domain":
            for one in training():
                if self.applies(one.document.domain):
                    counts[one.document.domain].update(one.document.text.split())
        return {domain: _cumulative(count) for domain, count in counts.items()}

    def apply(self, one: Labelled, fitted) -> Iterator[Labelled]:
        """Yields the document with words replaced."""
        document = one.document
        found = list(WORD.finditer(document.text))
        if not found or chance.uniform(self.seed, self.kind, document) >= self.share:
            yield one
            return
        generator = chance.generator(self.seed, self.kind, document)
        replaced_W = generator.random(len(found)) < self.rate
        own = [match.group() for match in found]
        words, cumulative = fitted.get(document.domain) or _cumulative(collections.Counter(own))
        drawn_W = np.searchsorted(cumulative, generator.random(len(found)), side="right")
        parts, end = [], 0
        for match, replace, drawn in zip(found, replaced_W.tolist(), drawn_W.tolist(), strict=True):
            parts.append(document.text[end : match.start()])
            parts.append(words[min(drawn, len(words) - 1)] if replace else match.group())
            end = match.end()
        parts.append(document.text[end:])
        yield Labelled(document._replace(text="".join(parts)), Label(self.kind, self.rate))


def _cumulative(count: collections.Counter) -> tuple[list[str], np.ndarray]:
    """Lists the words in the order of their spelling, with the share of all up to each."""
    words = sorted(count)
    total = np.cumsum([count[word] for word in words], dtype=np.float64)
    return words, total / total[-1]
