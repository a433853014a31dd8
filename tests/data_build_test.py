"""moelab/data/build.py, writer.py, dataset.py: built whole or not at all, the same bytes every time."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from moelab import data, schema
from moelab.data import DataError, split
from moelab.data import dataset as dataset_lib

BYTE, BPE = schema.Byte(), schema.Bpe(vocab_size=280)


def write_texts(root, documents=60, domains=("prose", "code")):
    """Writes small documents; by their hashes some fall into every split."""
    for domain in domains:
        (root / domain).mkdir(parents=True)
        for i in range(documents):
            (root / domain / f"{i}.txt").write_text(
                f"{domain} number {i}: " + "words and é " * (i % 7)
            )
    return schema.TextFolder(path=str(root))


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts")


@pytest.mark.parametrize("settings", [BYTE, BPE], ids=["byte", "bpe"])
def test_every_document_comes_back_from_its_split(texts, tmp_path, settings):
    dataset = data.build(texts, settings, cache=tmp_path)
    assert dataset.domains == ("code", "prose")  # found by name
    found = {}
    for name in data.SPLITS:
        part = dataset.split(name)
        assert len(part) == len(part.ids) > 0
        for i, document_id in enumerate(part.ids):
            domain = dataset.domains[part.domain_N[i]]
            assert split.split_of(domain, document_id) == name
            tokens = part.document(i)
            assert tokens[-1] == dataset.tokenizer.end_id and len(tokens) == part.num_tokens_N[i]
            text = dataset.tokenizer.decode(tokens)
            assert part.num_bytes_N[i] == len(text.encode())
            found[document_id] = text
    root = tmp_path / "texts"
    assert found == {f.relative_to(root).as_posix(): f.read_text() for f in root.rglob("*.txt")}


def test_counts_of_the_manifest(texts, tmp_path):
    manifest = data.build(texts, BYTE, cache=tmp_path).manifest
    assert manifest["fallback"] is False and manifest["kind"] == "text"
    for name in ("documents", "bytes", "tokens"):
        for counts in manifest["splits"].values():
            assert counts[name] == sum(entry[name] for entry in counts["domains"].values())
    totals = {
        name: sum(counts[name] for counts in manifest["splits"].values())
        for name in ("documents", "bytes", "tokens")
    }
    assert totals["documents"] == 120
    # A byte is a token, and every document has an end token.
    assert totals["tokens"] == totals["bytes"] + 120


def test_same_texts_elsewhere_give_the_same_bytes(texts, tmp_path):
    first = data.build(texts, BPE, cache=tmp_path / "one")
    shutil.copytree(tmp_path / "texts", tmp_path / "away" / "texts")
    moved = dataclasses.replace(texts, path=str(tmp_path / "away" / "texts"))
    second = data.build(moved, BPE, cache=tmp_path / "two")
    assert first.sha256 == second.sha256
    assert first.directory.name == second.directory.name
    names = [p.relative_to(first.directory) for p in first.directory.rglob("*") if p.is_file()]
    assert len(names) == 2 + 3 + 6  # manifest and tokenizer, three indices, 3 splits x 2 domains
    for name in names:
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()
    for path in (first.directory / "manifest.json",):
        assert str(tmp_path) not in path.read_text()


def test_any_change_gives_another_dataset(texts, tmp_path):
    root = tmp_path / "texts"
    names = {data.build(texts, BYTE, cache=tmp_path).directory.name}
    names.add(data.build(texts, BPE, cache=tmp_path).directory.name)
    names.add(data.build(texts, schema.Bpe(vocab_size=281), cache=tmp_path).directory.name)
    (root / "prose" / "0.txt").write_text("Prose number 0: ")  # one letter, same size
    names.add(data.build(texts, BYTE, cache=tmp_path).directory.name)
    (root / "prose" / "0.txt").rename(root / "prose" / "new.txt")
    names.add(data.build(texts, BYTE, cache=tmp_path).directory.name)
    assert len(names) == 5


def test_second_call_only_opens(texts, tmp_path, monkeypatch):
    first = data.build(texts, BYTE, cache=tmp_path)
    monkeypatch.setattr(sys.modules["moelab.data.build"], "_write", None)  # would fail if called
    assert data.build(texts, BYTE, cache=tmp_path).sha256 == first.sha256


def test_sections_may_be_config_dicts(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "from_environment"))
    section = ml_collections.ConfigDict(dataclasses.asdict(texts)).lock()
    dataset = data.build(section, ml_collections.ConfigDict({"kind": "byte"}))
    assert dataset.directory.parent == tmp_path / "from_environment" / "data"
    with pytest.raises(DataError, match="data.kind is 'txt', wanted one of corpus, text"):
        data.build({"kind": "txt"}, BYTE)


def test_cache_defaults_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MOELAB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert data.cache_directory() == tmp_path / "cache"


def test_empty_documents_are_counted(tmp_path):
    texts = write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "prose" / "empty.txt").write_text("")
    dataset = data.build(texts, BYTE, cache=tmp_path)
    assert dataset.manifest["empty_documents"] == {"prose": 1}
    assert sum(len(dataset.split(name)) for name in data.SPLITS) == 120


def test_hash_of_a_domain_is_of_its_texts_joined_by_zero(tmp_path):
    (tmp_path / "t" / "d").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "t" / "d" / f"{name}.txt").write_text(f"text {name}")
    dataset = data.build(schema.TextFolder(path=str(tmp_path / "t")), BYTE, cache=tmp_path)
    # printf 'text a\0text b' | sha256sum
    wanted = "8958e58bdd7043a9"
    assert dataset.manifest["sources"]["d"]["sha256"].startswith(wanted)


@pytest.mark.parametrize("settings", [BYTE, BPE], ids=["byte", "bpe"])
def test_a_bad_line_is_an_error_with_its_place(tmp_path, settings):
    """Also from inside the tokenizer's training, which reads the documents first."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine words"}\n' * 300 + "{oops\n")
    with pytest.raises(DataError, match="d.jsonl:301: not JSON"):
        data.build(schema.JsonLines(path=str(path)), settings, cache=tmp_path)
    assert not [item for item in (tmp_path / "data").iterdir() if item.name.startswith(".tmp")]


