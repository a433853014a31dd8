"""Every kernel, compiled for every GPU that it is for. The table of `moelab kernels verify` is what this asserts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moelab
from pallas_kernels import aot
from pallas_kernels.targets import SHORT_NAMES
from pallas_kernels.verify import families, runner

ROOT = Path(moelab.__file__).parent.parent
BLACKWELL = ("b200", "gb200", "b300", "gb300", "vr200")
BLOCK_SCALED = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::{}"
MINUTES = 5  # on two cores that have nothing else to do

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(aot.missing()), reason=aot.missing() or "installed"),
]


@pytest.fixture(scope="module")
def verified():
    """The command's exit code, its results, and the seconds of processor time that it took on each core."""
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", "moelab", "kernels", "verify", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1500,
    )
    after = os.times()
    worked = after.children_user + after.children_system
    worked -= before.children_user + before.children_system
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["skipped"] == ""
    seconds = min(worked / 2, time.perf_counter() - start)
    return done.returncode, found["results"], seconds


def test_everything_is_as_expected(verified):
    code, results, _ = verified
    wrong = [
        f"{r['target']} {r['family']} {r['case']} {r['format']}: {problem}"
        for r in results
        for problem in r["problems"]
    ]
    assert not wrong and code == 0, "\n".join(wrong)


def test_every_case_was_compiled(verified):
    _, results, _ = verified
    wanted = runner.cases_for([aot.targets()[name] for name in SHORT_NAMES])
    assert len(results) == sum(map(len, wanted.values()))
    assert {r["family"] for r in results} == set(families())
    assert {r["target"] for r in results} == set(SHORT_NAMES)


@pytest.mark.parametrize("target", BLACKWELL)
@pytest.mark.parametrize(("format", "vector"), [("nvfp4", "4X"), ("mxfp4", "2X")])
def test_blackwell_multiplies_codes(verified, target, format, vector):
    _, results, _ = verified
    kernels = [
        kernel
        for r in results
        if (r["target"], r["family"], r["format"]) == (target, "mosaic_sm100", format)
        for kernel in r["kernels"]
    ]
    # 256 codes of a row in a k-step, 64 in an MMA
    assert {BLOCK_SCALED.format(vector): 4} in [kernel["mma_ptx"] for kernel in kernels]
    assert all(kernel["spill_bytes"] == 0 for kernel in kernels)


def test_it_takes_less_than_five_minutes(verified):
    assert verified[2] < 60 * MINUTES


def test_a_kernel_for_another_architecture_fails_alone(monkeypatch):
    """Mosaic's FP4 products on a GPU without tensor memory: LLVM ends the process."""
    [fp4] = [i for i, c in enumerate(families()["mosaic_sm100"].cases) if c.each_gpu][:1]
    monkeypatch.setattr(runner, "cases_for", lambda *_: {"rtx_pro_6000": [("mosaic_sm100", fp4)]})
    (result,) = runner.verify(["rtx_pro_6000"])
    assert result.kernels == () and "for rtx_pro_6000 ended" in result.problems[0]
