"""Facts: which of four descriptions belongs to a title? In the manner of multiple-choice benchmarks, on real text.

The English articles have a one-line description that is not in the text of the corpus. Wrong choices are descriptions
of other articles on the same topic. Items whose description stands verbatim in the article are left out. A choice is
scored by its nats per token after "title:"; the same without the title shows what can be guessed from the choices
alone. Articles are divided by the split that their text is in: a model may remember facts of the training split only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moelab import task
from moelab.data import corpus
from moelab.data.split import split_of

DOMAIN = "wiki_en"


class Fact(NamedTuple):
    """An article's title, its description, and wrong ones."""

    id: str
    title: str
    description: str
    wrong: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Multiple choice over descriptions.

    Attributes:
      items: at most so many articles of a split, in the order of their hash.
      choices: of a question, the right one included.
    """

    items: int = 400
    choices: int = 4

    def ask(self, dataset, length: int) -> task.Asked:
        """Asks each question after its title and, for comparison, after nothing."""
        if dataset.manifest["kind"] != "corpus" or DOMAIN not in dataset.domains:
            raise task.TaskError(f"facts wants the corpus with its domain {DOMAIN}")
        if dataset.manifest["fallback"]:
            raise task.TaskError("facts wants the corpus's wheels: pip install 'moelab[data]'")
        encode, domain = dataset.tokenizer.encode, dataset.domains.index(DOMAIN)
        spans, about, dropped = [], [], 0
        for split in ("train", "test"):
            for titled in (True, False):
                questions = [
                    task.Choice(
                        encode(f"{fact.title}:") if titled else [],
                        [encode(f" {text}") for text in (fact.description, *fact.wrong)],
                        fact.id,
                    )
                    for fact in self.facts(split)
                ]
                more, kept, lost = task.ask_choices(questions, length, domain)
                spans, dropped = spans + more, dropped + lost
                about.append((split, titled, kept))
        return task.Asked(spans, about, dropped)

    def answer(self, asked: task.Asked, nats: Sequence[np.ndarray]) -> list[task.Row]:
        """Accuracy by split, with and without the title."""
        rows, at = [], 0
        for split, titled, kept in asked.about:
            count = sum(len(choice.continuation) for choice in kept)
            right_N = task.chosen_right(kept, nats[at : at + count], per_token=True)
            at += count
            name = f"{split} articles" + ("" if titled else ", without the title")
            groups = [choice.group for choice in kept]
            rows.append(task.share_row("facts", name, right_N, groups, 1 / self.choices))
        return rows

    def facts(self, split: str) -> list[Fact]:
        """The split's items, in a fixed order; distractors come from all splits."""
        entries = _entries()
        by_topic = defaultdict(list)
        for key, (_, _, topic) in entries.items():
            by_topic[topic].append(key)
        chosen = sorted(
            (key for key in entries if split_of(DOMAIN, key) == split), key=lambda key: _hash(key)
        )
        found = []
        for key in chosen:
            title, description, topic = entries[key]
            wrong = tuple(_wrong(key, description, by_topic[topic], entries, self.choices - 1))
            if len(wrong) == self.choices - 1:
                found.append(Fact(key, title, description, wrong))
            if len(found) == self.items:
                break
        return found


@functools.cache
def _entries() -> dict[str, tuple[str, str, str]]:
    """Title, description and topic of the articles with a description that their text does not have."""
    found = {}
    for key, entry in corpus.wiki_entries("en-us"):
        description = (entry.get("description") or "").strip()
        if description and description.lower() not in entry["extract"].lower():
            found[key] = (entry["title"], description, entry.get("topic") or "")
    return found


def _wrong(key: str, right: str, candidates: list[str], entries: dict, count: int) -> Iterator[str]:
    """Different descriptions from the same topic, chosen by the hash of both articles."""
    seen = {right.lower()}
    for other in sorted(candidates, key=lambda other: _hash(f"{key}\0{other}")):
        text = entries[other][1]
        if text.lower() in seen:
            continue
        if count == 0:
            return
        seen.add(text.lower())
        count -= 1
        yield text


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
