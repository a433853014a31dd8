"""Documents that occur many times: a share of the text is made of few documents, repeated.

With T bytes of text, b of them in the documents that are repeated, and R copies of each,
share = R b / (R b + T - b), so that b = share T / (R (1 - share) + share).

The text becomes (R b + T - b) / T = R / (R (1 - share) + share) times as long: R times where share is 1, and less than
1 / (1 - share) times otherwise, however many copies there are.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from moelab.data.quality import chance
from moelab.data.quality.contract import CLEAN, BaseInjector, Label, Labelled

MOST_COPIES = 1_000_000
MOST_GROWTH = (
    100  # times as long as the text becomes; more is a slip of the pen, and would fill the memory
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Repeats documents until they are `share` of each domain's bytes. Strength: `share`.

    Of the `copies`, the first keeps its label, since one of them is wanted; the others are labelled.

    Reference: "Scaling Laws and Interpretability of Learning from Repeated Data", arXiv:2205.10487.
    """

    share: float = 0.1  # of the resulting bytes of each domain
    copies: int = 16  # how often each of the repeated documents occurs

    counts = ("copies",)
    copies_clean, in_place = True, False

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with `copies`, and with `share` for as many."""
        growth = self.copies / (self.copies * (1 - self.share) + self.share)
        if self.copies > MOST_COPIES:
            yield f"copies must be at most {MOST_COPIES:,}, got {self.copies:,}"
        elif growth > MOST_GROWTH:
            yield (
                f"share={self.share:g} with copies={self.copies} makes the text {growth:,.0f} times as long, "
                f"at most {MOST_GROWTH} times are wanted: fewer copies or a smaller share"
            )

    def fit(self, pool, training):
        """Chooses documents in the order of their draw: the set of (domain, id) to repeat."""
        drawn = collections.defaultdict(list)
        total = collections.Counter()
        for document, label in training():
            size = len(document.text.encode())
            total[document.domain] += size
            if label.kind == CLEAN and self.applies(document.domain):
                draw = chance.uniform(self.seed, self.kind, document)
                drawn[document.domain].append((draw, document.id, size))
        chosen = set()
        for domain, found in drawn.items():
            rest = self.share * total[domain] / (self.copies * (1 - self.share) + self.share)
            for _, document_id, size in sorted(found):
                if (
                    size <= rest
                ):  # what is too large is passed over, so that the share is met closely
                    rest -= size
                    chosen.add((domain, document_id))
        return chosen

    def apply(self, one: Labelled, fitted) -> Iterator[Labelled]:
        """Yields the document, and its copies behind it."""
        yield one
        document = one.document
        if (document.domain, document.id) in fitted:
            label = Label(self.kind, self.share, document.id)
            for number in range(1, self.copies):
                yield Labelled(document._replace(id=f"{document.id}#copy{number}"), label)
