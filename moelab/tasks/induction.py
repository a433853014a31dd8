"""Induction: what a model gains on random tokens when they come a second time.

Random tokens cost about the logarithm of the vocabulary. Where an earlier copy stands in the context, a model that
looks back and copies pays less (induction heads, arXiv:2209.11895); one that does not gains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moelab import task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Random tokens, twice.

    Attributes:
      items: sequences.
      tokens: of one copy; at most half the length that the model was trained on.
      seed: of the draw.
    """

    items: int = 100
    tokens: int = 32
    seed: int = 0

    def ask(self, dataset, length: int) -> task.Asked:
        """Draws the sequences, without the end token."""
        if length < 4:
            raise task.TaskError(
                f"induction wants a model trained on 4 tokens or more, not {length}"
            )
        random = np.random.default_rng(self.seed)
        count = min(self.tokens, length // 2)
        ids = np.delete(np.arange(dataset.tokenizer.vocab_size), dataset.tokenizer.end_id)
        token_NS = np.tile(random.choice(ids, (self.items, count)), 2)
        return task.Asked([task.Span(row.astype(np.int32)) for row in token_NS], count)

    def answer(self, asked: task.Asked, nats: Sequence[np.ndarray]) -> list[task.Row]:
        """First copy minus second, nats per token, without their first tokens: nothing announces the second copy."""
        count = asked.about
        cost_N2S = np.stack(nats).reshape(len(nats), 2, count)[:, :, 1:]
        gain_N = (cost_N2S[:, 0] - cost_N2S[:, 1]).sum(1)
        weight_N = np.full(len(nats), count - 1.0)
        return [
            task.ratio_row(
                "induction", "gain at the second copy", gain_N, weight_N, 0.0, "nats per token"
            )
        ]
