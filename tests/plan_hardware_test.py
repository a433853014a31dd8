"""GPUs: every figure has a source and a date, what was not verified says so, wrong names get the nearest."""

import json
import pathlib
import re

import pytest

from moelab.plan import figures, hardware

NAMES = "a100 h100 h800 h200 b200 b300 gb200 gb300 rtx_pro_6000 rtx_5090".split()


def test_the_gpus_are_there():
    assert list(hardware.GPUS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_unit_source_and_date(name):
    found = hardware.find(name).figures()
    assert {"memory", "bandwidth", "nvlink", "domain", "nic", "power", "peak_bf16"} <= set(found)
    for figure in found.values():
        assert figure.value > 0 and figure.unit and figure.source.text
        assert re.fullmatch(r"20\d\d(-\d\d){0,2}", figure.source.date)
        assert figure.source.status in figures.STATUSES
        assert all(value >= 0 and why for value, why in figure.others)


def test_unverified_figures_say_so():
    assert hardware.find("h800").unverified() == ("nvlink",)
    assert str(hardware.find("h800").nvlink) == "200 GB/s (unverified)"
    assert set(hardware.find("rtx_5090").unverified()) == {"peak_bf16", "peak_fp8", "peak_fp4"}
    assert hardware.find("b200").unverified() == ()
    assert "unverified" not in str(hardware.find("b200").nvlink)


def test_peaks_are_dense():
    """The sparse peak, twice as much, is among the contradictory values and is not the value."""
    for name in ("h100", "h200", "b200", "gb200"):
        for figure in hardware.find(name).peaks.values():
            assert any(abs(value / figure.value - 2) < 0.01 for value, _ in figure.others)
    assert hardware.find("b200").peak("fp4") == 9e15
    assert hardware.find("gb300").peak("fp4") / hardware.find("gb300").peak("fp8") == 3


def test_a_precision_that_a_gpu_lacks():
    with pytest.raises(
        hardware.HardwareError, match="h200 has no fp4 tensor cores.*bf16, fp8.*b200"
    ):
        hardware.find("h200").peak("fp4")


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("b200x8", "b200", 8), ("GB200-NVL72", "gb200", 72), ("h100_sxm x16", "h100", 16)],
)
def test_systems(text, name, count):
    found = hardware.system(text)
    assert (found.gpu.name, found.count) == (name, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b20x8", "did you mean b200"),
        ("mi300x", "there are a100, h100"),
        ("b200x0", "1 to 65536 GPUs, got 0"),
        ("b200x-8", "got -8"),
    ],
)
def test_wrong_systems(text, message):
    with pytest.raises(hardware.HardwareError, match=message):
        hardware.system(text)


def own(**changed):
    gpu = {
        "name": "mine",
        "source": "a data sheet",
        "date": "2026-11-29",
        "peaks": {"bf16": 1e15, "fp8": 2e15},
        "memory": 1e11,
        "bandwidth": 5e12,
        "nvlink": 4e11,
        "domain": 8,
        "nic": 5e10,
        "power": 900,
    }
    return gpu | changed


def test_a_gpu_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(own()))
    found = hardware.system(f"{path}x8")
    assert (found.name, found.gpu.peak("fp8")) == ("minex8", 2e15)
    assert found.gpu.memory.source == figures.Source("a data sheet", "2026-11-29", "assumed")


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (own(memory=-1), "wants a number above 0, got -1"),
        (own(date="soon"), "wants a text, a date"),
        (own(peaks={"fp8": 1e15}), "peaks wants bf16"),
        (own(domain=8.5), "domain wants a whole number of GPUs, got 8.5"),
        (own(name="b200"), "the name b200 is taken"),
        (own(extra=1), "wants exactly the fields"),
        ([1], "got list"),
    ],
)
def test_wrong_gpus_of_ones_own(tmp_path, gpu, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(gpu))
    with pytest.raises(hardware.HardwareError, match=message):
        hardware.find(str(path))


def test_a_missing_file():
    with pytest.raises(hardware.HardwareError, match="no JSON file of a GPU"):
        hardware.find(str(pathlib.Path("nowhere") / "mine.json"))


def test_a_source_wants_all_fields():
    for wrong in (("", "2026"), ("x", "yesterday"), ("x", "2026", "rumour")):
        with pytest.raises(ValueError, match="a source wants"):
            figures.Source(*wrong)
