"""What every source yields, and the error that a user of the data sees."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moelab.errors import UserError


class DataError(UserError):
    """The data is not as wanted; the message tells the user what came and what was wanted."""


class Document(NamedTuple):
    """A text with its place in the corpus.

    Attributes:
      domain: label of the text's kind; routing and results are broken down by it.
      id: unique within the domain; decides the split (split.py) and names the document in results.
      text: what is tokenized, unchanged.
    """

    domain: str
    id: str
    text: str


class TokenDocument(NamedTuple):
    """A document that came as tokens.

    Attributes:
      domain: as in Document.
      id: as in Document.
      token_T: integers, without the end token.
      num_bytes: UTF-8 bytes of the text; 0 where no tokenizer is at hand to tell.
    """

    domain: str
    id: str
    token_T: np.ndarray
    num_bytes: int
