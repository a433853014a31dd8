"""A whole run through the command line's function: train, resume what is finished, verify, evaluate, generate."""

import json

import pytest
from small_run import CONFIG, write_text

import moelab
from moelab import evaluate, generate, metrics
from moelab.report.verify import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two small domains of text of our own."""
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory, request):
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = CONFIG | {"data": dict(kind="text", path=str(folder))}
    return config, moelab.run(config, workdir)


def test_a_run_leaves_its_record(run):
    _, result = run
    assert result.exit_code == 0
    files = {path.name for path in result.directory.iterdir()}
    assert {"config.json", "metrics.jsonl", "result.json", "RESULT.md", "report.html"} <= files
    records = metrics.read(result.directory / "metrics.jsonl")
    kinds = [r["kind"] for r in records]
    assert kinds.count("train") == 3 and kinds.count("evaluation") == 1
    rows = result.card["evaluation"]["rows"]
    assert [row["precision"] for row in rows] == ["float32", "nvfp4_wa"]
    assert rows[0]["loss_delta"] == 0 and rows[0]["router_agreement"] == 1
    assert set(rows[0]["bits_per_byte"]) == {"north", "south", "all"}
    # 1 layer, 4 experts, 3 matrices of 32 x 32: 4 bytes, or 4.5 bits and a float32 per matrix and expert
    # (gate and up are one matrix).
    assert rows[0]["expert_bytes"] == 4 * 4 * 3 * 32 * 32
    assert rows[1]["expert_bytes"] == 4 * 3 * 32 * 32 * 4.5 / 8 + 4 * 2 * 4


def test_the_card_verifies_and_a_changed_loss_does_not(run, tmp_path):
    _, result = run
    assert verify(result.directory) == []
    path = result.directory / "result.json"
    original = path.read_text()
    card = json.loads(original)
    card["evaluation"]["rows"][1]["loss"] += 1e-3
    path.write_text(json.dumps(card))
    problems = verify(result.directory)
    path.write_text(original)
    assert problems and any("loss" in problem for problem in problems)


def test_a_finished_run_is_not_run_again(run):
    config, result = run
    before = (result.directory / "result.json").read_bytes()
    again = moelab.run(config, result.directory)
    assert again.exit_code == 0 and again.card == result.card
    assert (result.directory / "result.json").read_bytes() == before


def test_another_config_is_refused(run):
    config, result = run
    with pytest.raises(moelab.ConfigError, match="seed"):
        moelab.run(config | {"seed": 4}, result.directory)


def test_evaluating_again_gives_the_same_numbers(run):
    _, result = run
    section = evaluate.evaluate_run(result.directory)
    for row, wanted in zip(section["rows"], result.card["evaluation"]["rows"], strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert row["expert_bytes"] == wanted["expert_bytes"]


def test_generate_is_a_function_of_the_seed(run):
    _, result = run
    texts = [
        generate.generate_run(result.directory, "snow", max_tokens=8, seed=seed) for seed in (0, 0)
    ]
    assert texts[0] == texts[1]
