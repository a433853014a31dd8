"""Nats per token where the last two tokens stood next to each other before in the window, and where they did not.

Most of the gap between attention and cheaper layers lies in tokens that the context announces (arXiv:2312.04927): a
language model's loss on held-out text is divided by whether (previous token, token) occurred earlier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moelab import task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Held-out text, token by token.

    Attributes:
      documents: of each domain, in the order of their hash, cut at the length that the model was trained on.
      split: whose documents.
    """

    documents: int = 30
    split: str = "test"

    def ask(self, dataset, length: int) -> task.Asked:
        """Takes the beginnings of documents."""
        part, spans = dataset.split(self.split), []
        for index in range(len(dataset.domains)):
            for i in part.by_hash(index)[: self.documents].tolist():
                spans.append(task.Span(part.document(i)[:length].astype(np.int32), index))
        if not spans:
            raise task.TaskError(f"seen_bigrams wants documents; the {self.split} split is empty")
        return task.Asked(spans, math.log(dataset.tokenizer.vocab_size))

    def answer(self, asked: task.Asked, nats: Sequence[np.ndarray]) -> list[task.Row]:
        """Nats per token of both kinds; documents without a token of a kind do not count in it."""
        seen = [seen_before(span.token_S) for span in asked.spans]
        rows = []
        for name, wanted in (("seen before in the window", True), ("new", False)):
            chosen = [s == wanted for s in seen]
            count_D = np.array([c.sum() for c in chosen], np.float64)
            cost_D = np.array([n[c].sum() for n, c in zip(nats, chosen, strict=True)])
            has = count_D > 0
            if has.any():
                rows.append(
                    task.ratio_row(
                        "seen_bigrams",
                        name,
                        cost_D[has],
                        count_D[has],
                        asked.about,
                        "nats per token",
                    )
                )
        return rows


def seen_before(token_S: np.ndarray) -> np.ndarray:
    """Marks the tokens that followed the same token before: bool (S,).

    >>> seen_before(np.array([5, 6, 5, 6, 6])).tolist()
    [False, False, False, True, False]
    """
    seen, marks = set(), [False]
    for pair in zip(token_S[:-1].tolist(), token_S[1:].tolist(), strict=True):
        marks.append(pair in seen)
        seen.add(pair)
    return np.array(marks[: len(token_S)], bool)
