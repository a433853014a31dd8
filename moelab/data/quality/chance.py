"""Chance that depends on names alone: the same document, injector and seed give the same draw everywhere."""

from __future__ import annotations

import hashlib

import numpy as np

from moelab.data.document import Document


def _digest(seed: int, what: str, document: Document) -> bytes:
    return hashlib.sha256(f"{seed}\0{what}\0{document.domain}\0{document.id}".encode()).digest()


def uniform(seed: int, what: str, document: Document) -> float:
    """Returns a number in [0, 1) for a document.

    Args:
      seed: of the injector.
      what: another word gives independent numbers.
      document: its domain and id count, its text does not.
    """
    return int.from_bytes(_digest(seed, what, document)[:6], "big") / 2**48


def generator(seed: int, what: str, document: Document) -> np.random.Generator:
    """Returns a generator for a document; arguments as in `uniform`."""
    return np.random.default_rng(int.from_bytes(_digest(seed, what, document)[6:22], "big"))
