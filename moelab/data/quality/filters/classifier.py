"""A linear classifier over hashed word pieces that tells clean text from the pool, one for each domain.

It learns from the validation split against a sample of the pool, clean documents among it: it finds what the pool has
more of. To a bag of pieces, words in the wrong place are ordinary text: it is nearly blind for token noise.

Reference: the fastText filter of DCLM, arXiv:2406.11794, here scikit-learn's HashingVectorizer and SGDClassifier.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib

import numpy as np

from moelab.data.document import DataError, Document
from moelab.data.quality import ranking

FEATURES = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(ranking.RankingFilter):
    """Keeps the documents that look most like clean ones. Score: mean log-odds over the document's pieces."""

    characters: int = (
        1_000_000  # of each domain's clean text, and of each half of its pool, to learn from
    )
    piece: int = 500  # characters that are judged together
    max_ngram: int = 2  # longest run of words that is a feature

    counts = ("characters", "piece", "max_ngram")
    packages = ("scikit-learn",)

    def scores(self, pool) -> np.ndarray:
        """Fits two models a domain, then lets each judge the half that it has not seen."""
        try:
            importlib.import_module("sklearn.linear_model")
        except ImportError as error:
            raise DataError(
                f"data.filter: {self.kind} needs scikit-learn: pip install 'moelab[data]'"
            ) from error
        clean = ranking.clean_texts(pool, self, self.characters, self.seed)
        judged = (one for one in pool.documents() if self.applies(one.domain))
        rest = ranking.sample(judged, self.characters, self.seed, folds=True)
        models = {
            (domain, 1 - half): _fit(self, clean[domain], texts)
            for (domain, half), texts in rest.items()
        }
        parts = pool.map(functools.partial(_scores, self, models), self.kind)
        return np.concatenate(list(parts))


def _vectorizer(tool: Filter):
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(
        n_features=FEATURES,
        ngram_range=(1, tool.max_ngram),
        alternate_sign=False,
        token_pattern=r"(?u)\w+|[^\w\s]",
        dtype=np.float32,
    )


def _fit(tool: Filter, clean: list[str], rest: list[str]) -> tuple[np.ndarray, float]:
    """Returns the weights and the intercept of one model."""
    from sklearn.linear_model import SGDClassifier

    texts, classes = [], []
    for label, group in ((1, clean), (0, rest)):
        for text in group:
            for piece in ranking.pieces(text, tool.piece):
                texts.append(piece)
                classes.append(label)
    model = SGDClassifier(
        loss="log_loss",
        alpha=1e-6,
        max_iter=10,
        tol=None,
        class_weight="balanced",
        average=True,
        random_state=tool.seed,
    )
    model.fit(_vectorizer(tool).transform(texts), classes)
    return model.coef_[0].astype(np.float32), float(model.intercept_[0])


def _scores(tool: Filter, models: dict, documents: list[Document]) -> np.ndarray:
    """Scores a chunk; runs in a worker."""
    score_N = np.full(len(documents), np.nan, np.float32)
    vectorizer = _vectorizer(tool)
    groups: dict[tuple[str, int], list[int]] = {}
    for number, one in enumerate(documents):
        if tool.applies(one.domain):
            groups.setdefault((one.domain, ranking.fold(tool.seed, one)), []).append(number)
    for key, numbers in groups.items():
        # A half without another to learn from is judged by its own: there is no more text.
        weights, intercept = models.get(key) or models[key[0], 1 - key[1]]
        cut = [list(ranking.pieces(documents[number].text, tool.piece)) for number in numbers]
        odds = vectorizer.transform([p for part in cut for p in part] or [""]) @ weights + intercept
        for number, part in zip(
            numbers, np.split(odds, np.cumsum(list(map(len, cut)))[:-1]), strict=True
        ):
            score_N[number] = part.mean() if len(part) else 0.0
    return score_N
