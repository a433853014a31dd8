"""Memorisation: how much less text costs that the model was trained on, and text that it saw many times.

The gap is the nats per token of held-out documents minus those of training documents, domain by domain and averaged
over domains, with an interval from resampled documents. Texts that occur more than once in what the run draws from, as
under data.inject, are a row of their own, and count once each.

Held-out text is as it was written, so training documents are too: what an injector changed or brought is left out.
They are of the pool that the run draws from (`mixture.unique_tokens`); a run of less than a pass has not met all of it,
and its gap is smaller than that of what it met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moelab import task
from moelab.data.quality.contract import CLEAN

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
        test, train = dataset.split("test"), dataset.split("train")
        once_N, repeated_N = _occurrences(train, _as_written(dataset, train))
        groups = {
            "test": (test, np.ones(len(test), bool)),
            "train": (train, once_N),
            "repeated": (train, repeated_N),
        }
        spans, about = [], []
        for name, (part, allowed_N) in groups.items():
            for index in range(len(dataset.domains)):
                order = [i for i in part.by_hash(index).tolist() if allowed_N[i]]
                for i in order[: self.documents]:
                    spans.append(task.Span(part.document(i)[:length].astype(np.int32), index))
                    about.append((name, index))
        if not {"test", "train"} <= {name for name, _ in about}:
            raise task.TaskError("memorisation wants documents in the training and the test split")
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


def _as_written(dataset, train) -> np.ndarray:
    """Marks the training documents whose text no injector changed or brought: bool (N,). Copies of them count."""
    table = dataset.quality
    if table is None:
        return np.ones(len(train), bool)
    kept = np.flatnonzero(table.kept_N).tolist()
    kind = {(table.domain_N[i], table.ids[i]): table.kinds[table.kind_N[i]] for i in kept}
    names = zip(train.domain_N, train.ids, strict=True)
    return np.array([kind[name] in (CLEAN, "duplicate") for name in names], bool)


def _occurrences(train, allowed_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marks, of the allowed documents, those whose text occurs once, and one of each text that occurs more often."""
    by_text: dict[tuple[int, bytes], list[int]] = {}
    for i in range(len(train)):
        text = np.asarray(train.document(i)).tobytes()
        by_text.setdefault((int(train.domain_N[i]), text), []).append(i)
    once_N, repeated_N = np.zeros(len(train), bool), np.zeros(len(train), bool)
    for places in by_text.values():
        if allowed := [i for i in places if allowed_N[i]]:
            (once_N if len(places) == 1 else repeated_N)[allowed[0]] = True
    return once_N, repeated_N


def _mean(cost_D2: np.ndarray) -> float:
    return cost_D2[:, 0].sum() / cost_D2[:, 1].sum()


def _again(random, cost_D2: np.ndarray) -> np.ndarray:
    return cost_D2[random.integers(len(cost_D2), size=len(cost_D2))]
