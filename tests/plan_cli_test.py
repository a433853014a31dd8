"""`moelab plan` and what is below it: results on standard output, the rest on standard error, errors of one line."""

import json
import re
import resource
import subprocess
import sys

import pytest

from moelab import cli
from moelab.plan import calibration, measured, prices

needs_wheel = pytest.mark.skipif(measured.folder() is None, reason="extra plan-data not installed")


def run(capsys, *words):
    code = cli.main(["plan", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_is_quick_and_imports_no_jax():
    script = "import sys; from moelab import cli; cli.main(['plan', '--help']); sys.exit('jax' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # its own time: the machine may be busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert "compare" in done.stdout and "--hardware" in done.stdout


def test_a_plan_needs_no_jax():
    script = (
        "import sys; from moelab import cli; "
        "sys.exit(cli.main(['plan', '--json', '--hardware=b200x4', '--precision=nvfp4']) or 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["systems"][0]["system"] == "b200x4"


def test_a_plan(capsys):
    words = ("--hardware=b200x8,h200x8", "--precision=nvfp4,fp8", "--user=50")
    code, out, err = run(capsys, "--model=deepseek_v3", *words)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("system") and "$/M tok" in lines[0]
    assert any(line.startswith("b200x8  nvfp4") for line in lines)
    assert re.search(r"b200x8 nvfp4 pays up to \d\.\d\d times the GPU-hour of h200x8 fp8", out)
    at_50 = re.search(r"b200x8 nvfp4 at 50 tokens/s/user: (\d+) \[(\d+), (\d+)\] tokens/s/GPU", out)
    best, low, high = map(int, at_50.groups())
    # wider than the band of one configuration: at half the speed a batch is smaller too
    bounds = calibration.shipped().bounds(False)
    assert low < best / bounds[1] and high > best / bounds[0]
    assert "joules at the wall: what the GPU is sold with x 1.25 x a PUE of 1.25 (assumed)" in err
    assert "basis owner" in err and "80 % band" in err and "unverified" not in err


def test_json_has_the_whole_front(capsys):
    code, out, _ = run(capsys, "--hardware=b200x8", "--precision=nvfp4", "--json", "--price=3")
    read = json.loads(out)
    front = read["systems"][0]["front"]
    assert code == 0 and len(front) > 7
    for row in front:
        assert row["tpot_ms_low"] < row["tpot_ms"] < row["tpot_ms_high"]
        assert row["dollars_per_million"] == pytest.approx(
            prices.per_million(3, row["gpu_tokens_per_s"])
        )
        for name in ("gpu_tokens_per_s", "dollars_per_million", "joules_per_token"):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
            assert row[f"{name}_high"] / row[f"{name}_low"] == pytest.approx(
                row["tpot_ms_high"] / row["tpot_ms_low"]
            )
    assert read["equal_speed"] == []


def test_json_compares_at_one_speed(capsys):
    words = ("--hardware=b200x8,h200x8", "--precision=nvfp4,fp8", "--json", "--price=3")
    _, out, _ = run(capsys, *words, "--user=50")
    first, second = json.loads(out)["equal_speed"]
    assert second["break_even_of"] == "b200x8 nvfp4" and "break_even" not in first
    assert second["break_even"] == first["gpu_tokens_per_s"] / second["gpu_tokens_per_s"]
    _, out, _ = run(capsys, *words, "--user=170")
    first, second = json.loads(out)["equal_speed"]
    assert first["gpu_tokens_per_s"] and second["gpu_tokens_per_s"] is None  # H200 is not so fast


@pytest.mark.parametrize("name", ["tiny", "demo", "routing/olmoe", "serving/packed"])
def test_a_plan_of_moelabs_own_models(capsys, name):
    """Experts narrower than a kernel's tile fit whole, and no cost is so small that it prints as 0."""
    code, out, err = run(capsys, f"--model={name}", "--hardware=h100x2", "--precision=bf16")
    assert code == 0 and "outside" in out and "parameters" in err
    dollars = [float(x) for x in re.findall(r"(\S+) \[\S+ \S+\]  \S+ +outside$", out, re.MULTILINE)]
    assert dollars and all(0 < x < 2 for x in dollars)


def test_unverified_figures_are_printed_as_such(capsys):
    _, _, err = run(capsys, "--hardware=h800x16", "--precision=fp8")
    assert "nvlink 200 GB/s (unverified)" in err
    assert "no cost: no owner price of h800; none is known" in err


def test_outside_the_calibrated_range(capsys):
    _, out, err = run(capsys, "--hardware=gb200", "--model=hypothetical_10t", "--precision=nvfp4")
    assert "outside" in out and "outside the calibrated range" in err and "parameters" in err


def test_switches_change_the_plan(capsys):
    base = ("--hardware=b200x8", "--precision=nvfp4", "--json")
    best = {}
    for name, words in {
        "plain": (),
        "draft": ("--draft=2",),
        "apart": ("--mode=disaggregated",),
        "old": ("--software=2025-06-01",),
        "vllm": ("--engine=vllm",),
    }.items():
        _, out, _ = run(capsys, *base, *words)
        best[name] = json.loads(out)["systems"][0]["front"][0]["user_tokens_per_s"]
    assert best["draft"] > best["plain"] > best["old"] and best["plain"] > best["vllm"]


def test_software_of_other_years_is_outside(capsys):
    _, out, err = run(capsys, "--hardware=b200x8", "--software=2027-06-01")
    assert "software 1.412731 years after 2026-01-01 is above 0.3039" in err
    assert not re.search(r" ok$", out, re.MULTILINE)


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_a_page(capsys, tmp_path, json_too):
    path = tmp_path / "plan.html"
    words = ("--hardware=b200x8", "--precision=nvfp4", f"--out={path}", *json_too)
    code, _, err = run(capsys, *words)
    text = path.read_text()
    assert code == 0 and f"wrote {path}" in err
    assert text.startswith("<!doctype html>") and "<svg" in text and "b200x8" in text
    assert "mathdefault" not in text and ">100<" in text  # ticks are numbers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model=deepsek_v3",), "no model 'deepsek_v3'; did you mean deepseek_v3"),
        (("--hardware=b20x8",), "no GPU 'b20'; did you mean b200"),
        (("--precision=nvfp",), "no precision 'nvfp'; did you mean nvfp4"),
        (("--hardware=h200x8", "--precision=nvfp4"), "h200 has no fp4 tensor cores"),
        (("--hardware=h100x8", "--model=kimi_k2"), "bytes too many per GPU"),
        (("--hardware=b200x8,h200x8", "--precision=fp8,fp8,fp8"), "2 systems, 3 recipes"),
        (("--software=soon",), "wants YYYY-MM-DD, got 'soon'"),
        (("--software=1990-01-01",), "wants 2024-01-01 to 2028-12-31, got 1990-01-01"),
        (("--hardware=",), "--hardware wants one name at least"),
        (("--precision=,",), "--precision wants one name at least"),
        (("--out=/nowhere/plan.html",), "/nowhere/plan.html cannot be written: No such file"),
        (("--price=cheap",), "no price basis 'cheap'"),
        (("--most_tpot=0.001",), "the limits leave nothing"),
        (("--isl=0",), "wants an int from 1, got '0'"),
        (("compare", "--before=b200x8"), "wants SYSTEM:PRECISION"),
        (("compare", "--before=b200x8:fp8", "--after=b200x8:fp8"), "are the same"),
        (("train", "--hardware=gb200x8"), "bytes too many per GPU"),
        (("train", "--precision=int4"), "training computes in bf16"),
        (("audit", "nowhere.csv"), "no table of measured times"),
        (("train", "--search", "--tp=4"), "--search chooses --tp, --pp and --ep"),
        (("validate", "rows.csv", "--peer_rows=3"), "leave out the FILE"),
        (("--hardware=h100x8",), "it would fit h100x16 or h100x8 in nvfp4_w4a16"),
        (("--hardware=b200x1", "--precision=fp8"), "it would fit b200x4"),
        (("--hardware=h100x8", "--isl=100000000000"), "neither more of them nor fewer bits help"),
        (("clams",), "did you mean"),
    ],
)
def test_errors_are_one_line(capsys, words, message):
    code, out, err = run(capsys, *words)
    assert code == 2 and message in err
    assert len([line for line in err.splitlines() if line.startswith("moelab:")]) == 1


def test_compare(capsys):
    code, out, err = run(capsys, "compare", "--json")
    equal, free = json.loads(out)
    assert code == 0 and equal["basis"].startswith("equal configuration")
    assert free["gain"] > equal["gain"] > 1
    code, out, err = run(capsys, "compare", "--draft=2", "--software_before=2025-10-01")
    assert "speculation" in out and "software" in out and "Shapley" in err
    assert "sequences fit so" not in err


@pytest.mark.filterwarnings("error")
def test_compare_says_what_does_not_fit(capsys):
    """At 0 tokens/s/user it is the highest throughput, without a warning of numpy."""
    _, _, err = run(capsys, "compare", "--batch=300", "--user=0")
    # 8 H200 hold (135.4 GB - 84.4 of weights) / (8704 tokens x 61 x 576 x 2 bytes) = 83 sequences
    assert "h200x8 fp8: 83 sequences fit so, not --batch=300" in err
    # 8 B200: (172.8 - 50.4) / 0.6117 GB
    assert "b200x8 nvfp4: 200 sequences fit so" in err


def test_train(capsys):
    words = ("--model=qwen3_235b", "--hardware=gb200x256,h800x256", "--precision=bf16", "--search")
    code, out, err = run(capsys, "train", *words)
    assert code == 0 and "MFU" in out and "h800x256" in out
    assert "(unverified)" in err and "in sample" in err
    code, out, _ = run(capsys, "train", *words, "--json")
    assert json.loads(out)[0]["low"] < json.loads(out)[0]["tokens_per_s_gpu"]


def test_training_beyond_the_published_rows(capsys):
    words = ("train", "--model=qwen3_235b", "--pp=8", "--ep=32", "--json")
    _, out, _ = run(
        capsys, *words, "--hardware=gb200x256,gb200x4096", "--precision=bf16,nvfp4", "--batch=4096"
    )
    known, beyond = json.loads(out)
    assert known["outside_calibrated_range"] == [] and known["high"] / known["low"] == 1.35 / 0.5
    assert beyond["outside_calibrated_range"] == ["precision nvfp4", "gpus 4096 is above 2048"]
    assert beyond["high"] / beyond["low"] == 4
    _, out, err = run(capsys, *words[:-1], "--precision=nvfp4")
    assert "outside the calibrated range: precision nvfp4" in err and "outside" in out


def test_claims(capsys, tmp_path):
    path = tmp_path / "claims.html"
    code, out, err = run(capsys, "claims", f"--out={path}")
    assert code == 0
    for verdict in ("SUPPORTED", "PARTLY", "NOT SUPPORTED", "NOT TESTABLE HERE"):
        assert f"\n{verdict}: " in f"\n{out}"
    assert "bits per byte lost" in out and "operating point: deepseek_v3" in err
    low, high = calibration.shipped().bounds(False)
    assert f"times per token are {low:.2f} to {high:.2f} of the predicted" in err
    page = path.read_text()
    assert page.count("<svg") >= 8 and "Quality lost against throughput gained" in page


@pytest.mark.parametrize("what", ["gpus", "models", "recipes", "prices", "clouds", "calibration"])
def test_facts(capsys, what):
    code, out, _ = run(capsys, "facts", what)
    assert code == 0 and len(out.splitlines()) > 5
    if what == "gpus":
        lines = [line for line in out.splitlines() if "from memory" in line]
        assert len(lines) == 4 and all("(unverified)" in line for line in lines)


@needs_wheel
@pytest.mark.slow
def test_validate(capsys):
    code, out, err = run(capsys, "validate", "--peer_rows=4")
    assert code == 0 and out.count("median met") == 2 and "NOT met" not in out
    assert "left out by rule" in out and "plain roofline" in out and "no promise" in out
    assert "aiconfigurator: 4 of 4 rows" in err


ROWS = """model,gpu,precision,tp,ep,batch,isl,osl,engine,date,tpot_ms
deepseek_v3,b200,nvfp4+kv8,8,1,32,1024,1024,sglang,2025-11-10,18.48
gpt_oss_120b,h200,mxfp4_w4a16,1,,4,1024,1024,vllm,2026-03-27,6.33
"""


def test_rows_of_ones_own(capsys, tmp_path):
    """Two rows of the wheel, as its own table would be written."""
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    code, out, _ = run(capsys, "validate", str(path), "--json")
    read = json.loads(out)
    assert code == 0 and read["score"]["rows"] == 2
    inside = [row["low"] <= row["measured"] <= row["high"] for row in read["rows"]]
    assert read["score"]["coverage"] == sum(inside) / 2 > 0
    for row in read["rows"]:
        assert row["low"] < row["predicted"] < row["high"]
        assert 0.5 < row["predicted"] / row["measured"] < 1.5 and row["outside"] == []
    code, out, _ = run(capsys, "validate", str(path))
    assert code == 0 and "18.48" in out and "median error" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,gpu\nx,y\n", "precision, tp, batch, isl, osl, tpot_ms is not there"),
        (ROWS.replace("b200", "b20"), "row 0: no GPU 'b20'; did you mean b200"),
        (ROWS.replace("sglang", "mine"), "row 0: engine 'mine' is none of trtllm"),
        (ROWS.replace("6.33", "-1"), "row 1: sizes and times are above 0"),
        (ROWS.replace("6.33", "nan"), "row 1: sizes and times are above 0"),
        (ROWS.replace("gpt_oss_120b", ""), "row 1: model is empty"),
        (ROWS.replace("6.33", ""), "row 1: tpot_ms is empty"),
        (ROWS.replace("h200,mxfp4_w4a16", "h200,mxfp4"), "row 1: h200 has no fp4 tensor cores"),
        (ROWS.replace("2025-11-10", "soon"), "row 0: Invalid isoformat"),
        ("", "is no table"),
    ],
)
def test_wrong_rows_of_ones_own(capsys, tmp_path, text, message):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    code, _, err = run(capsys, "validate", str(path))
    assert code == 2 and message in err


