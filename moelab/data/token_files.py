"""Users' token files: <domain>.bin, integers of two or four bytes, documents ended by end_id.

A `tokenizer.json` beside them (the format of the `tokenizers` package) gives text and byte counts;
without it there are tokens only, and bits per byte are unknown.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np

from moelab import schema
from moelab.data import files
from moelab.data.document import DataError, TokenDocument

DTYPES = {"uint16": "<u2", "uint32": "<u4"}
BLOCK = 1 << 22  # tokens looked at together


class TokenSource:
    """Tokens that were made elsewhere; the config's tokenizer section does not apply to them."""

    name = "tokens"
    fallback = False
    domains = ()  # those found, by name

    def __init__(self, section: schema.TokenFile, memory: pathlib.Path):
        if section.dtype not in DTYPES:
            raise DataError(f"data.dtype is {section.dtype!r}, wanted {' or '.join(DTYPES)}")
        if not 0 <= section.end_id < section.vocab_size:
            raise DataError(
                f"data.end_id is {section.end_id}, wanted 0 <= end_id < vocab_size {section.vocab_size}"
            )
        self.section = section
        root = files.existing(section.path)
        self.selection = files.select(root, ("*.bin",))
        folder = root if root.is_dir() else root.parent
        tokenizer = folder / "tokenizer.json"
        self.tokenizer_file = tokenizer if tokenizer.is_file() else None
        known = self.selection + ([("tokenizer.json", tokenizer)] if self.tokenizer_file else [])
        self._digests = files.digests(known, memory)

    def identity(self) -> dict:
        """Returns what decides the content: how the files are read, and every file's hash."""
        section = self.section
        settings = {name: getattr(section, name) for name in ("dtype", "vocab_size", "end_id")}
        return {"settings": settings, "files": self._digests}

    def origins(self) -> dict[str, dict]:
        """Returns nothing: where users' files come from is theirs to say."""
        return {}

    def documents(self) -> Iterator[TokenDocument]:
        """Yields every document without its end token; the id is <file>:<number from 1>.

        Raises:
          DataError: a file is no whole number of tokens, has an id outside the vocabulary, has no
            end token, or goes on after the last one.
        """
        tokenizer = _tokenizer(self.tokenizer_file) if self.tokenizer_file else None
        for name, path in self.selection:
            token_N = _open(path, self.section)
            start = 0
            for number, stop in enumerate(_ends(token_N, path, self.section), 1):
                token_T = np.asarray(token_N[start:stop])
                num_bytes = _num_bytes(tokenizer, token_T) if tokenizer else 0
                yield TokenDocument(path.stem, f"{name}:{number}", token_T, num_bytes)
                start = stop + 1


def _open(path: pathlib.Path, section: schema.TokenFile) -> np.ndarray:
    dtype, size = np.dtype(DTYPES[section.dtype]), path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise DataError(
            f"{path}: {size} bytes, wanted a multiple of {dtype.itemsize} for {section.dtype}"
        )
    return np.memmap(path, dtype, "r")


def _ends(token_N: np.ndarray, path: pathlib.Path, section: schema.TokenFile) -> Iterator[int]:
    """Yields the position of every end token, after a look at all ids and at the last token."""
    if int(token_N[-1]) != section.end_id:
        raise DataError(
            f"{path}: the last token is {int(token_N[-1])}, wanted data.end_id = {section.end_id}: "
            "every document is ended by it"
        )
    for start in range(0, len(token_N), BLOCK):
        block = token_N[start : start + BLOCK]
        if int(block.max()) >= section.vocab_size:
            position = start + int((block >= section.vocab_size).argmax())
            raise DataError(
                f"{path}: token {position} is {int(token_N[position])}, wanted below "
                f"data.vocab_size = {section.vocab_size} (data.dtype is {section.dtype})"
            )
        yield from (start + np.flatnonzero(block == section.end_id)).tolist()


def _tokenizer(path: pathlib.Path):
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"{path}: not a file of the tokenizers package: {error}") from error


def _num_bytes(tokenizer, token_T: np.ndarray) -> int:
    return len(tokenizer.decode(token_T.tolist(), skip_special_tokens=False).encode())
