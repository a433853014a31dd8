"""Whatever is changed in a finished run, verify names it; an untouched run passes."""

import copy
import json
import types

import pyarrow as pa
import pyarrow.parquet
import pytest
import run_directory

import moelab
from moelab import config as configs
from moelab.report import card as cards
from moelab.report import documents, verify

DIGEST = "12" * 32


class _CheckpointError(Exception):
    pass


@pytest.fixture
def checkpoint(monkeypatch):
    """Stands in for moelab.checkpoint, whose own tests damage real checkpoints."""
    fake = types.SimpleNamespace(
        CheckpointError=_CheckpointError,
        verify=lambda directory: [],
        read_manifest=lambda directory, step: {"digest": DIGEST},
    )
    monkeypatch.setitem(moelab.__dict__, "checkpoint", fake)
    return fake


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    config = configs.from_dict({"train": {"num_steps": 6}})
    return run_directory.make(
        tmp_path_factory.mktemp("runs") / "run",
        steps=6,
        config=json.loads(json.dumps(configs.record(config)["config"])),
        config_sha256=configs.sha256(config),
        documents_per_domain=4,
    )


@pytest.fixture
def run(pristine, tmp_path, checkpoint):
    for path in pristine.rglob("*"):
        if path.is_file():
            copied = tmp_path / path.relative_to(pristine)
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(path.read_bytes())
    return tmp_path


def _problems(run):
    problems = verify.verify(run)
    assert all("\n" not in problem for problem in problems)
    return problems


def _edit(run, change, sign=False):
    card = json.loads((run / cards.NAME).read_text())
    change(card)
    if sign:  # a forger who knows about the digest
        card["card_sha256"] = cards.digest(card)
    (run / cards.NAME).write_text(json.dumps(card))


def test_an_untouched_run_passes(run):
    assert _problems(run) == []


def test_a_run_under_another_schema_of_configs_is_not_verified(run):
    recorded = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(recorded | {"schema": 1}))
    assert any("configs have schema" in problem and "1" in problem for problem in _problems(run))
    with pytest.raises(configs.ConfigError, match="under schema 1 of configs"):
        configs.check_directory(configs.load(run).config, run)


def _numbers(value, path=()):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _numbers(inner, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def _set(card, path, change):
    for key in path[:-1]:
        card = card[key]
    old = card.get(path[-1]) if isinstance(card, dict) else card[path[-1]]
    card[path[-1]] = change(old)


def test_every_number_of_the_card_is_guarded_by_its_digest(pristine):
    card = cards.read(pristine)
    paths = [path for path in _numbers(card) if path != ("schema",)]
    assert {path[0] for path in paths} >= {"seeds", "training", "evaluation", "parameters"}
    for path in paths:
        changed = copy.deepcopy(card)
        _set(changed, path, lambda v: v + 1)
        assert cards.digest(changed) != card["card_sha256"], path


@pytest.mark.parametrize("section", sorted(cards.SECTIONS))
def test_one_changed_character_in_each_section_is_found(run, section):
    def change(card):
        value = card[section]
        if isinstance(value, str):
            card[section] = ("0" if value[:1] != "0" else "1") + value[1:]
        elif isinstance(value, list):
            value.append("x")
        elif isinstance(value, dict):
            path = next(_numbers(value), None) or (next(iter(value)),)
            _set(value, path, lambda v: v + 1 if not isinstance(v, str) else "f" * 64)
        else:
            card[section] = value + 1

    _edit(run, change)
    assert _problems(run)


ROWS = ("evaluation", "rows", 6)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ((*ROWS, "loss"), 3.0, "evaluation.rows[nvfp4_w].loss is 3.0; the documents give 3"),
        ((*ROWS, "loss_delta"), 0.0, "rows[nvfp4_w].loss_delta is 0.0; the documents give 0.0"),
        ((*ROWS, "loss_delta"), None, "rows[nvfp4_w].loss_delta is None; the documents"),
        ((*ROWS, "bits_per_byte", "code"), 1.0, "rows[nvfp4_w].bits_per_byte.code is 1.0;"),
        ((*ROWS, "bits_per_byte", "all"), "NaN", "rows[nvfp4_w].bits_per_byte.all is NaN;"),
        ((*ROWS, "precision"), "fp2", "rows have other precisions than the documents"),
        (("evaluation", "tokens"), 5, "evaluation.tokens is 5; the documents give"),
        (("evaluation", "documents"), 5, "evaluation.documents is 5; the documents give 12"),
        (("evaluation", "domains"), ["a"], "evaluation.domains differ from those"),
        (("evaluation", "load_by_domain", 1, 2, 3), 2.0, "of block 1, verse sums to"),
        (("training", "steps"), 7, "training.steps is 7; metrics.jsonl ends with 6"),
        (("training", "final_loss"), 1.0, "training.final_loss is 1.0; metrics.jsonl ends with"),
        (("training", "tokens"), 1, "training.tokens is 1; metrics.jsonl ends with 24576"),
        (("training", "nonfinite_steps"), 0, "training.nonfinite_steps is 0;"),
        (("config_sha256",), "00" * 32, "config_sha256 is 000000000000; config gives"),
        (("config", "model", "width"), 512, "config.json: config.model.width differs"),
        (("config", "model", "widht"), 1, "config cannot be read"),
        (("seeds", "seed"), 9, "seeds.seed differs from config.seed"),
        (("checkpoint", "digest"), "00" * 32, "checkpoint.digest differs from the manifest"),
        (("checkpoint", "step"), 5, "checkpoint.step 5 is not the last training step"),
        (("files", "metrics.jsonl"), "00" * 32, "metrics.jsonl: changed after the run"),
        (("files", "../x"), "00" * 32, "points outside the run directory"),
        (("files", "config.json"), "7", "files['config.json'] is no SHA-256"),
        (("evaluation", "rows"), {}, "evaluation.rows wants a list"),
        (("evaluation", "rows"), [7], "evaluation.rows wants a list"),
        (("evaluation", "layers"), 3, "evaluation.layers wants a list, not a whole number"),
        (("training",), [], "section 'training' wants dict, not list"),
    ],
)
def test_a_forged_number_is_named_even_with_a_fresh_digest(run, path, value, message):
    _edit(run, lambda card: _set(card, path, lambda _: value), sign=True)
    assert any(message in problem for problem in _problems(run)), _problems(run)


