"""Associative recall: after pairs of key and value, which value follows a key that comes again?

Keys and values are tokens drawn at random without repetition, so that only the context can tell. A choice is among the
values that occurred; a model that ignores the keys is right once in so many. Multi-query associative recall
(arXiv:2312.04927) trains on such sequences; here a language model is asked without having seen any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moelab import task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Random key-value pairs.

    Attributes:
      items: sequences per number of pairs.
      pairs: numbers of pairs; those that do not fit the model's length are dropped.
      seed: of the draw.
    """

    items: int = 200
    pairs: tuple[int, ...] = (2, 8)
    seed: int = 0

    def ask(self, dataset, length: int) -> task.Asked:
        """Draws the sequences: k1 v1 k2 v2 ... kn vn, one of the keys, and each value to choose from."""
        random = np.random.default_rng(self.seed)
        spans, about, dropped = [], [], 0
        for count in self.pairs:
            questions = [
                self._question(random, dataset.tokenizer, count, i) for i in range(self.items)
            ]
            if 2 * count + 2 > length:
                dropped += len(questions)
                continue
            more, kept, _ = task.ask_choices(questions, length)
            spans += more
            about.append((count, kept))
        if not about:
            raise task.TaskError(f"recall wants a model trained on more than {length} tokens")
        return task.Asked(spans, about, dropped)

    def answer(self, asked: task.Asked, nats: Sequence[np.ndarray]) -> list[task.Row]:
        """Accuracy by number of pairs."""
        rows, at = [], 0
        for count, kept in asked.about:
            right_N = task.chosen_right(kept, nats[at : at + len(kept) * count], per_token=False)
            at += len(kept) * count
            groups = [choice.group for choice in kept]
            rows.append(task.share_row("recall", f"{count} pairs", right_N, groups, 1 / count))
        return rows

    def _question(self, random, tokenizer, count: int, i: int) -> task.Choice:
        ids = np.delete(np.arange(tokenizer.vocab_size), tokenizer.end_id)
        if len(ids) < 2 * count:
            raise task.TaskError(
                f"recall: {count} pairs want {2 * count} tokens of a vocabulary; this has {len(ids)}"
            )
        keys, values = random.choice(ids, (2, count), replace=False)
        asked = random.integers(count)
        context = [*np.stack([keys, values], axis=1).reshape(-1), keys[asked]]
        choices = [[values[asked]], *([v] for j, v in enumerate(values) if j != asked)]
        return task.Choice(context, choices, str(i))
