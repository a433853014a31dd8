"""Runs on dirty text: card, resumption, routes of dirt, and perplexity by a run's model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from small_run import CONFIG, write_text

import moelab
from moelab import cli, data, evaluate, perplexity, routes, schema, segregation, trace
from moelab import model as model_lib
from moelab.data import DataError
from moelab.data.document import Document
from moelab.report import routes as reported

DIRT = ("random_strings share=0.3", "duplicate share=0.2 copies=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(folder):
    return CONFIG | {
        "data": dict(kind="text", path=str(folder), inject=DIRT, filter=("dsir keep=1",)),
        "mixture": dict(
            bucket_by="label",
            bucket_weights=("random_strings=0.5",),
            anneal_share=0.34,
            anneal_bucket_weights=("clean=1", "*=0"),
        ),
        "evaluation": dict(tokens_per_domain=2500, precisions=("float32",)),
    }


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    result = moelab.run(config, tmp_path_factory.mktemp("runs") / "run")
    assert result.exit_code == 0
    return result


def test_the_card_says_what_was_injected_filtered_and_drawn(run, folder):
    card = json.loads((run.directory / "result.json").read_text())
    page = (run.directory / "report.html").read_text()
    assert "random_strings share=0.3; duplicate share=0.2 copies=2" in page
    assert "removed 0 of" in page and "drawn of north random_strings" in page
    found = card["data"]["quality"]
    assert tuple(found["inject"]) == DIRT
    assert found["filter"] == ["dsir keep=1.0"] and found["outcomes"][0]["removed"] == 0
    assert found["kept_labels"]["north"]["random_strings"]["documents"] > 5
    drawn = card["data"]["mixture"]
    assert sum(one["drawn"] for one in drawn["streams"]) == 3 * 2  # steps, windows
    assert {one["bucket"] for one in drawn["streams"]} == {"clean", "random_strings", "duplicate"}
    plain = data.build(schema.TextFolder(path=str(folder)), schema.Byte())
    assert card["data"]["sha256"] != plain.sha256
    assert card["data"]["tokenizer_sha256"] == plain.tokenizer.sha256


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_with_the_same_batches(run, config, tmp_path, monkeypatch):
    """Stopped before the last step, in which the mixture is another."""
    from moelab import train

    save = train._Session._after_step

    def killed(session, step, *rest):
        save(session, step, *rest)
        if step == 2:
            session.checkpoints.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train._Session, "_after_step", killed)
        with pytest.raises(KeyboardInterrupt):
            moelab.run(config, tmp_path / "run")
    again = moelab.run(config, tmp_path / "run")
    wanted, came = run.card["evaluation"]["rows"][0], again.card["evaluation"]["rows"][0]
    assert came["loss"] == wanted["loss"]
    assert again.card["data"] == run.card["data"]


@pytest.fixture(scope="module")
def recorded(run):
    return routes.record(run.directory, split="train")


def test_a_trace_of_training_text_has_the_labels(run, recorded):
    dataset = evaluate.load_run(run.directory).dataset
    names, bucket_T = segregation.bucket_of(recorded)
    assert names == ("clean", "random_strings", "duplicate") and set(bucket_T) == {0, 1, 2}
    table = dataset.quality
    kind_N = table.kind_N[table.kept_N]
    np.testing.assert_array_equal(bucket_T, kind_N[recorded.document_T])
    load_MQE = segregation.load(recorded)
    assert load_MQE.sum() == recorded.expert_MTK.size
    np.testing.assert_array_equal(load_MQE.sum((0, 2)), 2 * np.bincount(bucket_T))
    rows = reported.quality(recorded)
    assert [row["bucket"] for row in rows] == list(names)
    assert sum(row["share"][0] for row in rows) == pytest.approx(1)
    # The mean over experts of what they have over their part, by their load, is 1.
    load_E = load_MQE[0].sum(0) / load_MQE[0].sum()
    for row in rows:
        assert np.dot(load_E, row["ratio"][0]) == pytest.approx(1)
    assert segregation.bucket_of(routes.record(run.directory, split="test")) is None


def test_routes_show_has_the_buckets(recorded, tmp_path, capsys):
    trace.save(tmp_path / "t.npz", recorded)
    assert cli.main(["routes", "show", str(tmp_path / "t.npz")]) == 0
    out = capsys.readouterr().out
    assert "quality bucket" in out and "random_strings" in out and "share over chance" in out
    assert "quality information in a domain [nats]" in out
    assert cli.main(["routes", "show", str(tmp_path / "t.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["bucket"] for one in found["quality"]] == ["clean", "random_strings", "duplicate"]
    assert 0 < found["rows"][0]["quality_p_value"] <= 1


TEXTS = [
    Document("d", str(i), text) for i, text in enumerate(("snow and ice", "a", "sun or sand " * 9))
]


def test_bits_are_those_of_the_stream(run):
    """Tokens of all documents one after the other, over two batches of 16 windows of 16; an end token comes first."""
    texts = [*TEXTS, Document("d", "long", "ice or sun " * 20)]
    found = dict(perplexity.bits_per_byte(run.directory, texts, tokens=0))
    loaded = evaluate.load_run(run.directory)
    tokens = np.concatenate([loaded.dataset.tokenizer.encode(one.text) for one in texts])
    stop, full = len(tokens), 2 * 16 * 16
    assert full / 2 < stop < full
    target = np.zeros(full, np.int32)
    target[:stop] = tokens
    token = np.concatenate([[loaded.dataset.tokenizer.end_id], target[:-1]]).astype(np.int32)
    model = model_lib.from_dataset(loaded.config, loaded.dataset)
    variables = {"params": loaded.state.params, "router_state": loaded.state.router_state}
    forward = jax.jit(lambda v, b: evaluate.forward(model, v, b)[0])
    nats = []
    for half in (slice(0, full // 2), slice(full // 2, full)):
        mask = (np.arange(full) < stop)[half].reshape(16, 16)
        rows = (token[half].reshape(16, 16), target[half].reshape(16, 16), mask)
        batch = data.Batch(*rows, np.zeros(16, np.int32), np.zeros((16, 16), np.int32))
        nats.append(np.asarray(forward(variables, batch)).reshape(-1))
    nats, start = np.concatenate(nats), 0
    for number, one in enumerate(texts):
        size = len(one.text.encode())  # a byte is a token
        wanted = nats[start : start + size].sum() / np.log(2) / size
        assert found[number] == pytest.approx(wanted, rel=1e-5)
        start += size


def test_only_the_beginning_is_scored_and_long_streams_are_cut(run):
    many = [one._replace(id=f"{k}-{one.id}") for k in range(9) for one in TEXTS]
    whole = dict(perplexity.bits_per_byte(run.directory, many, tokens=0))
    assert list(whole) == list(range(27))  # 9 * 121 tokens: five batches of 256
    first = dict(perplexity.bits_per_byte(run.directory, many, tokens=3))
    assert list(first) == list(range(27))
    cut = [one._replace(text=one.text[:3]) for one in many]
    assert first == dict(perplexity.bits_per_byte(run.directory, cut, tokens=0))


def test_the_filter_ranks_by_it_and_is_named_by_the_checkpoint(run, folder, tmp_path):
    text = f"perplexity keep=0.6 run={run.directory}"
    section = schema.TextFolder(
        path=str(folder), inject=("random_strings share=0.3",), filter=(text,)
    )
    dataset = data.build(section, schema.Byte())
    table, (outcome,) = dataset.quality, dataset.manifest["quality"]["outcomes"]
    assert not np.isnan(table.score_FN).any() and dataset.quality.kept_N.sum() == len(
        dataset.split("train")
    )
    assert outcome["domains"]["north"]["kept_bytes"] / outcome["domains"]["north"]["bytes"] < 0.7
    (tmp_path / "copy").symlink_to(run.directory)
    moved = dataclasses.replace(section, filter=(f"perplexity keep=0.6 run={tmp_path / 'copy'}",))
    assert data.build(moved, schema.Byte()).directory == dataset.directory
    with pytest.raises(DataError, match="perplexity wants a finished run"):
        data.build(dataclasses.replace(section, filter=("perplexity run=nowhere",)), schema.Byte())
    with pytest.raises(DataError, match="run must name the directory of a finished run"):
        data.build(dataclasses.replace(section, filter=("perplexity",)), schema.Byte())
