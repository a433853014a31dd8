"""Words replaced by random letters of the same length: text without any words in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moelab.data.quality import chance
from moelab.data.quality.contract import BaseInjector, Label, Labelled
from moelab.data.quality.inject.token_noise import WORD

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Replaces each word of the chosen documents by random letters with probability `rate`. Strength: `rate`.

    Reference: one of the corruptions of arXiv:2605.19407.
    """

    share: float = 0.25  # of the documents
    rate: float = 1.0  # of their words

    shares = ("share", "rate")

    def apply(self, one: Labelled, fitted) -> Iterator[Labelled]:
        """Yields the document with words replaced."""
        document = one.document
        if not document.text.split() or (
            chance.uniform(self.seed, self.kind, document) >= self.share
        ):
            yield one
            return
        generator = chance.generator(self.seed, self.kind, document)

        def other(match) -> str:
            if generator.random() >= self.rate:
                return match.group()
            drawn = generator.integers(0, len(LETTERS), len(match.group()))
            return "".join(LETTERS[i] for i in drawn.tolist())

        yield Labelled(
            document._replace(text=WORD.sub(other, document.text)), Label(self.kind, self.rate)
        )
