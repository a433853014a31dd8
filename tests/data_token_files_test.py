"""moelab/data/token_files.py: tokens in, the same tokens out, and what is wrong with a file."""

import dataclasses

import numpy as np
import pytest

from moelab import data, schema
from moelab.data import DataError, kneser_ney, tokenizer

END = 9


def write(root, name, documents, dtype="uint16"):
    root.mkdir(parents=True, exist_ok=True)
    tokens = [token for document in documents for token in [*document, END]]
    np.array(tokens, dtype).tofile(root / f"{name}.bin")
    return schema.TokenFile(path=str(root), dtype=dtype, vocab_size=10, end_id=END)


def make_documents(count):
    return [[i % 9, (i // 9) % 9, 3] + [i % 7] * (i % 5) for i in range(count)]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_come_back(tmp_path, dtype):
    write(tmp_path / "t", "b", make_documents(80), dtype)
    section = write(tmp_path / "t", "a", make_documents(5), dtype)
    dataset = data.build(section, schema.Bpe(), cache=tmp_path)
    assert dataset.domains == ("a", "b")
    found = {}
    for name in data.SPLITS:
        part = dataset.split(name)
        for i, document_id in enumerate(part.ids):
            found[document_id] = part.document(i).tolist()
    wanted = {f"b.bin:{i}": [*tokens, END] for i, tokens in enumerate(make_documents(80), 1)}
    wanted |= {f"a.bin:{i}": [*tokens, END] for i, tokens in enumerate(make_documents(5), 1)}
    assert found == wanted
    made = dataset.tokenizer
    assert (made.kind, made.vocab_size, made.end_id) == ("external", 10, END)
    assert data.verify(dataset.directory) == []
    assert data.load(dataset.directory).tokenizer.sha256 == made.sha256


def test_without_a_tokenizer_bytes_are_unknown(tmp_path):
    section = write(tmp_path / "t", "a", make_documents(200))
    dataset = data.build(section, schema.Bpe(), cache=tmp_path)
    assert {row["bytes_per_token"] for row in data.describe(dataset)["rows"]} == {None}
    with pytest.raises(DataError, match="without tokenizer.json"):
        dataset.tokenizer.encode("text")
    train = data.train_batches(dataset, batch_size=2, length=8, seed=0)
    evaluation = data.evaluation_batches(
        dataset, "test", batch_size=2, length=8, tokens_per_domain=0
    )
    found = kneser_ney.bits_per_byte(dataset, [train[0]], evaluation)
    assert all(np.isnan(value) for value in found.values())


def test_with_a_tokenizer_beside_them(tmp_path):
    bpe = tokenizer.train_bpe(["some words é"] * 9, 270)
    texts = [f"some words é {i}" for i in range(60)]
    tokens = np.concatenate([[*bpe.encode(text), 0] for text in texts])
    (tmp_path / "t").mkdir()
    tokens.astype("<u2").tofile(tmp_path / "t" / "d.bin")
    (tmp_path / "t" / "tokenizer.json").write_text(bpe.text)
    section = schema.TokenFile(path=str(tmp_path / "t"), vocab_size=bpe.vocab_size, end_id=0)
    dataset = data.build(section, schema.Bpe(), cache=tmp_path)
    part = dataset.split("train")
    for i, document_id in enumerate(part.ids):
        text = texts[int(document_id.split(":")[1]) - 1]
        assert dataset.tokenizer.decode(part.document(i)) == text
        assert part.num_bytes_N[i] == len(text.encode())
    assert dataset.tokenizer.encode("some words") == bpe.encode("some words")


def test_one_file_and_empty_documents(tmp_path):
    section = write(tmp_path / "t", "only", [[1, 2], [], [3]])
    section = dataclasses.replace(section, path=str(tmp_path / "t" / "only.bin"))
    dataset = data.build(section, schema.Byte(), cache=tmp_path)
    assert dataset.domains == ("only",)
    assert dataset.manifest["empty_documents"] == {"only": 1}
    assert sum(len(dataset.split(name)) for name in data.SPLITS) == 2


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"abc", {}, "a.bin: 3 bytes, wanted a multiple of 2 for uint16"),
        (b"", {}, "a.bin: 0 bytes"),
        ([1, 2], {}, "the last token is 2, wanted data.end_id = 9"),
        ([1, 12, END], {}, "token 1 is 12, wanted below data.vocab_size = 10"),
        ([END], {"dtype": "int16"}, "data.dtype is 'int16', wanted uint16 or uint32"),
        ([END], {"end_id": 10}, "data.end_id is 10, wanted 0 <= end_id < vocab_size 10"),
    ],
)
def test_bad_files(tmp_path, content, changes, message):
    section = dataclasses.replace(write(tmp_path / "t", "a", []), **changes)
    if not isinstance(content, bytes):
        content = np.array(content, "<u2").tobytes()
    (tmp_path / "t" / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.build(section, schema.Byte(), cache=tmp_path)
