"""The words of a document in another order: every word and every blank stays, the sentences go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from moelab.data.quality import chance
from moelab.data.quality.contract import BaseInjector, Label, Labelled
from moelab.data.quality.inject.token_noise import WORD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Shuffles the words of the chosen documents, within stretches of `span` words. Strength: 1.

    Reference: one of the corruptions of arXiv:2605.19407.
    """

    share: float = 0.25  # of the documents
    span: int = 0  # words among which order is lost; 0: the whole document

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with `span`."""
        if self.span == 1:
            yield f"span must be 0 or at least 2, got {self.span}"

    def apply(self, one: Labelled, fitted) -> Iterator[Labelled]:
        """Yields the document with its words shuffled; the blanks between them stay where they are."""
        document = one.document
        found = list(WORD.finditer(document.text))
        if len(found) < 2 or chance.uniform(self.seed, self.kind, document) >= self.share:
            yield one
            return
        order_W = chance.generator(self.seed, self.kind, document).random(len(found))
        stretch_W = np.arange(len(found)) // (self.span or len(found))
        words = [found[i].group() for i in np.lexsort((order_W, stretch_W)).tolist()]
        parts, end = [], 0
        for match, word in zip(found, words, strict=True):
            parts += [document.text[end : match.start()], word]
            end = match.end()
        parts.append(document.text[end:])
        yield Labelled(document._replace(text="".join(parts)), Label(self.kind, 1.0))
