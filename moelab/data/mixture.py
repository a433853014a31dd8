"""Which training text is drawn how often, and when: shares of domains and quality buckets, a clean end, a smaller pool.

A stream is the text of one domain and one bucket. Each phase of a run gives every stream a share w_s of the windows.
Draw n of a phase goes to a stream by splitting off one after the other: of the n draws before it, the first stream had
floor(n p) with p = w_1 / sum w; if floor((n + 1) p) is larger, draw n is its draw number floor(n p), else draw
n - floor(n p) of the rest is looked at in the same way. So that any stretch of draws has every share to within a few
windows, and the stream and number of a draw are functions of n alone: that is what makes a run resumable. A later phase
goes on in each stream where the one before it stopped.

S streams.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moelab import schema
from moelab.data.dataset import Dataset, TokenSplit
from moelab.data.document import DataError
from moelab.data.quality import buckets
from moelab.data.split import order_key
from moelab.spelling import hint

ALL = "*"  # stands for the names that are not given


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Documents one after the other, from which windows are cut.

    Attributes:
      domain: index.
      bucket: name of the quality bucket; empty: not divided.
      token_T: their tokens.
      document_N: int64, their numbers in the split.
      end_N: int64, where each ends in token_T.
    """

    domain: int
    bucket: str
    token_T: np.ndarray
    document_N: np.ndarray
    end_N: np.ndarray


