"""Documents under the label of another language: what a language filter lets through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moelab.data.document import DataError
from moelab.data.quality import chance
from moelab.data.quality.contract import BaseInjector, Label, Labelled
from moelab.data.quality.profiles import profile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Moves the chosen documents to a domain of another language. Strength: 1; source: where it was, and its id.

    Nothing is copied: the text is in the data once, in the wrong place. `domains` are those that documents leave.
    """

    share: float = 0.05  # of the documents
    language: str = "en"  # of domains that profiles.py does not know

    def fit(self, pool, training):
        """Finds {domain: the domains of another language}, as they follow it in the data's order."""
        names = list(dict.fromkeys(one.document.domain for one in training()))
        spoken = {name: profile(name, self.language).language for name in names}
        leaves = [name for name in names if spoken[name] and self.applies(name)]
        goals = {
            name: [other for other in names if spoken[other] not in ("", spoken[name])]
            for name in leaves
        }
        if not any(goals.values()):
            raise DataError(
                "data.inject: wrong_language wants domains of two languages; the data has "
                + ", ".join(f"{name} ({spoken[name] or 'no prose'})" for name in names)
            )
        return goals

    def apply(self, one: Labelled, fitted) -> Iterator[Labelled]:
        """Yields the document, in its own domain or in another's."""
        document = one.document
        goals = fitted.get(document.domain)
        if not goals or chance.uniform(self.seed, self.kind, document) >= self.share:
            yield one
            return
        drawn = int(chance.generator(self.seed, self.kind, document).integers(len(goals)))
        source = f"{document.domain}/{document.id}"
        moved = document._replace(domain=goals[drawn], id=f"{source}#moved")
        yield Labelled(moved, Label(self.kind, 1.0, source))