def test_without_file_locks(texts, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    dataset = data.build(texts, BYTE, cache=tmp_path)
    assert data.verify(dataset.directory) == []


def test_an_id_is_wanted_once(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "x", "id": "same"}\n{"text": "y", "id": "same"}\n')
    section = schema.JsonLines(path=str(path), id_column="id")
    with pytest.raises(DataError, match="domain 'd' has two documents with id 'same'"):
        data.build(section, BYTE, cache=tmp_path)


def test_a_domain_is_a_coarse_label(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"text": "x", "url": "u{i}"}}\n' for i in range(200)))
    section = schema.JsonLines(path=str(path), domain_column="url")
    with pytest.raises(DataError, match=r"more than 128 domains \(u0, u1, .*data.domain_column"):
        data.build(section, BYTE, cache=tmp_path)


@pytest.mark.parametrize("content", ["", '{"text": ""}\n'])
@pytest.mark.parametrize("settings", [BYTE, BPE], ids=["byte", "bpe"])
def test_no_text_at_all(tmp_path, content, settings):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match="no document with text|training split is empty"):
        data.build(schema.JsonLines(path=str(tmp_path / "d.jsonl")), settings, cache=tmp_path)


def test_odd_domain_names_are_safe_file_names(tmp_path):
    records = [
        {"text": f"{i}", "domain": name} for i, name in enumerate(["../up", "a/b", "a b", "é"])
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    section = schema.JsonLines(path=str(tmp_path / "d.jsonl"), domain_column="domain")
    dataset = data.build(section, BYTE, cache=tmp_path)
    assert dataset.domains == ("../up", "a b", "a/b", "é")
    assert data.verify(dataset.directory) == []
    files = [path for path in (tmp_path / "data").rglob("*.bin")]
    assert len(files) == 4 and all(path.parent.parent == dataset.directory for path in files)


def test_an_interrupted_build_leaves_nothing_behind(texts, tmp_path):
    def interrupt(text, done, total):
        if text == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.build(texts, BYTE, cache=tmp_path, progress=interrupt)
    assert not [
        path for path in (tmp_path / "data").iterdir() if path.is_dir() and path.name != "files"
    ]
    # What a killed process leaves is removed by the next one.
    leftover = (
        tmp_path / "data" / f".tmp-{data.build(texts, BYTE, cache=tmp_path).directory.name}-x"
    )
    shutil.rmtree(tmp_path / "data" / leftover.name[5:-2])
    leftover.mkdir()
    data.build(texts, BYTE, cache=tmp_path)
    assert not leftover.exists()


BUILD = """
import sys
from moelab import data, schema
texts = schema.TextFolder(path=sys.argv[1])
print(data.build(texts, schema.Bpe(vocab_size=280), cache=sys.argv[2]).sha256)
assert "jax" not in sys.modules and "grain" not in sys.modules
"""


def test_two_processes_at_once(texts, tmp_path):
    command = [sys.executable, "-c", BUILD, texts.path, str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = {process.communicate(timeout=60)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(results) == 1 and len(results.pop().strip()) == 64
    assert len(list((tmp_path / "cache" / "data").glob("text-*"))) == 1
    assert not list((tmp_path / "cache" / "data").glob(".tmp-*"))


def test_losing_the_race_without_locks(texts, tmp_path, monkeypatch):
    winner = data.build(texts, BYTE, cache=tmp_path)
    build_module = sys.modules["moelab.data.build"]
    answers = iter([False, False, True, True])  # not there, not there; after the rename: there
    monkeypatch.setattr(build_module, "_usable", lambda directory: next(answers))
    monkeypatch.setattr(build_module.shutil, "rmtree", _keep(winner.directory))
    assert data.build(texts, BYTE, cache=tmp_path).sha256 == winner.sha256


def _keep(directory):
    remove = shutil.rmtree
    return lambda path, **options: None if path == directory else remove(path, **options)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "gone": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(
        path.read_bytes()[:10] + bytes([path.read_bytes()[10] ^ 1]) + path.read_bytes()[11:]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train/0-code.bin", "test/documents.npz", "manifest.json"])
def test_damage_is_found(texts, tmp_path, damage, name, capsys):
    dataset = data.build(texts, BYTE, cache=tmp_path)
    assert data.verify(dataset.directory) == []
    DAMAGES[damage](dataset.directory / name)
    problems = data.verify(dataset.directory)
    assert len(problems) == 1 and name in problems[0]
    if (
        damage != "flipped" or name == "manifest.json"
    ):  # a flip inside a file is for verify() to find
        with pytest.raises(DataError, match=name):
            data.load(dataset.directory)
        again = data.build(texts, BYTE, cache=tmp_path)  # repairs it, and says so
        assert "is damaged and is built again" in capsys.readouterr().err
        assert data.verify(again.directory) == [] and again.sha256 == dataset.sha256


def test_an_edited_manifest_is_found(texts, tmp_path):
    dataset = data.build(texts, BYTE, cache=tmp_path)
    path = dataset.directory / "manifest.json"
    path.write_text(path.read_text().replace('"fallback": false', '"fallback": true'))
    with pytest.raises(DataError, match="does not have the sha256 that it states"):
        data.load(dataset.directory)


def test_loading_what_is_no_dataset(texts, tmp_path):
    with pytest.raises(DataError, match="manifest.json is missing"):
        data.load(tmp_path)
    directory = data.build(texts, BYTE, cache=tmp_path).directory
    manifest = json.loads((directory / "manifest.json").read_text()) | {"format": 99}
    manifest["sha256"] = dataset_lib.manifest_sha256(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not of format 1"):
        data.load(directory)


def test_no_such_split(texts, tmp_path):
    with pytest.raises(DataError, match="no split 'valid', wanted one of train, validation, test"):
        data.build(texts, BYTE, cache=tmp_path).split("valid")


def test_an_unwritable_memory_of_hashes_only_costs_time(texts, tmp_path):
    for path in (tmp_path / "texts").rglob("*.txt"):
        os.utime(path, ns=(0, 0))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "files").write_text("in the way of the folder")
    assert data.build(texts, BYTE, cache=tmp_path).sha256
    assert (tmp_path / "data" / "files").is_file()


def test_describe_and_sample(texts, tmp_path):
    dataset = data.build(texts, BYTE, cache=tmp_path)
    found = data.describe(dataset)
    assert json.loads(json.dumps(found)) == found
    assert [(row["split"], row["domain"]) for row in found["rows"]][:2] == [
        ("train", "code"),
        ("train", "prose"),
    ]
    row = found["rows"][0]
    assert row["bytes_per_token"] == row["bytes"] / row["tokens"] < 1
    samples = data.sample(dataset, "test", count=2)
    assert {item.domain for item in samples} == {"code", "prose"} and len(samples) <= 4
    for item in samples:
        assert item.text == (tmp_path / "texts" / item.id).read_text()
    assert data.sample(dataset, domain="code")[0].domain == "code"


def test_progress_counts_up(texts, tmp_path):
    calls = []
    data.build(texts, BPE, cache=tmp_path, progress=lambda *call: calls.append(call))
    assert calls[0] == ("reading", 0, 0) and calls[-1] == ("encoding", 120, 120)


def test_documents_are_streamed(tmp_path, monkeypatch):
    """A batch of documents is encoded before the next is read."""
    texts, events = write_texts(tmp_path / "texts"), []
    build_module = sys.modules["moelab.data.build"]
    monkeypatch.setattr(build_module, "BATCH_CHARACTERS", 100)
    encode_batch = data.tokenizer.Bytes.encode_batch
    monkeypatch.setattr(
        data.tokenizer.Bytes,
        "encode_batch",
        lambda self, batch: events.append(len(batch)) or encode_batch(self, batch),
    )
    dataset = data.build(texts, BYTE, cache=tmp_path)
    assert len(events) > 20 and sum(events) == 120
    assert sum(len(dataset.split(name)) for name in data.SPLITS) == 120


def test_tokens_are_memory_mapped_without_pickle(texts, tmp_path):
    dataset = data.build(texts, BYTE, cache=tmp_path)
    assert isinstance(dataset.split("train").tokens[0], np.memmap)
    assert os.path.getsize(dataset.directory / "train" / "0-code.bin") == 2 * len(
        dataset.split("train").tokens[0]
    )