def parse_weights(texts: Sequence[str], where: str) -> dict[str, float]:
    """Reads NAME=WEIGHT; the name * stands for all that are not given.

    >>> parse_weights(("wiki_en=2", "*=0.5"), "mixture.domain_weights")
    {'wiki_en': 2.0, '*': 0.5}

    Raises:
      DataError: a text is no such thing, a weight is negative, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            weight = float(number) if equals else math.nan
        except ValueError:
            weight = math.nan
        if not name.strip() or not 0 <= weight < math.inf:
            raise DataError(f"{where}: {text!r} is not NAME=WEIGHT with a weight of at least 0")
        if name.strip() in weights:
            raise DataError(f"{where}: {name.strip()} is given twice")
        weights[name.strip()] = weight
    return weights


def _weight(weights: Mapping[str, float], name: str, default: float) -> float:
    return weights.get(name, weights.get(ALL, default))


def _check_names(weights: Mapping[str, float], known: Sequence[str], where: str) -> None:
    for name in weights:
        if name != ALL and name not in known:
            guess = hint(name, known) or f"; there are {', '.join(known)}"
            raise DataError(f"{where}: no {name!r}{guess}")


def subset(
    dataset: Dataset, split: TokenSplit, settings: schema.Mixture, tokens: int
) -> np.ndarray:
    """Chooses the documents of the pool: all, or whole documents with about so many tokens, each domain in proportion.

    Documents are taken in the order of their hash, so that a smaller pool is part of a larger one; copies of a document
    come with it.

    Args:
      dataset: for the labels of copies.
      split: the training split.
      settings: unique_tokens and epochs.
      tokens: that the whole run sees.

    Returns:
      bool for each document of the split.

    Raises:
      DataError: more tokens are wanted than there are.
    """
    total = int(split.num_tokens_N.sum())
    wanted = settings.unique_tokens or (
        math.ceil(tokens / settings.epochs) if settings.epochs else 0
    )
    if not wanted:
        return np.ones(len(split), bool)
    if wanted > total:
        name = "unique_tokens" if settings.unique_tokens else "epochs"
        raise DataError(
            f"mixture.{name}={getattr(settings, name):g} wants a pool of {wanted:,} tokens; the training split has "
            f"{total:,}"
        )
    chosen_N = np.zeros(len(split), bool)
    origin = _origins(dataset)
    for index, domain in enumerate(split.domains):
        mine = split.of_domain(index)
        groups = collections.defaultdict(list)
        for number in mine.tolist():
            name = split.ids[number]
            groups[origin.get((domain, name), name)].append(number)
        rest = wanted * split.num_tokens_N[mine].sum() / total
        for name in sorted(groups, key=lambda name: order_key(domain, name, split.name)):
            if rest <= 0:
                break
            chosen_N[groups[name]] = True
            rest -= split.num_tokens_N[groups[name]].sum()
    return chosen_N


def pooled(dataset: Dataset, settings: schema.Mixture, tokens: int) -> Dataset:
    """Returns the dataset with only what the run draws from in its training split; arguments as for `subset`.

    That is the pool, without the domains and buckets whose weight is 0 from beginning to end.
    """
    train = dataset.split("train")
    found, names = streams(dataset, settings, tokens)
    size_S = np.array([len(one.token_T) for one in found])
    phases = plan(settings, found, size_S, train.domains, names, 1, 1000).phases
    chosen_N = np.zeros(len(train), bool)
    for number, stream in enumerate(found):
        chosen_N[stream.document_N] = any(share_S[number] for _, share_S in phases)
    return dataset.with_training(train.take(chosen_N))


def _origins(dataset: Dataset) -> dict[tuple[str, str], str]:
    """Returns {(domain, id of a copy): id of its original}."""
    table = dataset.quality
    if table is None:
        return {}
    copied = [n for n, k in enumerate(table.kinds) if k in ("duplicate", "near_duplicate")]
    return {
        (table.domains[table.domain_N[i]], table.ids[i]): table.sources[i]
        for i in np.flatnonzero(np.isin(table.kind_N, copied)).tolist()
    }


def streams(
    dataset: Dataset, settings: schema.Mixture, num_tokens: int
) -> tuple[tuple[Stream, ...], tuple[str, ...]]:
    """Cuts the training split into streams.

    Args:
      dataset: what build() or load() returned.
      settings: pool and buckets.
      num_tokens: that the whole run sees.

    Returns:
      The streams, domain by domain; and the buckets' names, none where the text is not divided.
    """
    split = dataset.split("train")
    chosen_N = subset(dataset, split, settings, num_tokens)
    names, bucket_N = ("",), np.zeros(len(split), np.int32)
    if settings.bucket_by:
        names, bucket_N = buckets.divide(dataset, settings.bucket_by, settings.num_buckets)
    found = []
    for domain in range(len(split.domains)):
        mine = split.of_domain(domain)
        for bucket, name in enumerate(names):
            document_N = mine[chosen_N[mine] & (bucket_N[mine] == bucket)]
            if len(document_N):
                found.append(_stream(split, domain, name, document_N))
    return tuple(found), names if settings.bucket_by else ()


def whole(split: TokenSplit) -> tuple[Stream, ...]:
    """Returns a stream for each domain, with all of its documents."""
    return tuple(
        _stream(split, domain, "", split.of_domain(domain)) for domain in range(len(split.domains))
    )


def _stream(split: TokenSplit, domain: int, bucket: str, document_N: np.ndarray) -> Stream:
    if len(document_N) == len(split.of_domain(domain)):  # nothing to copy; a memmap is slow to cut
        end_N = split.offset_N[document_N] + split.num_tokens_N[document_N]
        return Stream(domain, bucket, np.asarray(split.tokens[domain]), document_N, end_N)
    token_T = np.concatenate([split.document(i) for i in document_N.tolist()])
    return Stream(domain, bucket, token_T, document_N, np.cumsum(split.num_tokens_N[document_N]))


def shares(
    found: Sequence[Stream],
    windows_S: np.ndarray,
    domains: Sequence[str],
    domain_weights: Mapping[str, float],
    bucket_weights: Mapping[str, float],
) -> np.ndarray:
    """Returns the share of the draws that each stream gets.

    With n windows in domain d and bucket b and bucket weights v (1 where not given):
    without domain weights w_db = v_b n_db; with them w_db = u_d v_b n_db / sum_b v_b n_db. Then sum to 1.

    Raises:
      DataError: a domain has no weight, or has one and nothing to draw from.
    """
    weight_S = np.array([_weight(bucket_weights, one.bucket, 1.0) for one in found]) * windows_S
    if domain_weights:
        _check_names(domain_weights, domains, "mixture.domain_weights")
        for index, name in enumerate(domains):
            weight = _weight(domain_weights, name, math.nan)
            if math.isnan(weight):
                raise DataError(
                    f"mixture.domain_weights: {name} has no weight; give each domain one (0 leaves it out), or add *=1"
                )
            mine_S = np.array([one.domain == index for one in found])
            total = weight_S[mine_S].sum()
            if weight and not total:
                raise DataError(f"mixture: {name} has a weight, and not one window to draw")
            weight_S[mine_S] *= weight / total if total else 0.0
    if not weight_S.sum():
        raise DataError("mixture: nothing is left to draw: every stream is empty or has weight 0")
    return weight_S / weight_S.sum()


def place(number: int, share_S: Sequence[float]) -> tuple[int, int]:
    """Returns the stream of draw `number` (from 0) and how many draws before it went there.

    >>> [place(n, (0.5, 0.25, 0.25))[0] for n in range(8)]
    [2, 0, 1, 0, 2, 0, 1, 0]
    """
    rest = float(sum(share_S))
    last = max(s for s, share in enumerate(share_S) if share > 0)
    for stream, share in enumerate(share_S):
        if stream == last:
            return stream, number
        part = share / rest
        before = math.floor(number * part)
        if math.floor((number + 1) * part) > before:
            return stream, before
        number -= before
        rest -= share
    raise AssertionError("a share is above 0")


def drawn(number: int, share_S: Sequence[float]) -> list[int]:
    """Returns how many of the first `number` draws went to each stream."""
    rest, counts = float(sum(share_S)), []
    last = max(s for s, share in enumerate(share_S) if share > 0)
    for stream, share in enumerate(share_S):
        count = number if stream == last else math.floor(number * (share / rest)) if share else 0
        counts.append(count)
        number -= count
        rest -= share
    return counts


class Plan:
    """Which stream, and which of its windows, each draw of a run takes.

    Attributes:
      phases: (first draw, share of each stream), in order.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]):
        self.phases = [(start, tuple(map(float, share_S))) for start, share_S in phases]
        self._starts = [start for start, _ in self.phases]
        self._before = [[0] * len(self.phases[0][1])]  # draws of each stream before a phase
        for (start, share_S), stop in zip(self.phases, self._starts[1:], strict=False):
            counts = drawn(stop - start, share_S)
            self._before.append([a + b for a, b in zip(self._before[-1], counts, strict=True)])

    def __call__(self, draw: int) -> tuple[int, int]:
        """Returns (stream, number of the draw within the stream)."""
        phase = bisect.bisect_right(self._starts, draw) - 1
        start, share_S = self.phases[phase]
        stream, number = place(draw - start, share_S)
        return stream, self._before[phase][stream] + number

    def counts(self, draws: int) -> list[int]:
        """Returns how many of the first draws each stream gets."""
        phase = max(0, bisect.bisect_left(self._starts, draws) - 1)
        start, share_S = self.phases[phase]
        last = drawn(draws - start, share_S)
        return [a + b for a, b in zip(self._before[phase], last, strict=True)]


