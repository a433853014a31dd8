"""moelab/data/tokenizer.py: nothing is lost, the fast path is the slow one, no text ends a document."""

import os
import random

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from moelab.data import DataError, tokenizer

PROSE = [
    "the cat sat on the mat. " * 40,
    "don't they'll we've\n\n  indented\ttabs\r\n",
    "été à Noël 12345 ½",
]
NASTY = [
    "",
    " ",
    "a",
    "  two  spaces  ",
    "\n\n\n",
    "tab\t  then spaces",
    "no-break\u00a0  space",
    "line\u2028  separator \u3000 wide",
    "control\x1c  \x1d\x1e \x1f characters",
    "zero\x00byte",
    "\u180e  old separator",
    "e\u0301 combining, \U0001f600 emoji, 中文 text",
    f"text that spells {tokenizer.END} in the middle{tokenizer.END}",
    tokenizer.END,
    "'s 's'll''re",
    "\ufeffbyte order mark",
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(PROSE * 20, 300)


@pytest.fixture(params=["bpe", "byte"])
def any_tokenizer(request, bpe):
    return bpe if request.param == "bpe" else tokenizer.Bytes()


def test_nothing_is_lost(any_tokenizer):
    for text in NASTY + PROSE:
        tokens = any_tokenizer.encode(text)
        assert any_tokenizer.decode(tokens) == text
        assert any_tokenizer.decode([*tokens, any_tokenizer.end_id]) == text
        assert any_tokenizer.end_id not in tokens
        assert all(0 <= token < any_tokenizer.vocab_size for token in tokens)


def test_batch_equals_one_by_one(any_tokenizer):
    texts = NASTY + PROSE + _random_texts(300)
    arrays = any_tokenizer.encode_batch(texts)
    for text, array in zip(texts, arrays, strict=True):
        assert array.tolist() == any_tokenizer.encode(text), repr(text)
        assert array.dtype == np.dtype("<u2")


def _random_texts(count):
    generator = random.Random(0)
    letters = " \n\t\r\x0b\x0c\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u3000\ufeffab'.é½中\u0301\x00"
    return ["".join(generator.choices(letters, k=generator.randrange(12))) for _ in range(count)]


def test_a_piece_is_cut_the_same_anywhere():
    """What encode_batch() rests on, for every character that is white space to someone."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    guarded = 0
    for code in [*range(0x3100), 0xFEFF, 0x1F600]:
        c = chr(code)
        text = f"!{c}!  !{c} {c}!{c}{c} .\n{c}\n x{c}x 1{c}  1"
        if tokenizer._UNSAFE.search(text):
            guarded += 1
            continue
        words = [word for word, _ in cut(text)]
        assert words == [w for piece in tokenizer._PIECE.findall(text) for w, _ in cut(piece)], code
    assert guarded == 4  # \x1c to \x1f


def test_batch_twice_and_with_a_full_memory(bpe, monkeypatch):
    fresh = tokenizer.Bpe(bpe.text)
    first = fresh.encode_batch(PROSE)
    monkeypatch.setattr(tokenizer, "_MEMORY", 0)  # forgets everything before each batch
    for array, again in zip(first, fresh.encode_batch(PROSE), strict=True):
        np.testing.assert_array_equal(array, again)


def test_training_is_deterministic_and_merges(bpe):
    again = tokenizer.train_bpe(PROSE * 20, 300)
    assert again.sha256 == bpe.sha256
    assert bpe.vocab_size == 300
    assert len(bpe.encode("the cat sat on the mat. ")) < 12  # 24 bytes


def test_a_small_text_gives_fewer_tokens_than_asked():
    # 256 bytes + end + the merges a-b, ab-ab: nothing else occurs.
    assert 257 < tokenizer.train_bpe(["abab"], 4096).vocab_size < 262


def test_training_ends_on_a_word_without_end():
    """The time would grow with the square of the length: hours."""
    letters = "".join(random.Random(0).choices("abcdefgh", k=1_000_000))
    made = tokenizer.train_bpe([letters, "x" * 1_000_000, " " * 1_000_000], 300)
    assert made.vocab_size == 300
    (tokens,) = made.encode_batch([letters])
    assert made.decode(tokens) == letters


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("ab " * 2000, [6000]),
        ("a1" * 2000, [4000]),  # long without a blank, of short words
        ("é" * 1000, [1000]),
        ("x " + "é" * 1001 + " y", [2 + 1000, 1 + 2]),
        ("x" + "ab1" * 500 + "_" * 1200, [1501 + 1000, 200]),
        (" " * 2500 + "x", [1000, 1000, 501]),
        ("-" * 2000 + "a" * 1500, [1000, 2000, 500]),
    ],
)
def test_only_a_long_word_is_cut_for_training(text, lengths):
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    parts = list(tokenizer._parts(text, cut))
    assert "".join(parts) == text and [len(part) for part in parts] == lengths
    for part in parts:
        assert max(stop - start for _, (start, stop) in cut(part)) <= 1001  # and a blank before it


def test_too_small_a_vocabulary():
    with pytest.raises(DataError, match="vocab_size is 256, wanted at least 257"):
        tokenizer.train_bpe(["text"], 256)


def test_threads_are_left_as_they_were(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer.train_bpe(["text"], 300)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_bytes_are_bytes():
    made = tokenizer.Bytes()
    assert made.encode("Aé") == [0x41, 0xC3, 0xA9]
    assert (made.vocab_size, made.end_id) == (257, 256)


@pytest.mark.parametrize(("size", "dtype"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_dtype_holds_every_id(size, dtype):
    assert tokenizer.token_dtype(size) == np.dtype(dtype)
