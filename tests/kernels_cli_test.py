"""`moelab kernels`: tables, JSON, exit codes, what it says to a typo and without the compilers."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from moelab import cli, environment
from moelab.cli import kernels
from pallas_kernels import aot
from pallas_kernels.verify import runner

MMA = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X"
GOOD = runner.Result(
    target="gb200",
    arch="sm_100a",
    family="mosaic_sm100",
    case="128x128",
    format="nvfp4",
    kernels=(runner.Facts("grouped", {MMA: 4}, {"UTCOMMA.4X": 4}, 8, 4, 68, 256, 0, 200821, 512),),
    temp_bytes=4880,
    problems=(),
    seconds=1.0,
)
BAD = dataclasses.replace(GOOD, target="b200", problems=("grouped: 8 bytes spilled",))
DEAD = dataclasses.replace(GOOD, kernels=(), temp_bytes=None, problems=("ended: signal 6",))


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Runs the command line in this process, on results that are given and with a plugin that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr(aot, "missing", lambda: "")
    known = dict.fromkeys(("b200", "gb200", "h100"))
    monkeypatch.setattr(aot, "targets", lambda: known)

    def run(*argv, results=()):
        asked = []

        def verify(targets, names):
            asked.append((tuple(targets), tuple(names)))
            yield from results

        monkeypatch.setattr(runner, "verify", verify)
        code = cli.main(["kernels", *argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, asked=asked)

    return run


def test_a_table_with_everything_that_was_counted(call):
    done = call("verify", results=[GOOD])
    assert done.code == 0 and done.asked == [(("b200", "gb200", "h100"), ())]
    header, row, total = done.out.splitlines()
    assert header.split()[:4] == ["gpu", "kernel", "case", "format"]
    for text in (
        "gb200 sm_100a",
        "mosaic_sm100",
        "128x128",
        "nvfp4",
        "4 UTCOMMA.4X",
        " 8 ",
        " 68 ",
    ):
        assert text in row
    assert "4 kind::mxf4nvf4.block_scale.scale_vec::4X" in row and row.endswith("4880  ok")
    assert total == "1 of 1 as expected; not yet run on hardware"


def test_problems_are_said_and_the_exit_code_is_1(call):
    done = call("verify", results=[GOOD, BAD, DEAD])
    lines = done.out.splitlines()
    assert done.code == 1
    assert [line.split()[0] for line in lines[1:4]] == ["b200", "gb200", "gb200"]  # as targets go
    assert lines[1].endswith("FAILED") and lines[3].split()[-2:] == ["-", "FAILED"]
    assert "b200 mosaic_sm100 128x128 nvfp4: grouped: 8 bytes spilled" in lines
    assert "gb200 mosaic_sm100 128x128 nvfp4: ended: signal 6" in lines
    assert lines[-1].startswith("1 of 3 as expected")


def test_json_has_the_same(call):
    done = call("verify", "--json", results=[GOOD, BAD])
    found = json.loads(done.out)
    assert done.code == 1 and found["skipped"] == ""
    assert [r["target"] for r in found["results"]] == ["b200", "gb200"]
    assert found["results"][0]["problems"] == ["grouped: 8 bytes spilled"]
    assert found["results"][1]["kernels"][0]["mma_ptx"] == {MMA: 4}


def test_gpus_and_kernels_are_chosen(call):
    done = call("verify", "--target=h100,b200", "--kernel=mosaic_sm100")
    assert done.asked == [(("h100", "b200"), ("mosaic_sm100",))]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--target=b20", "no GPU 'b20'; did you mean b200?"),
        ("--target=abacus", "no GPU 'abacus'; there are b200, gb200, h100"),
        ("--kernel=mosaic_s100", "no kernel 'mosaic_s100'; did you mean mosaic_sm100?"),
    ],
)
def test_a_typo_is_met_with_what_was_meant(call, option, said):
    done = call("verify", option)
    assert done.code == 2 and done.out == "" and done.asked == []
    assert done.err.strip() == f"moelab: {said}"


def test_without_the_compilers_it_says_what_to_install(call, monkeypatch):
    monkeypatch.setattr(aot, "missing", lambda: "not installed: triton (pip install 'moelab[aot]')")
    done = call("verify", "--json")
    assert done.code == 0 and done.asked == []
    assert "skipped: not installed: triton (pip install 'moelab[aot]')" in done.err
    assert json.loads(done.out)["skipped"].startswith("not installed: triton")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (MMA, "kind::mxf4nvf4.block_scale.scale_vec::4X"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", "m64n8k16.f32.bf16.bf16"),
        ("mma.sync.aligned.m16n8k16", "mma.sync.aligned.m16n8k16"),
    ],
)
def test_instructions_are_shortened(name, said):
    assert kernels.short(name) == said


def test_the_list_says_that_nothing_has_run_on_hardware(call, monkeypatch):
    monkeypatch.setattr("pallas_kernels.targets.plugin", lambda: None)
    done = call("list", "--json")
    found = {row["kernel"]: row for row in json.loads(done.out)}
    assert found["mosaic_sm100"]["formats"] == ["mxfp4", "nvfp4"]
    assert {row["hardware"] for row in found.values()} == {"not yet run on hardware"}
    assert all(row["interpreted"] and row["cases"] for row in found.values())
    assert "not yet run on hardware" in call("list").out
