"""What is in a dataset, as numbers and as samples: for `moelab data show` and for notebooks."""

from __future__ import annotations

from typing import NamedTuple

from moelab.data.dataset import Dataset
from moelab.data.split import SPLITS


class Sample(NamedTuple):
    """A document, read back from its tokens."""

    domain: str
    id: str
    text: str


def describe(dataset: Dataset) -> dict:
    """Returns a dataset's contents as plain values.

    Returns:
      "rows": a dict per split and domain, with documents, bytes, tokens and bytes_per_token (None
      where there are no tokens or the bytes are unknown); "sources": a dict per domain, with name,
      version, licence, attribution where known and the text's sha256; and directory, kind, fallback,
      sha256, tokenizer, empty_documents, and quality where there is any, as in the manifest.
    """
    manifest = dataset.manifest
    rows = [
        {"split": split, "domain": domain}
        | {key: counts[key] for key in ("documents", "bytes", "tokens")}
        | {"bytes_per_token": _ratio(counts)}
        for split in SPLITS
        for domain, counts in manifest["splits"][split]["domains"].items()
    ]
    same = ("kind", "fallback", "sha256", "tokenizer", "empty_documents")
    sources = [{"domain": domain} | entry for domain, entry in manifest["sources"].items()]
    return (
        {key: manifest[key] for key in same}
        | {
            "directory": str(dataset.directory),
            "sources": sources,
            "rows": rows,
        }
        | {key: manifest[key] for key in ("quality",) if key in manifest}
    )


def _ratio(counts: dict) -> float | None:
    """Returns text bytes per token; end tokens are tokens without bytes."""
    return counts["bytes"] / counts["tokens"] if counts["bytes"] and counts["tokens"] else None


def sample(dataset: Dataset, split: str = "train", *, domain: str = "", count: int = 1) -> list:
    """Returns the first documents of each domain in the order of their hash, decoded.

    Args:
      dataset: what build() or load() returned.
      split: "train", "validation" or "test".
      domain: only this one; empty: each.
      count: documents per domain.

    Raises:
      DataError: there is no such split, or no tokenizer to decode with.
    """
    documents = dataset.split(split)
    return [
        Sample(name, documents.ids[i], dataset.tokenizer.decode(documents.document(i).tolist()))
        for index, name in enumerate(dataset.domains)
        if domain in ("", name)
        for i in documents.by_hash(index)[:count]
    ]
