"""The audit finds rows that physics does not allow, and only those."""

import csv
import json

import numpy as np
import pytest

from moelab.errors import UserError
from moelab.plan import audit, hardware, measured, physics

B200 = hardware.find("b200")
needs_wheel = pytest.mark.skipif(measured.folder() is None, reason="extra plan-data not installed")


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def experts(**changed):
    row = {
        "device": "NVIDIA B200",
        "kernel_source": "some_kernel",
        "moe_dtype": "nvfp4",
        "num_tokens": 64,
        "hidden_size": 6144,
        "inter_size": 16384,
        "topk": 2,
        "num_experts": 8,
        "moe_tp_size": 1,
        "moe_ep_size": 1,
        "distribution": "balanced",
        "latency": 1.0,
    }
    return row | changed


# 8 experts x 3 x 6144 x 16384 x 4.5 / 8 bytes over 8 TB/s
MIXTRAL_MS = 8 * 3 * 6144 * 16384 * 4.5 / 8 / 8e12 * 1e3


def test_bytes_by_hand(tmp_path):
    rows = [experts(latency=MIXTRAL_MS * f) for f in (0.5, 0.9, 1.0, 2.0)]
    found = audit.run([write(tmp_path / "x.csv", rows)])
    assert sorted(r.row for r in found.impossible) == [0, 1]
    first = found.impossible[0]
    assert first.row == 0 and first.factor == pytest.approx(2, rel=1e-3) and first.reason == "bytes"
    assert sum(found.checked.values()) == 4


def test_flops_by_hand(tmp_path):
    # 2 x 65536 x 8192 x 8192 over 9e15 FLOP/s = 0.977 ms
    least = 2 * 65536 * 8192 * 8192 / 9e15 * 1e3
    row = {"device": "NVIDIA B200", "gemm_dtype": "nvfp4", "m": 65536, "n": 8192, "k": 8192}
    rows = [row | {"latency": least * f} for f in (0.8, 1.1)]
    found = audit.run([write(tmp_path / "x.csv", rows)])
    assert [(r.row, r.reason) for r in found.impossible] == [(0, "FLOPs")]


def test_links_by_hand(tmp_path):
    # 4096 tokens x 7168 x 2 bytes, 7 of 8 leave, over 900 GB/s
    least = 4096 * 7168 * 2 * 7 / 8 / 9e11 * 1e3
    row = {
        "device": "NVIDIA B200",
        "comm_dtype": "bfloat16",
        "ep_size": 8,
        "node_num": 1,
        "hidden_size": 7168,
        "num_tokens": 4096,
        "phase": "combine",
    }
    rows = [row | {"latency": least * f} for f in (0.5, 1.5)]
    found = audit.run([write(tmp_path / "x.csv", rows)])
    assert [(r.row, r.reason) for r in found.impossible] == [(0, "link")]


def test_serving_rows(tmp_path):
    row = {"model": "deepseek_v3", "gpu": "b200", "precision": "fp8", "tp": 8, "dp": 1, "ep": 1}
    row |= {"batch": 1, "isl": 1024, "osl": 1024}
    # a token reads at least its active weights: 36 GB over 8 x 7.7 TB/s = 0.6 ms
    rows = [row | {"tpot_ms": t} for t in (0.3, 1.2, 6.0)]
    found = audit.run([write(tmp_path / "x.csv", rows)])
    assert [r.row for r in found.impossible] == [0]


@pytest.mark.parametrize(
    "changed",
    [
        {"kernel_source": "moe_nongated", "latency": MIXTRAL_MS * 0.7},  # two matrices
        {"moe_dtype": "w4a16_mxfp4", "latency": MIXTRAL_MS},  # few bits
        {"num_tokens": 1, "latency": MIXTRAL_MS * 0.3},  # 2 of 8 experts
        {"distribution": "power_law_1.2", "latency": MIXTRAL_MS * 0.3},
        {"hidden_size": 1024, "inter_size": 1024, "latency": 0.001},  # in the cache
        # DeepSeek: random logits stay within 4 of 8 groups
        {
            "hidden_size": 7168,
            "inter_size": 2048,
            "topk": 8,
            "num_experts": 256,
            "num_tokens": 4096,
            "latency": 128 * 3 * 7168 * 2048 * 4.5 / 8 / 8e12 * 1e3,
        },
    ],
)
def test_false_positives(tmp_path, changed):
    found = audit.run([write(tmp_path / "x.csv", [experts(**changed)])])
    assert found.impossible == ()


def test_what_a_rule_explains_is_counted(tmp_path):
    rows = [experts(kernel_source="moe_nongated", latency=MIXTRAL_MS * 0.7)]
    found = audit.run([write(tmp_path / "x.csv", rows)])
    assert found.explained == {"non-gated experts": 1, "group-limited routing": 0}


