"""Writes the token files, indices and manifest of a dataset's folder, document by document."""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
import pathlib
import re

import numpy as np

from moelab.data import dataset, files, tokenizer
from moelab.data.document import DataError, Document, TokenDocument
from moelab.data.split import SPLITS

MAX_DOMAINS = 128  # a domain is a coarse label with an open file; more is a mistaken column


class Writer:
    """Appends documents to <split>/<domain> files and keeps their index.

    Attributes:
      rows: {(domain, split): [(id, tokens, bytes)]}.
      empty: documents without text per domain; they are counted and not written.
      texts: {domain: sha256 of the domain's documents}.
    """

    def __init__(self, directory: pathlib.Path, made):
        self.directory, self.end_id = directory, made.end_id
        self.dtype = tokenizer.token_dtype(made.vocab_size)
        self.rows = collections.defaultdict(list)
        self.empty = collections.Counter()
        self.texts = {}
        self.num_documents = 0
        self._files = {}
        self._seen, self._domains = set(), set()
        for split in SPLITS:
            (directory / split).mkdir()

    def add(
        self, document: Document | TokenDocument, split: str, tokens: np.ndarray, num_bytes: int
    ) -> None:
        """Writes a document and its end token to a split."""
        self.num_documents += 1
        self._check(document)
        if not len(tokens):
            self.empty[document.domain] += 1
            return
        key = (document.domain, split)
        if key not in self._files:
            self._files[key] = (self.directory / _part(*key)).open("wb")
        ended = np.append(tokens, self.end_id).astype(self.dtype)
        self._files[key].write(ended.tobytes())
        self.rows[key].append((document.id, len(ended), num_bytes))
        content = document.text.encode() if isinstance(document, Document) else ended.tobytes()
        self._hash(document.domain, content)

    def _hash(self, domain: str, content: bytes) -> None:
        if domain in self.texts:
            self.texts[domain].update(b"\0" + content)  # the hash of "\0".join(texts)
        else:
            self.texts[domain] = hashlib.sha256(content)

    def _check(self, document: Document | TokenDocument) -> None:
        key = hashlib.sha256(f"{document.domain}\0{document.id}".encode()).digest()[:16]
        if key in self._seen:
            raise DataError(
                f"domain {document.domain!r} has two documents with id {document.id!r}; ids decide "
                "the split and name documents in results, so each is wanted once"
            )
        self._seen.add(key)
        self._domains.add(document.domain)
        if len(self._domains) > MAX_DOMAINS:
            few = ", ".join(sorted(self._domains)[:4])
            raise DataError(
                f"more than {MAX_DOMAINS} domains ({few}, ...): a domain "
                "is a coarse label of the text; choose data.domain_column (or folders) accordingly"
            )

    def close(self) -> None:
        """Finishes the token files."""
        for file in self._files.values():
            file.close()


def _part(domain: str, split: str) -> str:
    """Names a token file while the order of the domains is not known yet."""
    return f"{split}/{hashlib.sha256(domain.encode()).hexdigest()[:16]}.part"


def manifest(writer: Writer, source, made, found=None) -> dict:
    """Names and indexes what was written, and returns the manifest of the folder.

    Args:
      writer: closed.
      source: where the documents came from.
      made: the tokenizer.
      found: quality.Prepared, where dirt or filters were asked for.
    """
    present = {domain for domain, _ in writer.rows}
    order = source.domains or tuple(sorted(present))
    domains = [domain for domain in order if domain in present]
    splits = {split: _finish_split(writer, split, domains) for split in SPLITS}
    more = found.finish(writer.directory, tuple(domains)) if found else {}
    origins = source.origins()
    entries = {
        "format": dataset.FORMAT,
        "kind": source.name,
        "fallback": source.fallback,
        "domains": domains,
        "sources": {
            domain: origins.get(domain, {}) | {"sha256": writer.texts[domain].hexdigest()}
            for domain in domains
        },
        "empty_documents": {d: writer.empty[d] for d in sorted(writer.empty)},
        "tokenizer": _describe_tokenizer(made),
        "tokenizer_sha256": made.sha256,
        "dtype": writer.dtype.str,
        "splits": splits,
        "files": {
            path.relative_to(writer.directory).as_posix(): {
                "size": path.stat().st_size,
                "sha256": files.digest(path),
            }
            for path in sorted(writer.directory.rglob("*"))
            if path.is_file()
        },
    } | more
    return entries | {"sha256": dataset.manifest_sha256(entries)}


def _describe_tokenizer(made) -> dict:
    return {
        "kind": made.kind,
        "vocab_size": made.vocab_size,
        "end_id": made.end_id,
        "sha256": made.sha256,
        "has_text": made.has_text,
    }


def _finish_split(writer: Writer, split: str, domains: list[str]) -> dict:
    """Names the split's token files, writes its index, and returns its counts."""
    columns = {name: [] for name in ("domain", "offset", "num_tokens", "num_bytes")}
    names, counts = [], {}
    for index, domain in enumerate(domains):
        rows = writer.rows.get((domain, split), [])
        file = f"{split}/{index}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', domain)[:40]}.bin"
        if rows:
            os.rename(writer.directory / _part(domain, split), writer.directory / file)
        tokens = [tokens for _, tokens, _ in rows]
        columns["domain"] += [index] * len(rows)
        columns["offset"] += list(itertools.accumulate(tokens, initial=0))[: len(rows)]
        columns["num_tokens"] += tokens
        columns["num_bytes"] += [num_bytes for _, _, num_bytes in rows]
        names += [name.encode() for name, _, _ in rows]
        counts[domain] = {
            "documents": len(rows),
            "bytes": sum(num_bytes for _, _, num_bytes in rows),
            "tokens": sum(tokens),
            "file": file if rows else "",
        }
    arrays = {name: np.array(values, np.int64) for name, values in columns.items()}
    arrays["domain"] = arrays["domain"].astype(np.int32)
    arrays["id_bytes"] = np.frombuffer(b"".join(names), np.uint8)
    arrays["id_stop"] = np.cumsum([len(name) for name in names], dtype=np.int64)
    dataset.write_index(writer.directory / split / dataset.INDEX, arrays)
    totals = {key: sum(c[key] for c in counts.values()) for key in ("documents", "bytes", "tokens")}
    return totals | {"domains": counts}