def is_weighted(settings: schema.Mixture) -> bool:
    """Whether anything but the natural share of the text is wanted."""
    return bool(settings.domain_weights or settings.bucket_weights or settings.anneal_share)


def plan(
    settings: schema.Mixture,
    found: Sequence[Stream],
    windows_S: np.ndarray,
    domains: Sequence[str],
    names: Sequence[str],
    batch_size: int,
    num_steps: int,
) -> Plan:
    """Makes the plan of a run: one phase, or two where it anneals.

    Args:
      settings: weights and anneal_share.
      found: the streams.
      windows_S: windows of each.
      domains, names: of domains and buckets.
      batch_size: draws per step.
      num_steps: of the whole run.
    """
    phases = []
    start = num_steps - round(settings.anneal_share * num_steps)
    for first, prefix in ((0, ""), (start * batch_size, "anneal_")):
        if prefix and not settings.anneal_share:
            continue
        weights = {}
        for kind in ("domain", "bucket"):
            name = f"{prefix}{kind}_weights"
            texts = getattr(settings, name) or getattr(settings, f"{kind}_weights")
            weights[kind] = parse_weights(texts, f"mixture.{name}")
        _check_names(weights["bucket"], names, f"mixture.{prefix}bucket_weights")
        phases.append(
            (first, shares(found, windows_S, domains, weights["domain"], weights["bucket"]))
        )
    return Plan(phases)


def stream_seed(seed: int, domain: str, bucket: str) -> int:
    """Returns the seed of a stream's order: other streams do not change it."""
    digest = hashlib.sha256(f"{seed}\0{domain}\0{bucket}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def problems(settings: schema.Mixture, data: Any) -> list[tuple[str, str]]:
    """Lists (field, message) of what is wrong with a mixture, as far as the config alone can tell.

    Args:
      settings: the section.
      data: the config's data section.
    """
    found = []
    for name in (
        "domain_weights",
        "bucket_weights",
        "anneal_domain_weights",
        "anneal_bucket_weights",
    ):
        try:
            parse_weights(getattr(settings, name), f"mixture.{name}")
        except DataError as error:
            found.append((name, str(error).removeprefix(f"mixture.{name}: ")))
    if settings.unique_tokens and settings.epochs:
        found.append(("epochs", "must be 0 where unique_tokens says how large the pool is"))
    for name in ("bucket_weights", "anneal_bucket_weights"):
        if getattr(settings, name) and not settings.bucket_by:
            found.append(
                (name, "wants bucket_by, which divides the documents: label, or a filter's kind")
            )
    annealed = settings.anneal_domain_weights or settings.anneal_bucket_weights
    if settings.anneal_share and not annealed:
        found.append(("anneal_share", "wants anneal_domain_weights or anneal_bucket_weights"))
    if annealed and not settings.anneal_share:
        found.append(("anneal_share", "must be above 0 for the weights of the end to hold"))
    if settings.bucket_by:
        texts = getattr(data, "filter", ())
        kinds = [text.split()[0] for text in texts if text.split()]
        if getattr(data, "inject", ()) or texts:
            kinds.insert(0, buckets.LABEL)
        if settings.bucket_by not in kinds:
            has = f"; there are {', '.join(kinds)}" if kinds else ""
            message = f"wants data.inject (for label) or a filter of data.filter, got {settings.bucket_by!r}"
            found.append(("bucket_by", message + (hint(settings.bucket_by, kinds) or has)))
    return found