def test_rows_that_cannot_be_judged_are_counted(tmp_path):
    rows = [experts(device="AMD MI300X"), experts(moe_dtype="fp3"), experts(device="NVIDIA H200")]
    found = audit.run([write(tmp_path / "x.csv", rows)])
    assert sum(found.skipped.values()) == 3 and not found.checked
    assert "unknown GPU 'AMD MI300X'" in found.skipped and "unknown dtype 'fp3'" in found.skipped


@pytest.mark.parametrize("latency", ["", "soon", "nan", "inf", 0, -1e-3])
def test_times_that_are_none_are_not_judged(tmp_path, latency):
    """A row of nonsense is counted, is not called impossible, and does not take the others with it."""
    rows = [experts(latency=latency), experts(latency=MIXTRAL_MS / 3), experts(num_tokens=0)]
    found = audit.run([write(tmp_path / "x.csv", rows)])
    assert found.skipped == {"a size or a time that is no number above 0": 2}
    assert sum(found.checked.values()) == 1 and [r.row for r in found.impossible] == [1]


def test_serving_rows_that_cannot_be_judged(tmp_path):
    row = {"model": "deepseek_v3", "gpu": "b200", "precision": "fp8", "tp": 8, "dp": "", "ep": ""}
    row |= {"batch": 1, "isl": 1024, "osl": 1024, "tpot_ms": 0.3}
    bad = (
        {"model": "gpt5"},
        {"precision": "fp9"},
        {"gpu": "h100", "precision": "nvfp4"},
        {"tp": 0},
    )
    found = audit.run([write(tmp_path / "x.csv", [*(row | b for b in bad), row])])
    assert [r.row for r in found.impossible] == [4]
    assert found.skipped == {
        "unknown model 'gpt5'": 1,
        "unknown precision 'fp9'": 1,
        "nvfp4 on h100, which has no fp4": 1,
        "a size or a time that is no number above 0": 1,
    }


def test_some_gpus_only(tmp_path):
    rows = [experts(latency=MIXTRAL_MS / 3), experts(device="NVIDIA GB200", latency=MIXTRAL_MS / 3)]
    found = audit.run([write(tmp_path / "x.csv", rows)])
    only = audit.of_gpus(found, ("gb200",))
    assert len(found.impossible) == 2 and [r.gpu for r in only.impossible] == ["gb200"]
    assert [row[0] for row in audit.by_gpu(only)] == ["gb200"]


def test_json_and_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    rows = [experts(latency=MIXTRAL_MS / 2)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.json", "x.parquet"):
        assert len(audit.run([tmp_path / name]).impossible) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "a,b\n1,2\n", "columns are those of no table known here"),
        ("x.json", "{}", "wants a list of rows"),
        ("x.json", "[", "is no table"),
        ("x.parquet", "no", "is no table"),
        ("x.csv", "gemm_dtype,m,n,k,latency\nfp8,1,1,1,1\n", "wants a column 'device'"),
    ],
)
def test_wrong_tables(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        audit.run([tmp_path / name])


def test_a_missing_table(tmp_path):
    with pytest.raises(UserError, match="no table of measured times"):
        audit.run([tmp_path / "nowhere.csv"])


def test_least_times_grow_with_the_work():
    shape = {n: np.array([64.0]) for n in ("num_tokens",)}
    shape |= {"hidden_size": 7168, "inter_size": 2048, "topk": 8, "num_experts": 256}
    shape |= {"moe_tp_size": 1, "moe_ep_size": 1, "touchable": 1.0}
    one = physics.experts(B200, "fp8", shape, True, 3).seconds
    more = physics.experts(B200, "fp8", shape | {"num_tokens": 512.0}, True, 3).seconds
    assert more > one > 0


@needs_wheel
@pytest.mark.parametrize(("gpu", "count"), [("h200", 0), ("b200", 221)])
def test_the_wheels_expert_tables(gpu, count):
    """Hundreds of minimum-latency NVFP4 rows on B200, none on H200 (TensorRT-LLM, and all engines in the slow test)."""
    root = measured.need() / "systems" / "data"
    tables = [t for t in audit.wheel_tables((gpu,)) if t.name == "moe_perf.parquet"]
    tables = [t for t in tables if "trtllm" in t.parts]
    found = audit.run(tables, root)
    assert sum(found.checked.values()) > 10_000
    assert len(found.impossible) == count
    assert {(r.kernel, r.dtype) for r in found.impossible} <= {
        ("moe_torch_flow_min_latency", "nvfp4")
    }


@needs_wheel
@pytest.mark.slow
def test_all_of_the_wheels_tables():
    found = audit.run(audit.wheel_tables(), measured.need() / "systems" / "data")
    rows = {gpu: n for gpu, _, n, *_ in audit.by_gpu(found)}
    assert sum(found.checked.values()) > 6_000_000
    assert rows["b200"] > 200 and rows["gb200"] > 200
    assert all(n == 0 for gpu, n in rows.items() if gpu not in ("b200", "gb200")), rows
    assert {(r.kernel, r.dtype) for r in found.impossible} == {
        ("moe_torch_flow_min_latency", "nvfp4")
    }
    assert found.explained["non-gated experts"] > 0 and found.explained["group-limited routing"] > 0
