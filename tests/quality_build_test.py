"""Dirt and filters in a dataset's folder: clean evaluation, labels beside the tokens, the same bytes every time."""

import dataclasses
import doctest
import errno
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest

import moelab
from moelab import config, data, schema
from moelab.cli import main
from moelab.data import DataError, corpus, quality, split
from moelab.data.quality import filters, workers

BYTE, BPE = schema.Byte(), schema.Bpe(vocab_size=300)
DIRT = ("word_shuffle share=0.3", "duplicate share=0.3 copies=3")
TOOLS = ("exact", "dsir keep=0.8 domains=prose")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two domains; every document has words of its own."""
    root = tmp_path_factory.mktemp("quality")
    for domain in ("prose", "code"):
        (root / "texts" / domain).mkdir(parents=True)
        for i in range(150):
            words = " ".join(f"{domain}{(i * j * j) % 97}" for j in range(1, 30))
            (root / "texts" / domain / f"{i}.txt").write_text(f"{domain} number {i}: {words}")
    return root


@pytest.fixture(scope="module")
def clean(root):
    return schema.TextFolder(path=str(root / "texts"))


@pytest.fixture(scope="module")
def dirty(clean):
    return dataclasses.replace(clean, inject=DIRT)


@pytest.fixture(scope="module")
def filtered(dirty):
    return dataclasses.replace(dirty, filter=TOOLS)


def part_files(dataset, name):
    return {path.name: path.read_bytes() for path in (dataset.directory / name).iterdir()}


def test_evaluation_splits_and_tokenizer_are_the_clean_ones(root, clean, dirty, filtered):
    built = [data.build(one, BPE, cache=root) for one in (clean, dirty, filtered)]
    assert len({one.sha256 for one in built}) == len({one.directory for one in built}) == 3
    for one in built[1:]:
        assert one.tokenizer.sha256 == built[0].tokenizer.sha256
        for name in ("validation", "test"):
            assert part_files(one, name) == part_files(built[0], name)
    assert built[0].quality is None and "quality" not in built[0].manifest


def test_labels_stand_beside_their_documents(root, dirty, filtered):
    for section in (dirty, filtered):
        dataset = data.build(section, BYTE, cache=root)
        table, part = dataset.quality, dataset.split("train")
        kept = np.flatnonzero(table.kept_N)
        assert [table.ids[i] for i in kept] == list(part.ids)
        np.testing.assert_array_equal(table.num_bytes_N[kept], part.num_bytes_N)
        np.testing.assert_array_equal(table.domain_N[kept], part.domain_N)
        assert table.domains == dataset.domains and table.kinds[0] == "clean"
        texts = {
            name: dataset.tokenizer.decode(part.document(n)) for n, name in enumerate(part.ids)
        }
        for i in kept:
            label = table.kinds[table.kind_N[i]]
            original = texts.get(table.sources[i])
            if label == "duplicate" and original is not None:
                assert texts[table.ids[i]] == original
            elif label == "word_shuffle":
                clean = (root / "texts" / table.ids[i]).read_text()
                assert texts[table.ids[i]] != clean
                assert sorted(texts[table.ids[i]].split()) == sorted(clean.split())
            elif label == "clean":
                assert texts[table.ids[i]] == (root / "texts" / table.ids[i]).read_text()


def test_what_was_injected_is_spread_over_the_order(root, clean):
    """Ids of copies follow no rule of the split: in the order of the hash they would come before all originals."""
    section = dataclasses.replace(clean, inject=("near_duplicate share=1",))
    dataset = data.build(section, BYTE, cache=root)
    part = dataset.split("train")
    for domain in (0, 1):
        order = [part.ids[i].endswith("#near") for i in part.by_hash(domain).tolist()]
        # Of some 270 documents half are copies; 27 drawn at random have 13.5 +- 2.6 of them.
        assert len(order) > 250 and 5 <= sum(order[: len(order) // 10]) <= 22
        assert order.index(False) < 6
    plain = data.build(clean, BYTE, cache=root).split("train")
    hashes = [split.document_hash("code", plain.ids[i]) for i in plain.by_hash(0)]
    assert hashes == sorted(hashes)  # clean text is in the order that it always had


def test_the_manifest_says_what_was_done(root, filtered):
    dataset = data.build(filtered, BYTE, cache=root)
    found = dataset.manifest["quality"]
    assert tuple(found["inject"]) == DIRT
    assert tuple(found["filter"]) == ("exact", "dsir domains=prose keep=0.8")
    exact, dsir = found["outcomes"]
    assert exact["precision"] == 1 and exact["kinds"]["duplicate"]["removed"] > 20
    assert exact["kinds"]["duplicate"]["removed"] == exact["kinds"]["duplicate"]["documents"]
    assert dsir["domains"]["code"]["kept"] == dsir["domains"]["code"]["documents"]
    assert dsir["domains"]["prose"]["kept"] < dsir["domains"]["prose"]["documents"]
    labels = found["labels"]["prose"]
    assert labels["duplicate"]["documents"] > 0 and "duplicate" not in found["kept_labels"]["prose"]
    train = dataset.manifest["splits"]["train"]
    assert train["documents"] == dsir["documents"] - dsir["removed"] == dataset.quality.kept_N.sum()
    assert train["bytes"] == dsir["bytes"] - dsir["removed_bytes"]
    assert data.verify(dataset.directory) == []
    assert data.describe(dataset)["quality"] == found


def test_the_same_bytes_from_several_processes_and_from_one(root, filtered, monkeypatch):
    monkeypatch.setattr(workers, "CHUNK", 8000)  # many chunks, and so two processes
    started = []
    monkeypatch.setattr(
        workers, "stop", lambda stop=workers.stop: (started.extend(workers._started), stop())
    )
    monkeypatch.setenv("MOELAB_DATA_WORKERS", "2")
    two = data.build(filtered, BYTE, cache=root / "two")
    assert set(started) == {2} and not workers._started
    monkeypatch.setenv("MOELAB_DATA_WORKERS", "1")
    one = data.build(filtered, BYTE, cache=root / "one")
    assert one.sha256 == two.sha256
    assert part_files(one, "train") == part_files(two, "train")


def test_an_interrupted_build_leaves_nothing_and_goes_on(root, filtered, tmp_path, monkeypatch):
    from moelab.data.quality.filters import dsir

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dsir.Filter, "scores", killed)
        with pytest.raises(KeyboardInterrupt):
            data.build(filtered, BYTE, cache=tmp_path)
    left = [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()]
    assert left in ([], ["files"])  # where hashes of files are remembered
    again = data.build(filtered, BYTE, cache=tmp_path)
    assert again.sha256 == data.build(filtered, BYTE, cache=root).sha256


def test_every_word_of_a_text_counts_in_the_name(root, clean):
    texts = [(), ("duplicate",), ("duplicate share=0.2",), ("duplicate seed=1",)]
    tools = [("exact",), ("exact normalise=false",), ("exact domains=prose",)]
    sections = [dataclasses.replace(clean, inject=one) for one in texts]
    sections += [dataclasses.replace(clean, filter=one) for one in tools]
    names = [data.build(one, BYTE, cache=root).directory.name for one in sections]
    assert len(set(names)) == len(names)
    spelt = dataclasses.replace(clean, inject=("duplicate   share=0.10",))
    assert data.build(spelt, BYTE, cache=root).directory.name == names[1]


def test_scores_of_all_documents_without_removing_any(root, filtered):
    table, outcomes = data.score(filtered, BYTE, cache=root)
    assert [one["documents"] for one in outcomes] == [len(table)] * 2
    dataset = data.build(filtered, BYTE, cache=root)
    assert len(table) == len(dataset.quality)
    reached = dict(zip(dataset.quality.ids, dataset.quality.score_FN[0].tolist(), strict=True))
    assert reached == dict(zip(table.ids, table.score_FN[0].tolist(), strict=True))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_scores_are_written(root, filtered, tmp_path, ending):
    table, _ = data.score(filtered, BYTE, cache=root)
    path = tmp_path / f"scores{ending}"
    data.write_scores(table, path)
    if ending == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif ending == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        import csv

        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    assert len(rows) == len(table)
    assert list(rows[0]) == ["domain", "id", "label", "strength", "source", "bytes", *table.filters]
    assert {row["label"] for row in rows} == {"clean", "duplicate", "word_shuffle"}
    code = [row[table.filters[1]] for row in rows if row["domain"] == "code"]
    assert set(code) == {"" if ending == ".csv" else None}  # dsir was for prose


def test_old_configs_keep_their_hash():
    """Of 2026-11-29, before the fields were there."""
    assert config.sha256(config.load("experiments/demo.py").config) == HASH_OF_DEMO
    c = config.load("experiments/demo.py", ["data.inject=duplicate"]).config
    assert config.sha256(c) != HASH_OF_DEMO


HASH_OF_DEMO = "f90564b788121650f612889f9a2168a3225e92054723d4ea70843febb3b73369"


def test_a_bad_text_is_found_with_the_config():
    c = config.load("experiments/demo.py", ["data.filter=minhsh", "data.inject=duplicate share=2"])
    assert [str(problem) for problem in config.validate(c.config)] == [
        "data.inject duplicate: share must be between 0 and 1, got 2",
        "data.filter no filter 'minhsh'; did you mean minhash?",
    ]


def test_token_files_have_no_text_to_spoil():
    with pytest.raises(
        config.ConfigError, match="data.inject: no such field; it belongs to --config.data.kind="
    ):
        config.load("experiments/demo.py", ["data.kind=tokens", "data.inject=duplicate"])


def test_nothing_left_names_filter_and_domain(root, clean):
    section = dataclasses.replace(clean, filter=("gopher_quality domains=code",))
    with pytest.raises(
        DataError, match="'gopher_quality domains=code' leaves no training document of code .of"
    ):
        data.build(section, BYTE, cache=root)
    with pytest.raises(
        DataError, match="'dsir keep=0.0' leaves no training document of code .of 1..., prose"
    ):
        data.build(dataclasses.replace(clean, filter=("dsir keep=0",)), BYTE, cache=root)


def test_a_domain_that_is_not_there_is_named(root, clean):
    section = dataclasses.replace(clean, filter=("exact domains=proze",))
    with pytest.raises(
        DataError, match=r"data.filter: exact: no domain 'proze'; did you mean prose\?"
    ):
        data.build(section, BYTE, cache=root)
    section = dataclasses.replace(clean, inject=("duplicate domains=wiki",))
    with pytest.raises(DataError, match="no domain 'wiki'; the training split has code, prose"):
        data.build(section, BYTE, cache=root)


def test_commands(root, clean, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOELAB_CACHE", str(root))
    where = [
        "--config=demo:smoke",
        "--config.data.kind=text",
        f"--config.data.path={clean.path}",
        "--config.tokenizer.kind=byte",
        f"--config.data.inject={','.join(DIRT)}",
    ]
    out = tmp_path / "kept.jsonl.gz"
    assert main(["data", "filter", *where, "--tool=exact", "--json", f"--out={out}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["filter"] == ["exact"] and found["outcomes"][0]["precision"] == 1
    kept = data.build(
        schema.JsonLines(path=str(out), domain_column="domain", id_column="id"), BYTE, cache=root
    )
    assert sum(len(kept.split(name)) for name in data.SPLITS) == len(
        data.load(found["directory"]).split("train")
    )
    assert (
        main(
            [
                "data",
                "score",
                *where,
                "--tool=exact",
                "--tool=substring",
                f"--out={tmp_path / 's.csv'}",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "precision" in printed and "removed of label" in printed and "substring" in printed
    assert main(["data", "show", *where, "--config.data.filter=exact"]) == 0
    assert "documents kept" in capsys.readouterr().out
    assert main(["data", "tools", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    listed = {row["kind"] for row in rows if row["where"] == "data.filter"}
    assert listed == set(filters.KINDS) and all(row["meaning"] for row in rows)
    for words, message in (
        (["data", "score", *where], "wants --tool=KIND, or a config with data.filter"),
        (
            ["data", "score", *where, "--tool=exatc"],
            "--tool: no filter 'exatc'; did you mean exact?",
        ),
        (["data", "score", *where, "--tool=exact", "--out=a.txt"], "--out: wants FILE.csv"),
        (["data", "filter", *where, "--tool=exact", "--out=a.csv"], "--out: wants FILE.jsonl"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_commands_say_what_the_filters_did_together(root, dirty, monkeypatch, capsys):
    monkeypatch.setenv("MOELAB_CACHE", str(root))
    where = ["--config=demo:smoke", "--config.data.kind=text", f"--config.data.path={dirty.path}"]
    where += ["--config.tokenizer.kind=byte", f"--config.data.inject={','.join(DIRT)}"]
    tools = ["--tool=exact", "--tool=dsir keep=0.8 domains=prose"]
    asked_filter = f"--config.data.filter={','.join(TOOLS)}"

    def row(title):
        tables = capsys.readouterr().out.split("\n\n")
        (found,) = [one for one in tables if one.startswith(title)]
        return found.splitlines()[-1].split()

    assert main(["data", "filter", *where, *tools, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    table = data.load(found["directory"]).quality
    together, gone_N = found["all_filters"], ~table.kept_N
    assert together["removed"] == gone_N.sum() > found["outcomes"][0]["removed"] > 0
    assert together["precision"] == round((gone_N & table.dirty_N).sum() / gone_N.sum(), 6)
    assert together["recall"] == round((gone_N & table.dirty_N).sum() / table.dirty_N.sum(), 6)
    assert "all_filters" not in data.load(found["directory"]).manifest["quality"]
    assert main(["data", "show", *where, asked_filter, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all_filters"] == together
    numbers = [f"{together[key]:.3f}" for key in ("precision", "recall", "clean_removed")]
    wanted = ["all", str(len(table)), str(together["removed"]), *numbers, "-"]
    for words in (["filter", *where, *tools], ["show", *where, asked_filter]):
        assert main(["data", *words]) == 0
        assert row("filter ") == wanted
    assert main(["data", "show", *where, asked_filter]) == 0
    kept = together["domains"]["prose"]
    assert row("bytes kept of domain")[3] == f"{100 * kept['kept_bytes'] / kept['bytes']:.1f}"
    # One filter is the chain; what each does alone is none.
    for words in (["filter", *where, "--tool=exact"], ["score", *where, *tools]):
        assert main(["data", *words]) == 0
        assert "\nall " not in capsys.readouterr().out


WRITES = [
    ("score", "x.csv"),
    ("score", "x.parquet"),
    ("filter", "x.jsonl"),
    ("filter", "x.jsonl.gz"),
]


def asked(command, clean, out):
    """The words of a command that writes."""
    words = ["--config=demo:smoke", "--config.data.kind=text", f"--config.data.path={clean.path}"]
    return ["data", command, *words, "--config.tokenizer.kind=byte", "--tool=exact", f"--out={out}"]


def refused(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(("command", "name"), WRITES)
def test_where_nothing_can_be_written_nothing_is_done(
    clean, tmp_path, monkeypatch, capsys, command, name
):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / f"pipe-{name}")
    for out, message in (
        (f"nowhere/{name}", f" cannot be written: the folder {tmp_path}/nowhere is not there"),
        (f"file/{name}", f" cannot be written: the folder {tmp_path}/file is no folder"),
        (name, " is a folder; a file was wanted"),
        (f"pipe-{name}", " is no ordinary file; a file was wanted"),
        ("n" * 300 + name, " cannot be written: File name too long"),
    ):
        assert main(asked(command, clean, tmp_path / out)) == 2
        assert f"moelab: --out={tmp_path / out}{message}" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert main(asked(command, clean, tmp_path / f"new-{name}")) == 2
    assert f"new-{name} cannot be written: Read-only file system" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("command", "name"), WRITES)
def test_a_file_is_replaced_whole_or_not_at_all(
    root, clean, tmp_path, monkeypatch, capsys, command, name
):
    monkeypatch.setenv("MOELAB_CACHE", str(root))
    (tmp_path / name).write_text("of before")
    (tmp_path / f"link-{name}").symlink_to(name)
    with (
        monkeypatch.context() as patch
    ):  # it could be written to before the work, and no more after
        patch.setattr(os, "replace", refused)
        assert main(asked(command, clean, tmp_path / name)) == 2
        printed = capsys.readouterr()
        assert "precision" in printed.out  # the work was not in vain
        assert f"{name} cannot be written: Read-only file system" in printed.err
    assert (tmp_path / name).read_text() == "of before"
    assert main(asked(command, clean, tmp_path / f"link-{name}")) == 0
    assert (tmp_path / f"link-{name}").is_symlink()
    content = (tmp_path / name).read_bytes()
    assert len(content) > 1000 and len(list(tmp_path.iterdir())) == 2
    if name.endswith(".gz"):
        assert content[10:].startswith(b"link-x.jsonl\0")  # the name that was asked for


def test_importing_quality_imports_no_tool():
    """The rules, the classifier and the signatures are imported by what uses them."""
    code = (
        "import sys; from moelab import data; from moelab.data import quality; "
        "quality.parse_filters(('classifier', 'minhash', 'gopher_quality')); "
        "print([m for m in ('sklearn', 'datatrove', 'rensa', 'joblib', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["mixture", "quality.spec", "quality.shingles", "quality.truth", "quality.ranking"]
)
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"moelab.data.{name}"))
    assert found.attempted and not found.failed


def test_identity_names_the_versions_of_tools(clean):
    found = quality.identity(dataclasses.replace(clean, filter=("minhash", "exact")))["quality"]
    assert list(found["packages"]) == ["rensa"] and found["packages"]["rensa"]
    assert quality.identity(clean) == {}


@pytest.mark.slow
def test_the_numbers_of_the_documentation(tmp_path):
    """What DATA.md says of the filters that learn nothing, on the whole corpus: the same everywhere."""
    c = config.load("experiments/data/dirty.py").config
    if not isinstance(corpus.open_corpus(tuple(c.data.domains)), corpus.PinnedCorpus):
        pytest.skip("the corpus is not installed")
    tools = ("exact", "minhash", "substring", "c4", "fineweb")
    section = schema.Corpus(inject=tuple(c.data.inject), filter=tools)
    table, outcomes = data.score(section, BYTE, cache=tmp_path)
    text = (pathlib.Path(moelab.__file__).parent.parent / "DATA.md").read_text(encoding="utf-8")
    assert f"{len(table):,} documents" in text
    for one in outcomes:
        cells = [f"{one[key]:.3f}" for key in ("precision", "recall", "clean_removed", "auc")]
        row = f"| `{one['filter']}` | {one['removed']:,} | {' | '.join(cells)} |"
        assert row in text, row
