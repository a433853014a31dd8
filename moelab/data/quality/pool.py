"""The training documents with their dirt in, as a stream that can be read again, and the clean ones to learn from.

A corpus of more than MEMORY characters is not kept: every pass reads the source anew and makes the same dirt again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from moelab.data.document import Document
from moelab.data.quality import workers
from moelab.data.quality.contract import CLEAN, Labelled
from moelab.data.split import split_of

MEMORY = 200_000_000  # characters up to which the text is kept between passes

Progress = Callable[[str, int, int], None]


class Pool:
    """What injectors and filters see of the data.

    Attributes:
      source: as sources.open_source made it.
      injectors: in the order in which they apply.
      tokenizer: the dataset's, trained on the clean training split.
      progress: called with (what is done, documents so far, documents in all or 0).
      alive_N: bool, the training documents that no filter has removed; None: all.
    """

    def __init__(
        self, source, injectors: Sequence[Any], tokenizer, progress: Progress | None = None
    ):
        self.source, self.tokenizer = source, tokenizer
        self.alive_N: np.ndarray | None = None
        self.injectors = tuple(injectors)
        self.progress = progress or (lambda text, done, total: None)
        self._fitted: list[Any] = []
        self._remembered: tuple[int, list[Labelled]] | None = None
        for number, injector in enumerate(self.injectors):
            self.progress(f"injecting {injector.kind}", 0, 0)
            self._fitted.append(injector.fit(self, lambda number=number: self._training(number)))

    def training(self) -> Iterator[Labelled]:
        """Yields every training document, dirt included, with the truth about it."""
        return self._training(len(self.injectors))

    def _training(self, count: int) -> Iterator[Labelled]:
        """Yields the training documents as the first `count` injectors leave them."""
        done, stream = 0, iter(())
        if self._remembered and self._remembered[0] <= count:
            done, documents = self._remembered
            stream = iter(documents)
        else:
            stream = (
                Labelled(document)
                for document in self.source.documents()
                if document.text and split_of(document.domain, document.id) == "train"
            )
        for injector, fitted in zip(self.injectors[done:count], self._fitted[done:], strict=False):
            stream = _injected(stream, injector, fitted)
        return stream if self._remembered and done == count else self._remember(count, stream)

    def _remember(self, count: int, stream: Iterator[Labelled]) -> Iterator[Labelled]:
        """Keeps a small corpus in memory, once a pass over it is complete."""
        found: list[Labelled] = []
        size = 0
        for one in stream:
            size += len(one.document.text)
            if size < MEMORY:
                found.append(one)
            yield one
        if size < MEMORY:
            self._remembered = (count, found)

    def documents(self) -> Iterator[Document]:
        """Yields the training documents that are left, without the truth about them."""
        for number, one in enumerate(self.training()):
            if self.alive_N is None or self.alive_N[number]:
                yield one.document

    @functools.cached_property
    def _outline(self) -> tuple[np.ndarray, np.ndarray]:
        rows = [(one.document.domain, len(one.document.text.encode())) for one in self.training()]
        domains, sizes = zip(*rows, strict=True) if rows else ((), ())
        return np.array(domains, object), np.array(sizes, np.int64)

    def outline(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the domain and the UTF-8 bytes of each of `documents()`, without reading them again."""
        domain_N, size_N = self._outline
        alive_N = slice(None) if self.alive_N is None else self.alive_N
        return domain_N[alive_N], size_N[alive_N]

    def validation(self) -> Iterator[Document]:
        """Yields the documents of the validation split: clean text, which no model is trained on."""
        for document in self.source.documents():
            if document.text and split_of(document.domain, document.id) == "validation":
                yield document

    def everything(self, kept_N: np.ndarray) -> Iterator[tuple[Document, str]]:
        """Yields (document, split): the evaluation splits as they are, and the training documents that are kept."""
        for document in self.source.documents():
            name = split_of(document.domain, document.id)
            if name != "train" or not document.text:
                yield document, name
        for one, kept in zip(self.training(), kept_N, strict=True):
            if kept:
                yield one.document, "train"

    def map(
        self,
        function: Callable[[list[Document]], Any],
        what: str,
        documents: Iterable[Document] | None = None,
    ) -> Iterator[Any]:
        """Yields function(list of documents) for consecutive documents, computed in several processes.

        Args:
          function: picklable; returns something of the list's length.
          what: for the progress display.
          documents: by default self.documents().
        """
        total = 0 if self.alive_N is None or documents is not None else int(self.alive_N.sum())
        done = 0
        stream = self.documents() if documents is None else documents
        for result in workers.map_chunks(function, stream):
            done += len(result)
            self.progress(what, done, total)
            yield result


def _injected(stream: Iterable[Labelled], injector, fitted) -> Iterator[Labelled]:
    for one in stream:
        if one.label.kind == CLEAN and injector.applies(one.document.domain):
            for result in injector.apply(one, fitted):
                # Chance may leave a short text as it was; then it is clean.
                yield one if result.document == one.document else result
        else:
            yield one
    yield from injector.added(fitted)
