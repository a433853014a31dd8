"""Memorisation: how much less text costs that the model was trained on, and text that it saw many times.

The gap is the nats per token of held-out documents minus those of training documents, domain by domain and averaged
over domains, with an interval from resampled documents. Documents that occur more than once in the training split, as
under data.inject, are a row of their own.

Training documents are taken from the whole training split, also those that a run of less than an epoch, or on a part of
the text (`mixture.unique_tokens`), has not met: there the gap is smaller than that of what it met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moelab import task

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Beginnings of documents of the training and of the test split.

    Attributes:
      documents: of each domain and kind, in the order of their hash.
      seed: of the resampling.
    """

    documents: int = 60
    seed: int = 0

    def ask(self, dataset, length: int) -> task.Asked:
        """Takes the beginnings of documents."""
        groups = {"test": self._documents(dataset, "test", None)}
        repeated = _repeated(dataset)
        groups["train"] = self._documents(dataset, "train", ~repeated)
        if repeated.any():
            groups["repeated"] = self._documents(dataset, "train", repeated)
        if not groups["test"] or not groups["train"]:
            raise task.TaskError("memorisation wants documents in the training and the test split")
        spans, about = [], []
        for name, found in groups.items():
            part = dataset.split("test" if name == "test" else "train")
            for index, i in found:
                spans.append(task.Span(part.document(i)[:length].astype(np.int32), index))
                about.append((name, index))
        return task.Asked(spans, about)

    def answer(self, asked: task.Asked, nats: Sequence[np.ndarray]) -> list[task.Row]:
        """The gap to the test split of what was seen once, and of what was repeated."""
        cost = {}
        for (name, domain), n in zip(asked.about, nats, strict=True):
            cost.setdefault(name, {}).setdefault(domain, []).append((n.sum(), n.size))
        names = (("train", "test minus training"), ("repeated", "test minus repeated training"))
        return [self._gap(cost["test"], cost[k], measure) for k, measure in names if k in cost]

    def _gap(self, held_out: dict, seen: dict, measure: str) -> task.Row:
        domains = sorted(held_out.keys() & seen.keys())
        if not domains:
            raise task.TaskError("memorisation: no domain has both training and test documents")
        random = np.random.default_rng(self.seed)
        sides = [[np.array(side[d], np.float64) for d in domains] for side in (held_out, seen)]
        value = np.mean([_mean(a) - _mean(b) for a, b in zip(*sides, strict=True)])
        resampled = [
            np.mean([_mean(_again(random, a)) - _mean(_again(random, b)) for a, b in zip(*sides, strict=True)])
            for _ in range(RESAMPLES)
        ]  # fmt: skip
        low, high = np.quantile(resampled, [0.025, 0.975])
        count = sum(len(a) for side in sides for a in side)
        return task.Row(
            "memorisation", measure, float(value), float(low), float(high), 0.0, count, "nats per token"
        )  # fmt: skip

    def _documents(self, dataset, split: str, allowed_N) -> list[tuple[int, int]]:
        part, found = dataset.split(split), []
        for index in range(len(dataset.domains)):
            order = [i for i in part.by_hash(index).tolist() if allowed_N is None or allowed_N[i]]
            found += [(index, i) for i in order[: self.documents]]
        return found


def _repeated(dataset) -> np.ndarray:
    """Training documents whose text occurs more than once in the training split: bool (N,)."""
    part = dataset.split("train")
    by_text: dict[bytes, list[int]] = {}
    for i in range(len(part)):
        by_text.setdefault(np.asarray(part.document(i)).tobytes(), []).append(i)
    marks = np.zeros(len(part), bool)
    for places in by_text.values():
        marks[places] = len(places) > 1
    return marks


def _mean(cost_D2: np.ndarray) -> float:
    return cost_D2[:, 0].sum() / cost_D2[:, 1].sum()


def _again(random, cost_D2: np.ndarray) -> np.ndarray:
    return cost_D2[random.integers(len(cost_D2), size=len(cost_D2))]
