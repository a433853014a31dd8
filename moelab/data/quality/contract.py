"""What an injector and a filter are: frozen dataclasses whose fields a config sets, found by their file's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from moelab.data.document import Document

if TYPE_CHECKING:
    from moelab.data.quality.pool import Pool

CLEAN = "clean"


class Label(NamedTuple):
    """The truth about a training document.

    Attributes:
      kind: "clean", or the injector that made it.
      strength: what was done to it, between 0 and 1; each injector says of what.
      source: where its text comes from: an id, or a wheel's file; empty where it is its own.
    """

    kind: str = CLEAN
    strength: float = 0.0
    source: str = ""


class Labelled(NamedTuple):
    """A training document with the truth about it."""

    document: Document
    label: Label = Label()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseInjector:
    """Makes some of the training documents worse, or adds bad ones. A document is made worse once at most.

    Which ones, and how, is a function of the document's domain and id, the injector's file and `seed`: adding documents
    leaves the others as they were.
    """

    domains: tuple[str, ...] = ()  # where; empty: everywhere
    seed: int = 0  # of what is drawn

    shares: ClassVar[tuple[str, ...]] = ("share",)  # fields between 0 and 1
    counts: ClassVar[tuple[str, ...]] = ()  # fields of at least 1
    copies_clean: ClassVar[bool] = (
        False  # its documents repeat clean ones, which must then stay clean
    )
    in_place: ClassVar[bool] = True  # it changes or moves documents

    @property
    def kind(self) -> str:
        """The file's name: the label of what this makes."""
        return type(self).__module__.rpartition(".")[2]

    def applies(self, domain: str) -> bool:
        """Whether documents of a domain may be touched."""
        return not self.domains or domain in self.domains

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with the fields, beyond `shares`, `counts` and numbers below 0."""
        return iter(())

    def fit(self, pool: Pool, training: Any) -> Any:
        """Learns what `apply` needs to know of all documents.

        Args:
          pool: for its source.
          training: called, gives the Labelled training documents as the earlier injectors left them.
        """
        del pool, training

    def apply(self, one: Labelled, fitted: Any) -> Iterator[Labelled]:
        """Yields what becomes of a clean document: it, made worse or not, and what is added behind it."""
        del fitted
        yield one

    def added(self, fitted: Any) -> Iterator[Labelled]:
        """Yields what is added behind all others."""
        del fitted
        return iter(())


class Verdicts(NamedTuple):
    """What a filter says of N documents.

    Attributes:
      score_N: float32, higher is better; NaN where the filter does not apply.
      kept_N: bool.
      reason_N: object array of str, why a document goes; empty where it stays.
    """

    score_N: np.ndarray
    kept_N: np.ndarray
    reason_N: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseFilter:
    """Scores documents and says which stay. It sees their text, domain and id, and never the truth about them."""

    domains: tuple[
        str, ...
    ] = ()  # whose documents are judged; empty: all that the rule is made for

    shares: ClassVar[tuple[str, ...]] = ()  # fields between 0 and 1
    counts: ClassVar[tuple[str, ...]] = ()  # fields of at least 1
    packages: ClassVar[tuple[str, ...]] = ()  # distributions whose version decides the result

    @property
    def kind(self) -> str:
        """The file's name."""
        return type(self).__module__.rpartition(".")[2]

    def applies(self, domain: str) -> bool:
        """Whether documents of a domain are judged; the others stay, without a score."""
        return not self.domains or domain in self.domains

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with the fields, beyond `shares`, `counts` and numbers below 0."""
        return iter(())

    def identity(self) -> dict[str, Any]:
        """Returns what decides the verdicts beside the text."""
        return dataclasses.asdict(self)

    def judge(self, pool: Pool) -> Verdicts:
        """Judges every document of pool.documents(), in their order."""
        raise NotImplementedError
