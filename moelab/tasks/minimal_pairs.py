"""Minimal pairs: does real text cost less than the same text with one word made wrong?

In the manner of BLiMP (arXiv:1912.00582), but from held-out text, which counts as right: is and are, was and were, has
and have, this and these, a and an are exchanged in English articles, and a closing bracket is replaced in code. Scored
is what remains of the sentence, the word included, after all that precedes it in the document. Some exchanges are not
wrong ("the team are"), so that even a perfect model is a little below 1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from moelab import task

WORDS = (("is", "are"), ("was", "were"), ("has", "have"), ("this", "these"), ("a", "an"))
BRACKETS = {")": "]", "]": ")", "}": ")"}
WORD_DOMAIN, BRACKET_DOMAIN = "wiki_en", "code"
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Exchanged words and brackets in held-out text.

    Attributes:
      items: places of each kind, at most two of a document.
      split: whose documents.
    """

    items: int = 150
    split: str = "test"

    def ask(self, dataset, length: int) -> task.Asked:
        """Looks for places in the documents, in the order of their hash."""
        kinds = [(WORD_DOMAIN, "/".join(pair), pair) for pair in WORDS]
        kinds.append((BRACKET_DOMAIN, "bracket", None))
        spans, about, dropped = [], [], 0
        texts = {name: self._texts(dataset, name) for name in (WORD_DOMAIN, BRACKET_DOMAIN)}
        for domain, name, pair in kinds:
            questions = list(self._questions(dataset, texts[domain], pair))
            if not questions:
                continue
            index = dataset.domains.index(domain)
            more, kept, lost = task.ask_choices(questions, length, index)
            spans, dropped = spans + more, dropped + lost
            if kept:
                about.append((name, kept))
        if not about:
            raise task.TaskError(
                f"minimal_pairs wants the domains {WORD_DOMAIN} or {BRACKET_DOMAIN}"
            )
        return task.Asked(spans, about, dropped)

    def answer(self, asked: task.Asked, nats: Sequence[np.ndarray]) -> list[task.Row]:
        """Share of pairs in which the real text costs less, by kind."""
        rows, at = [], 0
        for name, kept in asked.about:
            right_N = task.chosen_right(kept, nats[at : at + 2 * len(kept)], per_token=False)
            at += 2 * len(kept)
            groups = [choice.group for choice in kept]
            rows.append(task.share_row("minimal_pairs", name, right_N, groups, 0.5))
        return rows

    def _texts(self, dataset, domain: str) -> list[tuple[str, str]]:
        if domain not in dataset.domains or dataset.tokenizer.kind == "external":
            return []
        part = dataset.split(self.split)
        decode, end = dataset.tokenizer.decode, dataset.tokenizer.end_id
        documents = part.by_hash(dataset.domains.index(domain)).tolist()
        return [
            (part.ids[i], decode(t for t in part.document(i).tolist() if t != end))
            for i in documents
        ]

    def _questions(self, dataset, texts, pair) -> Iterator[task.Choice]:
        left, encode = self.items, dataset.tokenizer.encode
        for name, text in texts:
            for before, right, wrong in list(places(text, pair))[:2]:
                if not left:
                    return
                left -= 1
                yield task.Choice(encode(before), [encode(right), encode(wrong)], name)


def places(text: str, pair: tuple[str, str] | None) -> Iterator[tuple[str, str, str]]:
    """Finds where a word of the pair stands, or with None a closing bracket: (before, rest, rest made wrong).

    The rest goes to the end of the sentence, of the line for a bracket, and begins with the space before the word.

    >>> list(places("It has one. It is an old one.", ("a", "an")))
    [('It has one. It is', ' an old one.', ' a old one.')]
    >>> list(places("f(x)", None))
    [('f(x', ')', ']')]
    """
    if pair is None:
        found = re.finditer(r"[)\]}]", text)
    else:
        # Followed by a word: "a" as a name, or before a bracket, is not the article.
        found = re.finditer(rf"(?<=\S) ({'|'.join(pair)})(?= [a-z])", text)
    for match in found:
        end = _SENTENCE_END if pair else re.compile(r"\n")
        stop = end.search(text, match.end())
        rest = text[match.start() : stop.end() if stop else len(text)].rstrip("\n")
        was = match.group(1) if pair else match.group()
        other = BRACKETS[was] if pair is None else pair[1 - pair.index(was)]
        wrong = rest.replace(was, other, 1)
        yield text[: match.start()], rest, wrong
