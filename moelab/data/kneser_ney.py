"""The bar that a language model must clear: a Kneser-Ney token bigram fitted on what it saw.

Interpolated, with modified discounts (one for counts of 1, of 2, and of 3 or more), at both orders:

  p(w|v) = max(c(vw) - D[c(vw)], 0) / c(v.) + g(v) q(w)      g(v) = sum_w D[c(vw)] / c(v.)
  q(w)   = max(n(w)  - E[n(w)],  0) / n     + h / V          h    = sum_w E[n(w)] / n

c(vw) counts the pair, n(w) the different contexts v of w, n is their sum, V the vocabulary. The
discounts come from the counts of counts m_i: Y = m_1 / (m_1 + 2 m_2), D[i] = i - (i+1) Y m_{i+1}/m_i.

Reference: Chen and Goodman, 1998, TR-10-98, equations 19, 20 and 26.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from moelab.data.dataset import Dataset
from moelab.data.document import DataError
from moelab.data.loader import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Bigram:
    """Fitted probabilities. U different pairs, V vocabulary.

    Attributes:
      pair_U: int64 v * V + w of the pairs seen, sorted.
      share_U: float64, the first term of p(w|v) for these pairs.
      backoff_V: float64, g(v); 1 for a context that was never seen.
      unigram_V: float64, q(w).
    """

    pair_U: np.ndarray
    share_U: np.ndarray
    backoff_V: np.ndarray
    unigram_V: np.ndarray

    def probability(self, context: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Returns p(token | context), elementwise, in float64."""
        pair = context.astype(np.int64) * len(self.unigram_V) + token
        place = np.minimum(np.searchsorted(self.pair_U, pair), len(self.pair_U) - 1)
        share = np.where(self.pair_U[place] == pair, self.share_U[place], 0.0)
        return share + self.backoff_V[context] * self.unigram_V[token]


def discounts(count: np.ndarray) -> np.ndarray:
    """Returns the discount of counts 0, 1, 2 and 3 or more, from the counts of counts.

    Where too few counts occur to estimate a discount, it is i/2 instead: any value in (0, i) is valid.
    """
    m = np.array([np.count_nonzero(count == i) for i in range(5)], np.float64)
    result = np.array([0.0, 0.5, 1.0, 1.5])
    if m[1] and m[2]:
        y = m[1] / (m[1] + 2 * m[2])
        for i in (1, 2, 3):
            estimate = i - (i + 1) * y * m[i + 1] / m[i] if m[i] else 0.0
            if 0 < estimate < i:
                result[i] = estimate
    return result


def fit(context: np.ndarray, token: np.ndarray, vocab_size: int) -> Bigram:
    """Fits the bigram on pairs.

    Args:
      context: (P,) integers below vocab_size.
      token: (P,) the token that followed.
      vocab_size: V.

    Raises:
      DataError: there are no pairs.
    """
    if not len(context):
        raise DataError("a bigram wants at least one pair of tokens to be fitted on")
    pair_U, count_U = np.unique(context.astype(np.int64) * vocab_size + token, return_counts=True)
    context_U, token_U = np.divmod(pair_U, vocab_size)
    discount_U = discounts(count_U)[np.minimum(count_U, 3)]
    total_V = np.bincount(context_U, count_U, vocab_size)
    seen_V = np.maximum(total_V, 1)
    backoff_V = np.bincount(context_U, discount_U, vocab_size) / seen_V
    contexts_V = np.bincount(token_U, minlength=vocab_size)
    lower_V = discounts(contexts_V)[np.minimum(contexts_V, 3)]
    unigram_V = (contexts_V - lower_V) / len(pair_U) + lower_V.sum() / len(pair_U) / vocab_size
    return Bigram(
        pair_U,
        (count_U - discount_U) / seen_V[context_U],
        np.where(total_V > 0, backoff_V, 1.0),
        unigram_V,
    )


def _pairs(windows: np.ndarray | Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of the different windows: what is seen twice tells a bigram nothing new."""
    if not isinstance(windows, np.ndarray):
        rows = [
            np.concatenate([batch.token_BL, batch.target_BL[:, -1:]], axis=1) for batch in windows
        ]
        windows = np.concatenate(rows) if rows else np.zeros((0, 2), np.int32)
    windows = np.unique(windows, axis=0)
    return windows[:, :-1].ravel(), windows[:, 1:].ravel()


def bits_per_byte(
    dataset: Dataset,
    train_token_windows: np.ndarray | Iterable[Batch],
    eval_batches: Iterable[Batch],
    *,
    split: str = "test",
) -> dict[str, float]:
    """Fits the bigram on training windows and measures it as a model is measured.

    bits per byte = sum of -ln p over the targets of a domain / ln 2 / bytes of its documents.

    Args:
      dataset: for its vocabulary.
      train_token_windows: the batches that the model saw (mask all True), or a (W, L+1) array.
        Repeated windows count once.
      eval_batches: what evaluation_batches() returned, or its batches in a list.
      split: of which they are.

    Returns:
      {domain: bits per byte} for the domains that have documents, and "all" over them; NaN where
      the bytes are unknown (token files without a tokenizer).
    """
    model = fit(*_pairs(train_token_windows), dataset.tokenizer.vocab_size)
    part, nats_N = dataset.split(split), 0.0
    seen_N = np.zeros(len(part), bool)
    for batch in eval_batches:
        context, token, document = (
            array[batch.mask_BL] for array in (batch.token_BL, batch.target_BL, batch.document_BL)
        )
        nats_N += np.bincount(document, -np.log(model.probability(context, token)), len(part))
        seen_N[document] = True
    result = {}
    for index, name in enumerate(dataset.domains):
        chosen = seen_N & (part.domain_N == index)
        if chosen.any():
            result[name] = _bits(nats_N[chosen].sum(), part.num_bytes_N[chosen].sum())
    return result | {"all": _bits(nats_N[seen_N].sum(), part.num_bytes_N[seen_N].sum())}


def _bits(nats: float, num_bytes: int) -> float:
    return float(nats / np.log(2) / num_bytes) if num_bytes else float("nan")
