"""Benchmarks: what a row holds, which old rows may be compared with new ones, and that each command writes its rows."""

import json

import jax.numpy as jnp
import pytest
import tiny

from moelab import cli, environment
from moelab import config as configs
from moelab.bench import layer, record, step
from moelab.errors import UserError
from pallas_kernels import device, timing
from pallas_kernels.grouped_matmul import bench, choice

SHAPE = {"rows": 8, "experts": 4}


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch):
    """Leaves this process's JAX as it is."""
    monkeypatch.setattr(environment, "prepare", lambda: None)


def a_row(case="fast", median=1.0, low=0.5, high=2.0, shape=SHAPE, **more):
    row = {"benchmark": "kernels", "device": "a machine", "commit": "abc", "case": case}
    return row | {"shape": shape, "median_s": median, "low_s": low, "high_s": high} | more


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(record, "device", lambda: "a machine")


def test_calls_take_turns_and_warm_ups_do_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timing.interleaved(calls, repeats=2, warm_ups=1)
    assert order == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    order.clear()
    seconds = timing.interleaved(calls, repeats=1, warm_ups=0, settled=True)
    assert order == list("aabb") and len(seconds["a"]) == 1
    with pytest.raises(ValueError, match="at least 1, got 0"):
        timing.interleaved(calls, repeats=0)


def test_a_row_by_hand():
    # Within the rounds a / b is 2, 1, 0.5, 4, 1: sorted 0.5, 1, 1, 2, 4. Of a itself: 1, 2, 2, 3, 8.
    seconds = {"a": [2.0, 3.0, 1.0, 8.0, 2.0], "b": [1.0, 3.0, 2.0, 2.0, 2.0]}
    row = timing.row("a", SHAPE, seconds, "b", part="forward")
    assert (row["low_s"], row["median_s"], row["high_s"], row["best_s"]) == (2.0, 2.0, 3.0, 1.0)
    assert (row["ratio_low"], row["ratio"], row["ratio_high"]) == (1.0, 1.0, 2.0)
    assert row["ratio_of_best"] == 1.0 and row["repeats"] == 5 and row["part"] == "forward"
    assert "ratio" not in timing.row("b", SHAPE, seconds)


def test_new_over_old_with_its_spread(here):
    old = [a_row(median=2.0, low=1.0, high=4.0, against="x", ratio=0.5), a_row("gone")]
    new = [a_row(median=3.0, low=2.0, high=5.0, against="x", ratio=0.75), a_row("fresh")]
    found, fresh = record.compare(new, old)
    # 3/2; at best the lower quartile over the old upper one, 2/4, at worst 5/1.
    assert (found["ratio_low"], found["ratio"], found["ratio_high"]) == (0.5, 1.5, 5.0)
    assert (found["old_ratio"], found["new_ratio"]) == (0.5, 0.75)
    assert fresh["ratio"] is None and fresh["old_s"] is None and fresh["new_s"] == 1.0


def test_parts_and_shapes_are_told_apart(here):
    other = SHAPE | {"rows": 16}
    kinds = [dict(part="forward"), dict(part="backward"), dict(part="forward", shape=other)]
    old = [a_row(median=m, **kind) for m, kind in zip((1.0, 2.0, 4.0), kinds, strict=True)]
    new = [a_row(median=8.0, **kind) for kind in reversed(kinds)]
    assert [row["ratio"] for row in record.compare(new, old)] == [2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(device="another"), "its device is another, this is a machine"),
        (dict(benchmark="layer"), "its benchmark is layer, this is kernels"),
        (
            dict(shape=SHAPE | {"rows": 9}),
            "the shape rows=9 experts=4; here it is rows=8 experts=4",
        ),
    ],
)
def test_other_devices_and_shapes_are_refused(here, change, message):
    with pytest.raises(UserError, match=f"old.json cannot be compared: .*{message}"):
        record.compare([a_row()], [a_row() | change], "old.json")


def test_shapes_that_one_of_them_lacks_are_refused(here):
    both = [a_row(), a_row(shape=SHAPE | {"rows": 16})]
    with pytest.raises(UserError, match="it lacks the shape rows=16 experts=4"):
        record.compare(both, both[:1])
    with pytest.raises(UserError, match="it has the shape rows=16 experts=4; that was not timed"):
        record.compare(both[:1], both)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '[{"case": "a"}]'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match="rows.json: no rows of 'moelab bench'"):
        record.read(path)
    with pytest.raises(UserError, match="nowhere.json: cannot be read"):
        record.read(tmp_path / "nowhere.json")


