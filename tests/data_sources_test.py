"""moelab/data/sources.py and files.py: every door reads alike, and says what is wrong and where."""

import dataclasses
import gzip
import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from moelab import schema
from moelab.data import DataError, files, sources

RECORDS = [
    {"text": "One.", "lang": "en", "key": "a"},
    {"text": "Deux.\nTrois\u2028é", "lang": "fr", "key": 7},
    {"text": "", "lang": "fr", "key": "c"},
]


def read(section, tmp_path):
    return [tuple(item) for item in sources.open_source(section, tmp_path / "memory").documents()]


def write_jsonl(path, records=RECORDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return schema.JsonLines(path=str(path))


def write_parquet(path, records=RECORDS):
    records = [record | {"key": str(record["key"])} for record in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return schema.Parquet(path=str(path))


WRITERS = {"d.jsonl": write_jsonl, "d.jsonl.gz": write_jsonl, "d.parquet": write_parquet}


@pytest.fixture(params=WRITERS)
def table(request, tmp_path):
    """The same three records behind each door."""
    return WRITERS[request.param](tmp_path / request.param)


def test_tables_by_default_take_domain_and_id_from_file_and_row(table, tmp_path):
    name = os.path.basename(table.path)
    assert read(table, tmp_path) == [
        ("d", f"{name}:1", "One."),
        ("d", f"{name}:2", "Deux.\nTrois\u2028é"),
        ("d", f"{name}:3", ""),
    ]


def test_tables_take_domain_and_id_from_columns(table, tmp_path):
    section = dataclasses.replace(table, domain_column="lang", id_column="key")
    assert [(domain, key) for domain, key, _ in read(section, tmp_path)] == [
        ("en", "a"),
        ("fr", "7"),
        ("fr", "c"),
    ]


@pytest.mark.parametrize("column", ["text_column", "domain_column", "id_column"])
def test_tables_name_a_missing_column_and_the_near_one(table, tmp_path, column):
    with pytest.raises(DataError, match=rf"no column 'txet' \(data.{column}\).*'text'.*did you"):
        read(dataclasses.replace(table, **{column: "txet"}), tmp_path)


def test_tables_are_read_again_and_known_by_content(table, tmp_path):
    source = sources.open_source(table, tmp_path / "memory")
    assert list(source.documents()) == list(source.documents())
    (digest,) = source.identity()["files"].values()
    with open(table.path, "ab") as file:
        file.write(b"\n")
    (changed,) = sources.open_source(table, tmp_path / "memory").identity()["files"].values()
    assert digest != changed


def test_a_folder_of_tables(tmp_path):
    write_jsonl(tmp_path / "all" / "b.jsonl", RECORDS[:1])
    write_jsonl(tmp_path / "all" / "deep" / "a.ndjson.gz", RECORDS[1:2])
    (tmp_path / "all" / "notes.md").write_text("not a table")
    found = read(schema.JsonLines(path=str(tmp_path / "all")), tmp_path)
    assert [item[:2] for item in found] == [("b", "b.jsonl:1"), ("a", "deep/a.ndjson.gz:1")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"d.jsonl:3: not JSON: .* \(column \d+\)"),
        (b'["x"]', r"d.jsonl:3: list, wanted an object"),
        (b'{"text": 5}', r"d.jsonl:3: 'text' is int, wanted a string"),
        (b'{"text": "\xff"}', r"d.jsonl:3: not UTF-8 \(byte 10 of the line\)"),
        (b'{"text": "\\ud800"}', r"d.jsonl:3: not Unicode text: surrogates"),
        (b'{"text": ' + b"[" * 100_000, r"d.jsonl:3: lists or objects .* too deep to read"),
        (b'{"n": ' + b"9" * 5000 + b"}", r"d.jsonl:3: an integer of more than 4,300 digits"),
        (b'{"body": "x"}', r"d.jsonl:3: no column 'text' \(data.text_column\); it has 'body'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")  # the blank line counts as a line
    with pytest.raises(DataError, match=message):
        read(schema.JsonLines(path=str(path)), tmp_path)


@pytest.mark.parametrize("value", [None, "", True, 1.5])
def test_a_domain_is_a_name(tmp_path, value):
    section = write_jsonl(tmp_path / "d.jsonl", [{"text": "x", "domain": value}])
    with pytest.raises(DataError, match=r"d.jsonl:1: 'domain' is .*, wanted a name"):
        read(dataclasses.replace(section, domain_column="domain"), tmp_path)


def test_null_text_is_an_empty_document(tmp_path):
    section = write_jsonl(tmp_path / "d.jsonl", [{"text": None}])
    assert read(section, tmp_path) == [("d", "d.jsonl:1", "")]


def test_byte_order_mark_before_json(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert read(schema.JsonLines(path=str(path)), tmp_path) == [("d", "d.jsonl:1", "x")]


def test_damaged_gzip(tmp_path):
    section = write_jsonl(tmp_path / "d.jsonl.gz", RECORDS * 100)
    content = (tmp_path / "d.jsonl.gz").read_bytes()
    (tmp_path / "d.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"d.jsonl.gz: damaged gzip after line \d+"):
        read(section, tmp_path)


def test_damaged_parquet(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match="d.parquet: unreadable Parquet after row 0"):
        read(schema.Parquet(path=str(tmp_path / "d.parquet")), tmp_path)


def test_text_folder(tmp_path):
    for name in ("en/a.txt", "en/deep/b.txt", "fr/c.txt", "top.txt", "fr/skip.md"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"text\r\nof {name}".encode())
    found = read(schema.TextFolder(path=str(tmp_path / "texts")), tmp_path)
    assert found == [
        ("en", "en/a.txt", "text\r\nof en/a.txt"),  # line ends as they came
        ("en", "en/deep/b.txt", "text\r\nof en/deep/b.txt"),
        ("fr", "fr/c.txt", "text\r\nof fr/c.txt"),
        ("texts", "top.txt", "text\r\nof top.txt"),
    ]
    only = schema.TextFolder(path=str(tmp_path / "texts"), pattern="**/*.md")
    assert [item[1] for item in read(only, tmp_path)] == ["fr/skip.md"]


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    odd = os.fsdecode(b"\xff")
    (tmp_path / "in" / odd).mkdir(parents=True)
    for name in (f"{odd}.txt", f"in/{odd}/top.txt", f"{odd}.jsonl", f"{odd}.bin"):
        (tmp_path / name).write_bytes(b'{"text": "x"}')
    for section, name in (
        (schema.TextFolder(path=str(tmp_path), pattern="*.txt"), r"/\xff.txt"),
        (schema.TextFolder(path=str(tmp_path / "in")), r"/in/\xff/top.txt"),
        (schema.TextFolder(path=str(tmp_path / "in" / odd)), r"/in/\xff"),
        (schema.JsonLines(path=str(tmp_path)), r"/\xff.jsonl"),
        (schema.JsonLines(path=str(tmp_path / f"{odd}.jsonl")), r"/\xff.jsonl"),
        (schema.TokenFile(path=str(tmp_path), vocab_size=9, end_id=1), r"/\xff.bin"),
    ):
        with pytest.raises(DataError, match=re.escape(f"{name}': the name is not UTF-8")):
            sources.open_source(section, tmp_path / "memory")
    (tmp_path / "in" / odd / "sub").mkdir()
    (tmp_path / "in" / odd / "top.txt").rename(tmp_path / "in" / odd / "sub" / "a.txt")
    found = read(schema.TextFolder(path=str(tmp_path / "in" / odd)), tmp_path)
    assert [item[:2] for item in found] == [("sub", "sub/a.txt")]  # the folder names no document


def test_text_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(DataError, match=r"a.txt:2: not UTF-8 \(byte 8\)"):
        read(schema.TextFolder(path=str(tmp_path)), tmp_path)


def test_paths_that_are_not_there(tmp_path):
    (tmp_path / "corpus").mkdir()
    for path, message in (
        ("", "data.path is empty"),
        (str(tmp_path / "corpsu"), "no such file or folder; did you mean corpus"),
        (str(tmp_path / "zzz"), r"no such file or folder; .* has: corpus"),
        (str(tmp_path / "no" / "where"), "there is no folder"),
    ):
        with pytest.raises(DataError, match=message):
            sources.open_source(schema.TextFolder(path=path), tmp_path / "memory")


def test_selections_that_are_empty_or_wrong(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text("x")
    for section, message in (
        (schema.TextFolder(path=str(folder)), r"no file matches \*\*/\*.txt; .* ending in .md"),
        (schema.TextFolder(path=str(folder), pattern="/etc/*"), "data.pattern '/etc/"),
        (schema.TextFolder(path=str(folder), pattern=""), "data.pattern ''"),
        (schema.TextFolder(path=str(folder / "a.md")), "a file came, a folder"),
        (schema.Parquet(path=str(folder)), r"no file matches \*\*/\*.parquet"),
    ):
        with pytest.raises(DataError, match=message):
            sources.open_source(section, tmp_path / "memory")


def test_hashes_are_remembered_for_settled_files_only(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("text")
    selection, memory, hashed = [("a.txt", path)], tmp_path / "memory", []
    digest = files.digest
    monkeypatch.setattr(files, "digest", lambda path: hashed.append(path) or digest(path))
    for _ in range(2):  # just written: may change again within the clock's resolution
        files.digests(selection, memory)
    assert len(hashed) == 2
    os.utime(path, ns=(0, 0))
    first, second = (files.digests(selection, memory) for _ in range(2))
    assert len(hashed) == 3 and first == second
    path.write_text("TEXT")
    os.utime(path, ns=(1, 1))
    assert files.digests(selection, memory) != first
