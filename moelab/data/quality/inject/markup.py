"""Text with the markup of a page around it, as a careless extraction leaves it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from moelab.data.quality import chance
from moelab.data.quality.contract import BaseInjector, Label, Labelled

LINES = re.compile(r"\n+")
SENTENCE = re.compile(r"(?<=[.!?]) ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Wraps lines and sentences of the chosen documents in HTML. Strength: the markup's share of the characters."""

    share: float = 0.1  # of the documents

    def apply(self, one: Labelled, fitted) -> Iterator[Labelled]:
        """Yields the document in its markup."""
        document = one.document
        if not document.text or chance.uniform(self.seed, self.kind, document) >= self.share:
            yield one
            return
        generator = chance.generator(self.seed, self.kind, document)
        number = int(generator.integers(1, 1_000_000))
        parts = [f'<div id="content-{number}" class="mw-body post-content">']
        for line in filter(None, LINES.split(document.text)):
            sentences = SENTENCE.sub("</span>&nbsp;<span>", line)
            parts.append(f'<p class="p{int(generator.integers(9))}"><span>{sentences}</span></p>')
        parts.append('</div><br /><a href="#top" onclick="return false;">&uarr;</a>')
        text = "".join(parts)
        strength = 1 - len(document.text) / len(text)
        yield Labelled(document._replace(text=text), Label(self.kind, strength))