def test_the_kernels_command_writes_rows_and_compares_with_them(tmp_path, capsys):
    path = str(tmp_path / "rows.json")
    words = ["bench", "kernels", "--shape=6,2,16,32", "--repeats=2"]
    assert cli.main([*words, f"--out={path}"]) == 0
    assert "nvfp4 xla_windows" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    cases = [f"float32 {name}" for name in choice.BACKENDS]
    assert [row["case"] for row in rows] == [*cases, "nvfp4 xla_windows", "mxfp4 xla_windows"]
    for row in rows:
        assert row["shape"] == {"rows": 6, "experts": 2, "outputs": 16, "inputs": 32}
        assert row["device"] == record.device() and row["commit"] == record.commit()
        assert 0 < row["best_s"] <= row["low_s"] <= row["median_s"] <= row["high_s"]
        assert (row["case"] == "float32 xla_windows") == ("ratio" not in row)
    # 4 + 1/2 bits and a float for every expert of 512 weights, over 32: without the temporaries.
    memory = {row["case"]: row["memory"] for row in rows}
    assert (4.5 * 512 + 32) / (32 * 512) < memory["nvfp4 xla_windows"] != memory[cases[0]]
    assert cli.main([*words, "--json", f"--compare={path}"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert [row["case"] for row in compared] == [row["case"] for row in rows]
    assert all(row["ratio"] == row["new_s"] / row["old_s"] for row in compared)


def test_comparing_refuses_before_anything_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("was timed"))
    path = tmp_path / "rows.json"
    record.write(path, [a_row(device="another machine")])
    assert cli.main(["bench", "kernels", f"--compare={path}"]) == 2
    assert f"its device is another machine, this is {record.device()}" in capsys.readouterr().err
    assert cli.main(["bench", "kernels", "--shape=1,2,3"]) == 2
    assert (
        "--shape wants 4 numbers from 1, joined by commas, got '1,2,3'" in capsys.readouterr().err
    )
    assert cli.main(["bench", "layer", "--shape=4,0"]) == 2
    assert "--shape wants 2 to 5 numbers from 1" in capsys.readouterr().err


def test_the_layer_is_timed_in_both_directions(monkeypatch):
    every = layer.cases
    assert list(every(layer.Shape(3, 2, 8, 8, 8))) == ["dense", "layer", "skewed", "with router"]
    few = lambda shape: {name: every(shape)[name] for name in ("dense", "with router")}  # noqa: E731
    monkeypatch.setattr(layer, "cases", few)  # the others compile to much the same
    rows = layer.measure([layer.Shape(3, 2, tokens=8, width=32, hidden=16)], repeats=1)
    parts = ("forward", "forward_backward")
    assert [(row["part"], row["case"]) for row in rows] == [
        (part, case) for part in parts for case in ("dense", "with router")
    ]
    # 3 products of 2 FLOPs for 16 assignments; the backward twice that.
    flops = [round(row["gflops"] * row["median_s"] * 1e9) for row in rows]
    assert flops == [6 * 16 * 32 * 16] * 2 + [3 * 6 * 16 * 32 * 16] * 2
    assert [row.get("against") for row in rows] == [None, "dense"] * 2


@pytest.fixture
def small_models(monkeypatch):
    sections = {"a": dict(moe=dict(num_experts=2)), "b": dict(moe=dict(num_experts=0))}

    def load(name):
        config = tiny.make_config(**sections[name], model=dict(num_layers=1))
        return configs.Loaded(config, name, name, (), ())

    monkeypatch.setattr(step.configs, "load", load)
    monkeypatch.setattr(step, "PAIRS", {"small": step.Pair("a", "b", 1.25)})
    monkeypatch.setattr(step, "VOCAB", tiny.VOCAB)
    monkeypatch.setattr(step, "_MATMUL", 64)


def test_a_row_of_steps(small_models, monkeypatch):
    monkeypatch.setattr(step, "make_run", lambda name: (lambda: 0, {"a": 8, "b": 4}[name], SHAPE))
    (row,) = step.measure(repeats=3)
    assert row["shape"] == {"model": "small"} | SHAPE and row["bar"] == 1.25
    assert (row["case"], row["against"], row["repeats"]) == ("sparse", "dense", 3)
    # Model FLOPs over time, over the matmul's rate.
    peak = row["matmul_gflops"] * 1e9
    assert row["utilisation"] == pytest.approx(8 / row["median_s"] / peak)
    assert row["dense_utilisation"] == pytest.approx(4 / row["dense_s"] / peak)


@pytest.mark.slow
def test_real_steps(small_models):
    (row,) = step.measure(repeats=1)
    shape = {"layers": 1, "width": 32, "batch": 4, "length": 16, "vocabulary": tiny.VOCAB}
    assert row["shape"] == {"model": "small"} | shape
    assert row["ratio"] == row["median_s"] / row["dense_s"]


def test_the_configs_of_the_steps_exist():
    for pair in step.PAIRS.values():
        sparse, dense = (configs.load(name).config for name in (pair.sparse, pair.dense))
        assert sparse.router.k * sparse.moe.expert_width == dense.model.dense_width
        assert sparse.moe.num_experts and not dense.moe.num_experts


@pytest.mark.parametrize(
    "gpu, cases",
    [
        (
            device.Device("gpu", "NVIDIA B200", (10, 0), 148),
            {
                "bfloat16 jax.lax.ragged_dot",
                "nvfp4 W4A4 mosaic_sm100",
                "mxfp4 W4A4 mosaic_sm100",
            },
        ),
        (
            device.Device("gpu", "NVIDIA H100", (9, 0), 132),
            {
                "bfloat16 jax.lax.ragged_dot",
                "nvfp4 W4A16 mosaic_sm90",
                "mxfp4 W4A16 mosaic_sm90",
            },
        ),
    ],
)
def test_the_cases_of_gpus(gpu, cases):
    shape = bench.Shape(1024, 64, 2048, 2048)
    found = {case.name: case for case in bench._cases(shape, gpu, jnp.bfloat16)}
    assert cases <= found.keys()
    for case in found.values():
        assert (case.x is not None) == ("W4A4" in case.name)
    odd = [c.name for c in bench._cases(shape._replace(inputs=2056), gpu, jnp.bfloat16)]
    assert odd == ["bfloat16 jax.lax.ragged_dot"]
