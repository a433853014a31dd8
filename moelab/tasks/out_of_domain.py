"""Bits per byte on text of another kind: docstrings of technical English, and the reference of the Python language.

`docstrings` are those of the sympy modules that are not in the domain `code`; the modules are parsed, never imported.
They share a style with the docstrings in `code`, and were not compared for near-duplicates. `python_reference` is the
standard library's pydoc_data.topics; it differs between releases of Python, so compare within one.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from moelab import task
from moelab.data import corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Text of no domain of the corpus.

    Attributes:
      tokens: about so many of each kind of text, whole documents in the order of their hash; a document is cut at the
        length that the model was trained on.
    """

    tokens: int = 8192

    def ask(self, dataset, length: int) -> task.Asked:
        """Encodes the texts."""
        if dataset.tokenizer.kind == "external":
            raise task.TaskError("out_of_domain wants a tokenizer; this data came as tokens")
        spans, about = [], []
        for name, texts in self._kinds():
            sizes, total = [], 0
            for text in texts:
                token_S = np.array(dataset.tokenizer.encode(text), np.int32)[:length]
                num_bytes = len(dataset.tokenizer.decode(token_S.tolist()).encode())
                if not num_bytes:
                    continue
                spans.append(task.Span(token_S))
                sizes.append(num_bytes)
                total += len(token_S)
                if total >= self.tokens:
                    break
            about.append(
                (name, np.array(sizes, np.float64), math.log2(dataset.tokenizer.vocab_size))
            )
        return task.Asked(spans, about)

    def answer(self, asked: task.Asked, nats: Sequence[np.ndarray]) -> list[task.Row]:
        """Bits per byte; chance is a uniform distribution over the vocabulary."""
        rows, at = [], 0
        for name, bytes_D, bits in asked.about:
            mine = nats[at : at + len(bytes_D)]
            at += len(bytes_D)
            bits_D = np.array([n.sum() for n in mine]) / math.log(2)
            chance = bits * sum(n.size for n in mine) / float(bytes_D.sum())
            rows.append(
                task.ratio_row("out_of_domain", name, bits_D, bytes_D, chance, "bits per byte")
            )
        return rows

    def _kinds(self) -> Iterator[tuple[str, Iterator[str]]]:
        if corpus.is_installed(corpus.CODE):
            yield "docstrings", docstrings()
        yield "python_reference", _topics()


def docstrings() -> Iterator[str]:
    """Docstrings of 200 bytes and more, three of a module, from sympy's modules that the corpus does not have.

    Modules come in the order of their name's hash, and are parsed as they are asked for.
    """
    used = {document.id for document in corpus.code_documents()}
    files = corpus.installed_files(corpus.CODE)
    names = [name for name in files if name.startswith("sympy/") and name.endswith(".py")]
    for name in sorted(names, key=_hash):
        if name in used or "/tests/" in name or "benchmarks" in name:
            continue
        nodes = ast.walk(ast.parse(files[name].read_bytes()))
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        texts = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
        yield from itertools.islice((text for text in texts if len(text.encode()) >= 200), 3)


def _topics() -> Iterator[str]:
    from pydoc_data import topics

    yield from sorted(topics.topics.values(), key=_hash)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
