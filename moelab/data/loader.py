"""Batches of token windows: shuffled ones to train on, and fixed ones to evaluate on.

A window has one domain: it is cut from the concatenated documents of that domain. B windows per
batch, L targets per window, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moelab import schema
from moelab.data import mixture as mixtures
from moelab.data.dataset import Dataset, TokenSplit
from moelab.data.document import DataError
from moelab.data.mixture import Stream


class Batch(NamedTuple):
    """Windows to predict: position l of a row predicts target_BL from token_BL[:, : l + 1].

    Attributes:
      token_BL: int32 inputs.
      target_BL: int32, the token after each input.
      mask_BL: bool, False for padding, which counts nowhere.
      domain_B: int32 index of the window's domain; -1 for a row of padding.
      document_BL: int32 index, in the split, of the target's document; -1 for padding.
    """

    token_BL: np.ndarray
    target_BL: np.ndarray
    mask_BL: np.ndarray
    domain_B: np.ndarray
    document_BL: np.ndarray


class TrainBatches:
    """An endless sequence of batches: `batches[step]` is a function of the step alone.

    Attributes:
      windows: all that there are in the pool.
    """

    def __init__(self, windows, batches, plan=None, parts=(), domains=()):
        self.windows = windows
        self._batches = batches
        self._plan, self._parts, self._domains = plan, parts, domains

    @property
    def steps_per_epoch(self) -> float:
        """Batches in which as many windows are seen as there are (without a mixture, every one of them once)."""
        return len(self.windows) / self.windows.batch_size

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"steps count from 0, came {step}")
        return self._batches[step]

    def passes(self, num_steps: int) -> dict[str, Any]:
        """Says how often the first steps see the pool.

        Returns:
          unique_tokens, epochs (tokens seen over unique ones); and with weights `streams`: domain, bucket,
          unique_tokens, windows that were drawn, epochs.
        """
        draws = num_steps * self.windows.batch_size
        length = self.windows.length
        found: dict[str, Any] = {
            "unique_tokens": len(self.windows) * length,
            "epochs": draws / len(self.windows),
        }
        if self._plan:
            found["streams"] = [
                {
                    "domain": self._domains[one.domain],
                    "bucket": one.bucket,
                    "unique_tokens": len(part) * length,
                    "drawn": count,
                    "epochs": count / len(part),
                }
                for (one, part), count in zip(self._parts, self._plan.counts(draws), strict=True)
            ]
        return found


class Windows:
    """All windows of some streams, by number: tokens [i L, i L + L] of a stream, stream by stream.

    Neighbours share a token: the last target of one is the first input of the next. What remains
    behind the last whole window of a stream is not trained on (less than L tokens per stream).
    """

    def __init__(self, streams: Sequence[Stream], length: int, batch_size: int):
        self.length, self.batch_size = length, batch_size
        self._streams = tuple(streams)
        self._mask_L, self._next_L = np.ones(length, bool), np.arange(1, length + 1)
        counts = [max(0, (len(stream.token_T) - 1) // length) for stream in self._streams]
        self._stop_S = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._stop_S[-1]) if len(self._stop_S) else 0

    def __getitem__(self, index) -> Batch:
        """Returns one window, as a Batch without its first axis."""
        number = int(np.searchsorted(self._stop_S, index, side="right"))
        stream = self._streams[number]
        before = self._stop_S[number - 1] if number else 0
        start = int(index - before) * self.length
        token_T = stream.token_T[start : start + self.length + 1].astype(np.int32)
        place_L = np.searchsorted(stream.end_N, self._next_L + start, side="right")
        document_L = stream.document_N[place_L].astype(np.int32)
        return Batch(token_T[:-1], token_T[1:], self._mask_L, np.int32(stream.domain), document_L)


class _Mixed:
    """Batches whose windows come from several streams by a plan."""

    def __init__(self, plan: mixtures.Plan, ordered: Sequence, batch_size: int):
        self._plan, self._ordered, self._batch_size = plan, ordered, batch_size

    def __getitem__(self, step: int) -> Batch:
        rows = []
        for draw in range(step * self._batch_size, (step + 1) * self._batch_size):
            stream, number = self._plan(draw)
            rows.append(self._ordered[stream][number])
        return Batch(*(np.stack(column) for column in zip(*rows, strict=True)))


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    length: int,
    seed: int,
    mixture: schema.Mixture | None = None,
    num_steps: int = 0,
) -> TrainBatches:
    """Shuffles the windows of the training split, anew in every epoch, without end.

    Args:
      dataset: what build() or load() returned.
      batch_size: windows per batch, over all devices.
      length: targets per window.
      seed: of the order.
      mixture: what is drawn how often (schema.Mixture, or a ConfigDict with its fields); None: all text, as it is.
      num_steps: of the whole run; wanted where the mixture has anneal_share or epochs.

    Returns:
      An object with `[step] -> Batch`, step from 0; to resume, ask for the next step.

    Raises:
      DataError: the split has fewer windows than a batch, or the mixture does not fit the data.
    """
    if batch_size < 1 or length < 1:
        raise DataError(f"batch_size {batch_size} and length {length}: wanted at least 1")
    settings = _mixture(mixture, num_steps)
    split = dataset.split("train")
    streams, names = mixtures.streams(dataset, settings, num_steps * batch_size * length)
    windows = Windows(streams, length, batch_size)
    if len(windows) < batch_size:
        raise DataError(
            f"the training split has {len(windows)} windows of {length} tokens "
            f"({sum(len(stream.token_T) for stream in streams)} tokens in "
            f"{sum(len(stream.document_N) for stream in streams)} documents), fewer than a batch "
            f"of {batch_size}: add text, or lower train.batch_size or train.length"
        )
    import grain  # imports jax and orbax

    if not mixtures.is_weighted(settings):
        # repeat before batch, so that a batch may span two epochs and no window is left out.
        ordered = grain.MapDataset.source(windows).seed(seed).shuffle().repeat(None)
        return TrainBatches(windows, ordered.batch(batch_size))
    parts = [(one, Windows([one], length, batch_size)) for one in streams]
    parts = [(one, part) for one, part in parts if len(part)]
    plan = mixtures.plan(
        settings,
        [one for one, _ in parts],
        np.array([len(part) for _, part in parts]),
        split.domains,
        names,
        batch_size,
        num_steps,
    )
    ordered = [
        grain.MapDataset.source(part)
        .seed(mixtures.stream_seed(seed, split.domains[one.domain], one.bucket))
        .shuffle()
        .repeat(None)
        for one, part in parts
    ]
    return TrainBatches(windows, _Mixed(plan, ordered, batch_size), plan, parts, split.domains)


def _mixture(mixture, num_steps: int) -> schema.Mixture:
    """Makes the dataclass of a mixture."""
    settings = mixture or schema.Mixture()
    if not isinstance(settings, schema.Mixture):
        settings = schema.Mixture(**settings)
    if num_steps < 1 and (settings.anneal_share or settings.epochs):
        raise DataError("mixture.anneal_share and mixture.epochs want the number of steps")
    return settings


class EvaluationBatches(Sequence):
    """Fixed batches in which every token of the chosen documents is a target exactly once.

    The chosen documents of a domain, one after the other, are one stream, cut into windows of L
    targets. A window's first input is the token before its first target; before the stream's first
    token that is an end token. A domain's last window is padded.

    Attributes:
      split: where document_BL points.
      document_D: for each domain the indices of the chosen documents, in the stream's order.
    """

    def __init__(self, split: TokenSplit, document_D: list[np.ndarray], batch_size, length):
        self.split, self.document_D = split, document_D
        self._batch_size, self._length = batch_size, length
        self._stream_D = [_stream(split, documents) for documents in document_D]
        self._window_M = [
            (domain, start)
            for domain, stream in enumerate(self._stream_D)
            for start in range(0, len(stream[1]), length)
        ]

    @property
    def num_targets(self) -> int:
        """Tokens that are counted, end tokens included."""
        return sum(len(target_T) for _, target_T, _ in self._stream_D)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that have documents here; a small split may lack one."""
        pairs = zip(self.split.domains, self.document_D, strict=True)
        return tuple(name for name, documents in pairs if len(documents))

    def __len__(self) -> int:
        return -(-len(self._window_M) // self._batch_size)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        shape = (self._batch_size, self._length)
        batch = Batch(
            np.full(shape, self.split.end_id, np.int32),
            np.full(shape, self.split.end_id, np.int32),
            np.zeros(shape, bool),
            np.full(shape[0], -1, np.int32),
            np.full(shape, -1, np.int32),
        )
        windows = self._window_M[index * self._batch_size : (index + 1) * self._batch_size]
        for row, (domain, start) in enumerate(windows):
            token_T, target_T, document_T = (
                array[start : start + self._length] for array in self._stream_D[domain]
            )
            stop = len(target_T)
            batch.token_BL[row, :stop] = token_T
            batch.target_BL[row, :stop] = target_T
            batch.mask_BL[row, :stop] = True
            batch.domain_B[row] = domain
            batch.document_BL[row, :stop] = document_T
        return batch


def _stream(split: TokenSplit, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns inputs, targets and the target's document for a domain's chosen documents."""
    empty = np.zeros(0, np.int32)
    target_T = np.concatenate([empty, *(split.document(i).astype(np.int32) for i in documents)])
    token_T = np.concatenate([np.full(len(target_T[:1]), split.end_id, np.int32), target_T[:-1]])
    document_T = np.repeat(documents.astype(np.int32), split.num_tokens_N[documents])
    return token_T, target_T, document_T


def choose_documents(split: TokenSplit, domain: int, num_tokens: int) -> np.ndarray:
    """Chooses whole documents of a domain with about num_tokens tokens in all, and not more.

    Goes through the documents in the order of their hash and takes each that still fits, until 95 %
    are reached. If none fits, takes the shortest. 0 takes all.
    """
    order = split.by_hash(domain)
    if not num_tokens or not len(order):
        return order
    chosen, total = [], 0
    for index in order.tolist():
        size = int(split.num_tokens_N[index])
        if total + size <= num_tokens:
            chosen.append(index)
            total += size
        if total >= 0.95 * num_tokens:
            break
    return np.array(chosen or [order[np.argmin(split.num_tokens_N[order])]], np.int64)


def evaluation_batches(
    dataset: Dataset, split: str, *, batch_size: int, length: int, tokens_per_domain: int
) -> EvaluationBatches:
    """Returns the batches of a fixed subset of a split, the same for every model and precision.

    Args:
      dataset: what build() or load() returned.
      split: "validation" or "test" (or "train").
      batch_size: windows per batch; the last batch is padded to it.
      length: targets per window.
      tokens_per_domain: whole documents up to about this many tokens per domain; 0: all.

    Raises:
      DataError: the split is empty.
    """
    if batch_size < 1 or length < 1 or tokens_per_domain < 0:
        raise DataError(
            f"batch_size {batch_size}, length {length}, tokens_per_domain {tokens_per_domain}: "
            "wanted at least 1, 1 and 0"
        )
    chosen_from = dataset.split(split)
    if not len(chosen_from):
        counts = {name: len(dataset.split(name)) for name in ("train", "validation", "test")}
        raise DataError(
            f"the {split} split is empty: by the hash of their ids the documents fall "
            + ", ".join(f"{count} into {name}" for name, count in counts.items())
            + "; about one in twenty falls into validation and one into test, so add documents "
            "(or cut the text into smaller ones)"
        )
    documents = [
        choose_documents(chosen_from, domain, tokens_per_domain)
        for domain in range(len(dataset.domains))
    ]
    return EvaluationBatches(chosen_from, documents, batch_size, length)
