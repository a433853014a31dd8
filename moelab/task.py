"""What an evaluation beyond the loss is: spans to score, and rows with chance level and interval made of their nats.

A task is a file in `tasks/`. It asks about token spans, the model says what each token cost (scoring.py), and the task
answers with rows. Nothing here knows a model, so that every answer can be tested with made-up nats.

S tokens of a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import stats

from moelab.errors import UserError
from moelab.report import statistics


class TaskError(UserError):
    """A task that this run's data, or its length, cannot be asked; the message says why."""


class Span(NamedTuple):
    """Tokens that follow an end token, at most the length that the model was trained on.

    Attributes:
      token_S: int32, every one of which is a target.
      domain: index in the dataset's domains, for routers that are told; -1: unknown.
    """

    token_S: np.ndarray
    domain: int = -1


class Asked(NamedTuple):
    """What a task wants scored, and what it needs to remember.

    Attributes:
      spans: in the order in which nats come back.
      about: the task's own.
      dropped: items that were left out since they are longer than the model was trained on.
    """

    spans: list[Span]
    about: Any
    dropped: int = 0


class Row(NamedTuple):
    """One measured value.

    Attributes:
      task, measure: names.
      value, low, high: the estimate and its 95 % interval.
      chance: the value of a model that knows nothing; NaN where there is no such thing.
      n: independent units behind the interval: items, or documents that have items.
      unit: of the value.
    """

    task: str
    measure: str
    value: float
    low: float
    high: float
    chance: float
    n: int
    unit: str


class Task(Protocol):
    """A frozen dataclass with the settings of a task; all of them have defaults."""

    def ask(self, dataset, length: int) -> Asked:
        """Makes the spans.

        Args:
          dataset: data.Dataset of the run.
          length: tokens of the longest span, what the model was trained on.

        Raises:
          TaskError: this dataset has not what the task is about.
        """
        ...

    def answer(self, asked: Asked, nats: Sequence[np.ndarray]) -> list[Row]:
        """Makes rows of float64 nats_S, one array for each span of `asked`."""
        ...


class Choice(NamedTuple):
    """A question with several continuations of one context, of which the first is right.

    Attributes:
      context_S: int tokens before all of them; may be empty.
      continuation: for each choice its int tokens.
      group: questions of a group (of one article, say) are dependent.
    """

    context_S: Sequence[int]
    continuation: Sequence[Sequence[int]]
    group: str


def ask_choices(
    choices: Sequence[Choice], length: int, domain: int = -1
) -> tuple[list[Span], list[Choice], int]:
    """Returns spans (choice by choice), the questions that fit and how many do not.

    A context that is too long loses its beginning; a question whose continuations alone are too long is dropped.
    """
    spans, kept = [], []
    for choice in choices:
        longest = max(map(len, choice.continuation))
        if longest > length:
            continue
        room = length - longest
        context = list(choice.context_S)[-room:] if room else []
        kept.append(choice._replace(context_S=context))
        spans += [Span(np.array([*context, *c], np.int32), domain) for c in choice.continuation]
    return spans, kept, len(choices) - len(kept)


def chosen_right(
    choices: Sequence[Choice], nats: Sequence[np.ndarray], *, per_token: bool
) -> np.ndarray:
    """Whether the first continuation is the likeliest: (n,) float64; a tie of m counts 1 / m; NaN where a cost is NaN.

    Args:
      choices: as `ask_choices` kept them.
      nats: for every span.
      per_token: divide by the continuation's tokens, as where choices differ much in length.
    """
    right, at = [], 0
    for choice in choices:
        cost = []
        for continuation in choice.continuation:
            part = nats[at][len(choice.context_S) :]
            cost.append(part.sum() / (len(continuation) if per_token else 1))
            at += 1
        best = np.flatnonzero(np.equal(cost, np.min(cost)))
        known = not np.isnan(cost).any()
        right.append((1 / len(best) if 0 in best else 0.0) if known else np.nan)
    return np.array(right)


def share_row(
    task: str, measure: str, value_N: np.ndarray, group_N: Sequence[str], chance: float
) -> Row:
    """A mean of values in [0, 1] with its interval: a bootstrap over groups, Wilson's where groups have one item each.

    NaN, bounds included, where one of them is: a model whose losses are no numbers has no accuracy. A bootstrap of
    shares near 0 or 1 is too narrow, so Wilson's score interval is taken wherever items are independent, and that of as
    many items as there are groups where all items are alike, of which a bootstrap would say that nothing can differ.
    """
    groups = list(dict.fromkeys(group_N))
    if not groups:
        raise TaskError(f"{task}: nothing is left to ask")
    if np.isnan(value_N).any():
        return Row(task, measure, np.nan, np.nan, np.nan, chance, len(groups), "share")
    if len(groups) == len(value_N) or np.isin(value_N.mean(), (0.0, 1.0)):
        found = stats.binomtest(round(float(value_N.mean() * len(groups))), len(groups))
        low, high = map(float, found.proportion_ci(method="wilson"))
        return Row(task, measure, float(value_N.mean()), low, high, chance, len(groups), "share")
    place = {name: i for i, name in enumerate(groups)}
    index_N = np.array([place[name] for name in group_N])
    right_G = np.bincount(index_N, value_N, len(groups))
    count_G = np.bincount(index_N, minlength=len(groups)).astype(np.float64)
    return ratio_row(task, measure, right_G, count_G, chance, "share")


def ratio_row(
    task: str, measure: str, top_D: np.ndarray, weight_D: np.ndarray, chance: float, unit: str
) -> Row:
    """sum(top) / sum(weight) with a bootstrap over the D units."""
    found = statistics.ratio_difference(
        np.zeros(len(top_D)), top_D, weight_D, np.zeros(len(top_D), np.int64)
    )
    return Row(task, measure, *found, chance, len(top_D), unit)
