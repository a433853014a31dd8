"""Text to tokens and back, without loss: byte-level BPE, or bytes.

Each tokenizer has `kind`, `vocab_size`, `end_id` (the token that ends a document, never made from
text), `sha256`, `encode`, `encode_batch` and `decode`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from moelab.data.document import DataError

FILE = "tokenizer.json"
END = "<|eos|>"
MIN_VOCAB = 257  # 256 bytes and the end token

# A run of white space and the word after it: BPE never merges across the end of such a piece, so a
# piece has the same tokens wherever it stands.
_PIECE = re.compile(r"\s*\S+|\s+")
# Python counts these four as white space and the tokenizer does not (the only such characters of
# Unicode); END spells a special token.
_UNSAFE = re.compile("[\x1c-\x1f]|" + re.escape(END))
_MEMORY = 1_000_000  # pieces remembered before starting afresh
# Characters of the longest word to train on. Training takes the square of a word's length, and no text that people
# write has such words (the five-domain corpus: 112), so that its tokenizer does not change.
_LONGEST = 1000
# What may hold such a word, which is of letters, of digits, of blanks, or of none of these.
_LONG = re.compile(rf"[^\W_]{{{_LONGEST},}}|[\W_]{{{_LONGEST},}}")
_JOINED = 64  # pieces encoded as one string; measured best of 1, 64, 512


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the little-endian dtype that holds every id: uint16 up to 65536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Bytes:
    """Token b is byte b; 256 ends a document."""

    kind = "byte"
    has_text = True
    vocab_size = 257
    end_id = 256

    def __init__(self):
        self.text = json.dumps({"kind": "byte", "vocab_size": 257, "end_id": 256})
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes."""
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Returns an array of tokens for each text."""
        return [np.frombuffer(text.encode(), np.uint8).astype("<u2") for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text, without end tokens; broken UTF-8 becomes U+FFFD."""
        return bytes(int(token) for token in tokens if token < 256).decode("utf-8", "replace")


class Bpe:
    """Byte-level BPE of the `tokenizers` package, from its JSON form.

    Attributes:
      text: the JSON, of which sha256 is the hash.
    """

    kind = "bpe"
    has_text = True
    end_id = 0

    def __init__(self, text: str):
        self.text = text
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def _tokenizer(self):
        """Reads END in a text as six ordinary characters, so that no text can end a document."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(self.text)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _splitter(self):
        """Reads END as the end token: tells apart pieces that are encoded as one string."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.text)

    @functools.cached_property
    def _pieces(self) -> dict[str, bytes]:
        return {}

    @functools.cached_property
    def vocab_size(self) -> int:
        """Tokens, the end token included; fewer than asked for when the text had no more to merge."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without an end token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Returns an array of tokens for each text, equal to encode() of it, several times faster.

        A corpus has few distinct pieces: each is encoded once and remembered as bytes.
        """
        pieces_of = [None if _UNSAFE.search(text) else _PIECE.findall(text) for text in texts]
        self._learn({piece for pieces in pieces_of if pieces for piece in pieces})
        dtype, known = token_dtype(self.vocab_size), self._pieces
        return [
            np.array(self.encode(text), dtype)
            if pieces is None
            else np.frombuffer(b"".join(map(known.__getitem__, pieces)), dtype)
            for text, pieces in zip(texts, pieces_of, strict=True)
        ]

    def _learn(self, pieces: set[str]) -> None:
        if len(self._pieces) > _MEMORY:
            self._pieces.clear()
        new = sorted(piece for piece in pieces if piece not in self._pieces)
        groups = [new[start : start + _JOINED] for start in range(0, len(new), _JOINED)]
        with _threads():
            encodings = self._splitter.encode_batch_fast(
                [END.join(group) for group in groups], add_special_tokens=False
            )
        dtype = token_dtype(self.vocab_size)
        for group, encoding in zip(groups, encodings, strict=True):
            tokens = np.array(encoding.ids, dtype)
            stops = [*np.flatnonzero(tokens == self.end_id).tolist(), len(tokens)]
            content, width, start = tokens.tobytes(), dtype.itemsize, 0
            for piece, stop in zip(group, stops, strict=True):
                self._pieces[piece] = content[start * width : stop * width]
                start = stop + 1

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text, without end tokens; broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(token) for token in tokens if token != self.end_id])


class External:
    """The tokenizer of users' token files: the tokenizer.json beside them, or only its numbers.

    Attributes:
      has_text: there is a tokenizer.json; without one, encode and decode are errors.
    """

    kind = "external"

    def __init__(self, vocab_size: int, end_id: int, text: str = ""):
        self.vocab_size = vocab_size
        self.end_id = end_id
        self.text = text or json.dumps(
            {"kind": "external", "vocab_size": vocab_size, "end_id": end_id}
        )
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        self.has_text = bool(text)

    @functools.cached_property
    def _tokenizer(self):
        import tokenizers

        if not self.has_text:
            raise DataError("the token files came without tokenizer.json: no text in or out")
        return tokenizers.Tokenizer.from_str(self.text)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text, without end tokens."""
        tokens = [int(token) for token in tokens if token != self.end_id]
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Bpe:
    """Trains byte-level BPE (GPT-2's pre-tokenization); the same texts give the same bytes.

    A word of more than 1000 letters, digits, signs or blanks is learned from in parts of so many; encoding does not
    cut it.

    Args:
      texts: the training split; streamed.
      vocab_size: tokens, the end token included; at least 257.

    Raises:
      DataError: vocab_size is too small.
    """
    if vocab_size < MIN_VOCAB:
        raise DataError(f"tokenizer.vocab_size is {vocab_size}, wanted at least {MIN_VOCAB}")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Not the tokenizer's own, which is locked while it is trained.
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    with _threads():
        tokenizer.train_from_iterator(
            (part for text in texts for part in _parts(text, cut)), trainer
        )
    return Bpe(tokenizer.to_str())


def _parts(text: str, cut: Callable[[str], list]) -> Iterator[str]:
    """Cuts a text where a word of it is too long to train on; any other stays whole."""
    start = 0
    for match in _LONG.finditer(text):
        for _, (first, end) in cut(match.group()):
            for stop in range(first + _LONGEST, end, _LONGEST):
                yield text[start : match.start() + stop]
                start = match.start() + stop
    yield text[start:]


def load(directory: pathlib.Path, entry: dict) -> Bytes | Bpe | External:
    """Loads the tokenizer of a dataset's folder.

    Args:
      directory: of the dataset.
      entry: the manifest's "tokenizer".
    """
    match entry["kind"]:
        case "byte":
            return Bytes()
        case "bpe":
            return Bpe((directory / FILE).read_text(encoding="utf-8"))
    text = (directory / FILE).read_text(encoding="utf-8") if entry["has_text"] else ""
    return External(entry["vocab_size"], entry["end_id"], text)


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Lets `tokenizers` use all cores inside, and leaves the process as it was, fit to fork."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ.setdefault(name, "true")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