def test_one_changed_byte_of_the_metrics_is_named(run):
    path = run / "metrics.jsonl"
    content = bytearray(path.read_bytes())
    place = content.rindex(b'"tokens":24576') + len(b'"tokens":')
    content[place] ^= 1  # 24576 becomes 34576
    path.write_bytes(content)
    problems = _problems(run)
    assert "metrics.jsonl: changed after the run: SHA-256 differs from the card's" in problems
    assert any("training.tokens is 24576" in problem for problem in problems)


def test_one_changed_nats_value_is_named(run):
    path = run / documents.NAME
    table = pa.parquet.read_table(path)
    nats = table["nats"].to_pylist()
    row = table["precision"].to_pylist().index("mxfp4_w")
    nats[row] += 0.001
    pa.parquet.write_table(table.set_column(3, "nats", [nats]), path)
    problems = _problems(run)
    assert f"{documents.NAME}: changed after the run: SHA-256 differs from the card's" in problems
    domain = table["domain"][row].as_py()
    named = [p for p in problems if f"rows[mxfp4_w].bits_per_byte.{domain} is" in p]
    assert len(named) == 1
    assert not any("rows[fp8_w]" in p for p in problems)


@pytest.mark.parametrize("name", [cards.NAME, *cards.FILES])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut"])
def test_a_missing_or_damaged_file_is_a_problem_not_a_traceback(run, name, damage):
    path = run / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "garbage": b"\xff{]", "cut": content[:-20]}[damage])
    problems = _problems(run)
    assert any(problem.startswith(name) for problem in problems), problems


def test_the_saved_config_must_be_the_cards(run):
    path = run / "config.json"
    saved = json.loads(path.read_text())
    saved["config"]["optimizer"]["learning_rate"] = 7.0
    path.write_text(json.dumps(saved))
    problems = _problems(run)
    assert "config.json: config.optimizer.learning_rate differs from the card's" in problems


def test_fields_outside_the_hash_may_change_on_a_resume(run):
    path = run / "config.json"
    saved = json.loads(path.read_text())
    saved["config"]["checkpoint"]["every"] = 7
    path.write_text(json.dumps(saved))
    sha = cards.file_sha256(path)
    _edit(run, lambda card: card["files"].update({"config.json": sha}), sign=True)
    assert _problems(run) == []


def test_checkpoint_problems_are_passed_on(run, checkpoint):
    def damaged(directory, step):
        raise _CheckpointError("its manifest cannot be read")

    checkpoint.verify = lambda directory: [f"checkpoint 6: bad leaf in {directory.name}"]
    assert _problems(run) == ["checkpoint 6: bad leaf in checkpoints"]
    checkpoint.verify = lambda directory: []
    checkpoint.read_manifest = damaged
    assert _problems(run) == ["checkpoint 6: its manifest cannot be read"]


def test_no_directory_is_a_problem(tmp_path):
    assert _problems(tmp_path / "nowhere") == [f"{tmp_path / 'nowhere'}: no such run directory"]