def test_a_calibration_comes_back(tmp_path):
    calibration.save(tmp_path / "x.json", calibration.shipped())
    assert calibration.load(tmp_path / "x.json") == calibration.shipped()


def test_without_the_wheel(capsys, monkeypatch):
    monkeypatch.setattr(measured, "folder", lambda: None)
    for words in (("validate",), ("audit",)):
        code, _, err = run(capsys, *words)
        assert code == 2 and "pip install 'moelab[plan-data]'" in err
    assert run(capsys, "claims")[0] == 0


def test_audit_of_a_file(capsys, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "device,kernel_source,gemm_dtype,m,n,k,latency\n"
        "NVIDIA B200,x,bfloat16,8192,8192,8192,0.1\n"  # 1.1e12 FLOPs in 0.1 ms: 11 PFLOP/s
        "NVIDIA B200,x,bfloat16,8192,8192,8192,0.7\n"
    )
    code, out, _ = run(capsys, "audit", str(path))
    assert code == 0 and "m=8192 n=8192 k=8192" in out and "false positives" in out
    code, out, _ = run(capsys, "audit", str(path), "--json")
    read = json.loads(out)
    assert [row["row"] for row in read["impossible"]] == [0] and len(read["rules"]) == 6


def test_a_route_trace_decides_how_unequal_experts_are(capsys, tmp_path):
    import numpy as np

    from moelab import trace

    equal_T = np.arange(4096) % 64
    for name, first_T in (("equal", equal_T), ("one", np.zeros(4096, int))):
        slots_MTK = np.stack([(first_T + i) % 64 for i in range(8)], -1)[None]
        found = trace.Trace(
            expert_MTK=slots_MTK,
            token_id_T=np.zeros(4096, int),
            domain_T=np.zeros(4096, int),
            document_T=np.zeros(4096, int),
            layers=(0,),
            domains=("x",),
            num_experts=64,
            num_columns=64,
        )
        trace.save(tmp_path / f"{name}.npz", found)
    fastest = {}
    for name in ("equal", "one"):
        words = ("--model=olmoe", "--hardware=b200x1", "--precision=bf16", "--json")
        _, out, _ = run(capsys, *words, f"--routes={tmp_path / name}.npz")
        front = json.loads(out)["systems"][0]["front"]
        fastest[name] = max(r["gpu_tokens_per_s"] for r in front if r["user_tokens_per_s"] > 150)
    assert fastest["one"] > fastest["equal"]  # fewer experts are read
    code, _, err = run(capsys, "--model=deepseek_v3", f"--routes={tmp_path / 'one.npz'}")
    assert code == 2 and "the trace has 64 experts, the model 256" in err
