"""Documents that come a second time with some words missing, as mirrored and edited pages do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moelab.data.quality import chance
from moelab.data.quality.contract import BaseInjector, Label, Labelled
from moelab.data.quality.inject.token_noise import WORD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Adds a copy of the chosen documents in which each word is missing with probability `rate`. Strength: `rate`.

    A copy that misses 5 % of its words shares about 0.95^5 / (2 - 0.95^5) = 63 % of the 5-word pieces with its original
    (Jaccard): a tool that looks for 70 % does not see most of them.
    """

    share: float = 0.1  # of the documents
    rate: float = 0.02  # of the words that a copy misses

    shares = ("share", "rate")
    copies_clean, in_place = True, False

    def apply(self, one: Labelled, fitted) -> Iterator[Labelled]:
        """Yields the document, and its copy behind it."""
        yield one
        document = one.document
        if chance.uniform(self.seed, self.kind, document) >= self.share:
            return
        generator = chance.generator(self.seed, self.kind, document)
        text = WORD.sub(
            lambda match: "" if generator.random() < self.rate else match.group(), document.text
        )
        copy = document._replace(id=f"{document.id}#near", text=text)
        yield Labelled(copy, Label(self.kind, self.rate, document.id))
