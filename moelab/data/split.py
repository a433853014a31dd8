"""Which split a document belongs to: a function of its domain and id alone.

A document keeps its split when others are added or removed, and on every machine.
"""

from __future__ import annotations

import hashlib

SPLITS = ("train", "validation", "test")
TEST_BELOW = 0.05
VALIDATION_BELOW = 0.10


def document_hash(domain: str, document_id: str) -> str:
    """Returns sha256(domain + id) in hexadecimal: decides the split and the evaluation's order."""
    return hashlib.sha256((domain + document_id).encode()).hexdigest()


def split_of(domain: str, document_id: str) -> str:
    """Returns "test" if u < 0.05, "validation" if u < 0.10, else "train".

    u = int(sha256(domain + id)[:8], 16) / 2**32.

    >>> split_of("wiki_en", "Tomato"), split_of("wiki_en", "Asia")
    ('train', 'train')
    """
    u = int(document_hash(domain, document_id)[:8], 16) / 2**32
    if u < TEST_BELOW:
        return "test"
    return "validation" if u < VALIDATION_BELOW else "train"


def order_key(domain: str, document_id: str, split: str) -> str:
    """Returns what a split's documents are ordered by where some of them are taken: their hash, as hexadecimal.

    The training split has hashes from VALIDATION_BELOW on, by its own rule. What was injected into it has ids that
    follow no such rule, and would come first: its hashes below that are dealt anew over the rest.
    """
    digest = document_hash(domain, document_id)
    if split != "train" or split_of(domain, document_id) == "train":
        return digest
    u = VALIDATION_BELOW + (1 - VALIDATION_BELOW) * int(digest[8:16], 16) / 2**32
    return f"{int(u * 2**32):08x}{digest[16:]}"
