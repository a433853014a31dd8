"""Whole runs under config.quantization: continuing from a run, switching late, distilling, watching oscillation."""

import numpy as np
import pytest
from small_run import config_with, write_text

import moelab
from moelab import evaluate, metrics
from moelab.quant import packing
from moelab.report.verify import verify
from pallas_kernels import formats

RECIPE = dict(recipe="nvfp4_training")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory, request):
    """run(**sections) -> (result, train records), in a directory of its own."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))

    def go(workdir=None, **sections):
        workdir = workdir or tmp_path_factory.mktemp("runs") / "run"
        result = moelab.run(config_with(folder, **sections), workdir)
        records = metrics.read(workdir / "metrics.jsonl")
        return result, [r for r in records if r["kind"] == "train"]

    return go


@pytest.fixture(scope="module")
def plain(run):
    return run()


def losses(records):
    return [r["loss"] for r in records]


@pytest.mark.slow
def test_a_late_switch_is_plain_before_and_quantized_after(run):
    now = dict(warmup_steps=0)  # so that the first step moves the weights
    plain, late, early, whole = (
        losses(run(schedule=now, quantization=fields)[1])
        for fields in ({}, RECIPE | dict(start_step=2), RECIPE | dict(end_step=1), RECIPE)
    )
    assert late[:2] == plain[:2] and late[2] != plain[2]
    assert early[0] == whole[0] != plain[0]
    # One quantized update, then plain steps: neither run's second step.
    assert early[1] not in (whole[1], plain[1])


def test_a_recipe_changes_training_and_its_card(run, plain):
    result, records = run(quantization=dict(recipe="nvfp4_qat"))
    assert np.allclose(losses(records), losses(plain[1]), rtol=0.05)
    assert losses(records) != losses(plain[1])
    assert result.card["config"]["quantization"]["recipe"] == "nvfp4_qat"


@pytest.mark.slow
def test_continuing_starts_where_the_other_run_ended(run, plain):
    directory = plain[0].directory
    result, records = run(train=dict(start_from=str(directory)), schedule=dict(warmup_steps=3))
    # The first batch is the first run's too, seen with its last parameters.
    ended = evaluate.load_run(directory).state
    assert records[0]["loss"] < losses(plain[1])[0]
    events = [r for r in metrics.read(result.directory / "metrics.jsonl") if r["kind"] == "event"]
    (event,) = [e for e in events if e["event"] == "started_from"]
    assert event["detail"]["run"] == str(directory) and event["detail"]["step"] == 3
    assert int(ended.step) == 3


def test_continuing_from_another_model_is_refused(run, plain):
    sections = dict(train=dict(start_from=str(plain[0].directory)), moe=dict(num_experts=8))
    with pytest.raises(moelab.ConfigError, match="train.start_from=.*other shapes"):
        run(**sections)


@pytest.mark.slow
def test_distilling_oneself_has_no_divergence(run, plain):
    directory = str(plain[0].directory)
    sections = dict(train=dict(start_from=directory), quantization=dict(teacher=directory))
    _, records = run(**sections)
    assert records[0]["divergence"] == pytest.approx(0, abs=1e-5)
    # The language loss is still told, and nothing of it is learnt: the gradient is that of the divergence.
    assert records[0]["loss"] > 1 and records[0]["gradient_norm"] < 1e-3
    assert records[0]["total_loss"] == pytest.approx(records[0]["divergence"], abs=1e-5)


def test_distilling_into_four_bits_brings_the_student_closer(run, plain):
    directory = str(plain[0].directory)
    _, records = run(
        train=dict(start_from=directory, num_steps=12),
        optimizer=dict(learning_rate=3e-3),
        quantization=dict(recipe="nvfp4_qat", teacher=directory),
    )
    divergence = [r["divergence"] for r in records]
    assert 0 < min(divergence) and np.mean(divergence[-4:]) < np.mean(divergence[:4])


@pytest.mark.slow
def test_half_a_teacher_is_half_the_loss(run, plain):
    directory = str(plain[0].directory)
    quantization = dict(recipe="mxfp4_qat", teacher=directory, teacher_share=0.5, temperature=2.0)
    _, records = run(train=dict(start_from=directory), quantization=quantization)
    for r in records:
        assert r["total_loss"] == pytest.approx((r["loss"] + r["divergence"]) / 2, rel=1e-5)


@pytest.mark.slow
def test_oscillation_is_measured_and_reset(run):
    quantization = dict(
        recipe="nvfp4_qat", flip_every=2, reset_every=3, reset_window=3, reset_ratio=1e-3
    )
    _, records = run(train=dict(num_steps=4), quantization=quantization)
    assert ["flip_rate" in r for r in records] == [False, True, False, True]
    assert 0 < records[1]["flip_rate"] < 1
    # A tiny ratio resets whatever flipped in the window, which ends with step 3.
    assert [r["reset_weights"] > 0 for r in records] == [False, False, True, False]


@pytest.mark.slow
def test_oscillation_leaves_layers_and_steps_in_high_precision_alone(run):
    """Resets would show in the weights: they become what they round to."""
    quantization = dict(recipe="nvfp4_qat", flip_every=1, first_layers=1, reset_every=2)
    quantization |= dict(reset_window=2, reset_ratio=1e-6, start_step=2)
    result, records = run(
        model=dict(num_layers=2),
        train=dict(num_steps=4),
        schedule=dict(warmup_steps=0),
        quantization=quantization,
    )
    assert [r["reset_weights"] > 0 for r in records] == [False, False, False, True]
    assert ["flip_rate" in r for r in records] == [False, False, True, True]
    weights = packing.expert_weights(evaluate.load_run(result.directory).state.params)
    share = {}
    for path, w in weights.items():
        value = formats.dequantize(formats.quantize(w, "nvfp4", num_batch_axes=2))
        share[path.split("/")[0]] = float(np.mean(np.asarray(value) == np.asarray(w)))
    assert share["segment_0"] < 0.05 < 0.5 < share["segment_1"]


@pytest.mark.slow
def test_what_happens_between_two_records_is_not_lost(run):
    quantization = dict(
        recipe="nvfp4_qat", flip_every=2, reset_every=3, reset_window=3, reset_ratio=1e-3
    )
    sections = dict(train=dict(num_steps=4), quantization=quantization)
    _, every = run(**sections)
    _, few = run(**sections, logging=dict(every=10))
    assert [r["step"] for r in few] == [1, 4]
    assert few[-1]["reset_weights"] == sum(r["reset_weights"] for r in every[1:]) > 0
    assert few[-1]["flip_rate"] == every[3]["flip_rate"]


@pytest.mark.slow
def test_continuing_with_layers_in_high_precision(run, tmp_path):
    sections = dict(model=dict(num_layers=3), train=dict(num_steps=2))
    base, _ = run(**sections)
    start = dict(sections["train"], start_from=str(base.directory))
    plain, plain_records = run(model=sections["model"], train=start)
    kept = dict(recipe="nvfp4_qat", first_layers=3)
    _, records = run(model=sections["model"], train=start, quantization=kept)
    assert losses(records) == losses(plain_records)  # every layer stays in high precision
    _, records = run(model=sections["model"], train=start, quantization=kept | dict(first_layers=1))
    assert np.allclose(losses(records), losses(plain_records), rtol=0.02)
    assert losses(records) != losses(plain_records)


@pytest.mark.slow
def test_a_validation_says_what_it_computed(run):
    result, _ = run(
        quantization=RECIPE | dict(start_step=2), evaluation=dict(every=1), train=dict(num_steps=3)
    )
    records = metrics.read(result.directory / "metrics.jsonl")
    names = [r["precision"] for r in records if r["kind"] == "evaluation"]
    assert names[:2] == ["float32", "nvfp4_training"]


@pytest.mark.slow
def test_the_card_has_a_row_of_the_recipe_that_trained(run):
    result, _ = run(moe=dict(num_experts=0), quantization=dict(recipe="nvfp4_qat"), balance={})
    rows = {row["precision"]: row for row in result.card["evaluation"]["rows"]}
    assert list(rows) == ["float32", "nvfp4_qat"]  # nothing to pack: no nvfp4_wa
    assert rows["nvfp4_qat"]["loss_delta"] != 0
    assert verify(result.directory) == []


def test_the_teacher_is_recorded(run, plain):
    directory = str(plain[0].directory)
    result, _ = run(quantization=dict(teacher=directory))
    records = metrics.read(result.directory / "metrics.jsonl")
    (event,) = [r for r in records if r["kind"] == "event" and r["event"] == "teacher"]
    assert event["detail"]["digest"] == plain[0].card["checkpoint"]["digest"]


@pytest.mark.slow
def test_soft_moe_trains_with_quantized_gradients(run):
    _, records = run(moe=dict(slots_per_expert=2), quantization=RECIPE, balance={})
    assert np.isfinite(losses(records)).all()


@pytest.mark.slow
def test_a_resumed_run_takes_the_same_path(run, tmp_path, monkeypatch):
    # Stopped by non-finite steps in the middle of the window and of the recipe, then resumed.
    sections = dict(
        train=dict(num_steps=6, max_nonfinite_steps=1),
        quantization=RECIPE | dict(start_step=3, reset_every=5, reset_window=4, reset_ratio=2.0),
    )
    whole, _ = run(**sections)
    monkeypatch.setenv("MOELAB_INJECT_NAN", "5")
    stopped, _ = run(workdir=tmp_path / "run", **sections)
    assert stopped.exit_code == 3
    monkeypatch.delenv("MOELAB_INJECT_NAN")
    resumed, _ = run(workdir=tmp_path / "run", **sections)
    assert resumed.card["checkpoint"]["digest"] == whole.card["checkpoint"]["digest"]
