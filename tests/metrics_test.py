"""The journal of a run survives kills and resumes; the load numbers are right."""

import json
import logging
import math

import numpy as np
import pytest

from moelab import metrics


def _record(step, **rest):
    return {"kind": "train", "step": step} | rest


def _write(path, *records):
    with metrics.MetricsWriter(path) as writer:
        for record in records:
            writer.write(record)


def test_written_records_come_back(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    _write(path, _record(1, loss=np.float32(2.5), load=np.eye(2)), _record(2, text="é\n"))
    assert metrics.read(path) == [
        _record(1, loss=2.5, load=[[1.0, 0.0], [0.0, 1.0]]),
        _record(2, text="é\n"),
    ]


def test_every_line_is_on_disk_before_the_next_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.MetricsWriter(path)
    for step in (1, 2):
        writer.write(_record(step))
        assert len(metrics.read(path)) == step
    writer.close()
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_numbers_survive_in_strict_json(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    _write(path, _record(1, loss=value, load=np.array([value, 0.5], np.float32)))

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    loss, load = metrics.read(path)[0]["loss"], metrics.read(path)[0]["load"]
    np.testing.assert_array_equal([loss, load[0], load[1]], [value, value, 0.5])


@pytest.mark.parametrize("torn", ['{"kind":"tr', "{", '{"step":3}\nx', "\xff", "7"])
def test_a_torn_last_line_is_left_out_and_cut_off_on_resume(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    _write(path, _record(1), _record(2))
    whole = len(metrics.read(path)) + torn.count("\n")
    with path.open("a", encoding="latin-1") as file:
        file.write(torn)
    assert len(metrics.read(path)) == whole
    _write(path, _record(9))  # must not be glued to the torn line
    records = metrics.read(path)
    assert len(records) == whole + 1
    assert records[-1] == _record(9)


def test_a_whole_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"train","step":1}')
    assert metrics.read(path) == [_record(1)]
    _write(path, _record(2))
    assert metrics.read(path) == [_record(1), _record(2)]


@pytest.mark.parametrize("damage", ["{torn\n", "\n", "[1]\n"])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"train","step":1}\n' + damage + '{"kind":"train","step":3}\n')
    for action in (metrics.read, lambda p: metrics.truncate_after(p, 1)):
        with pytest.raises(metrics.MetricsError, match=r"metrics.jsonl, line 2 of 3 is damaged"):
            action(path)


def test_truncation_keeps_steps_up_to_the_restored_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, *(_record(step) for step in (1, 2, 3, 4)))
    with path.open("a") as file:
        file.write('{"kind":"train","st')
    assert metrics.truncate_after(path, 2) == 2
    assert path.read_text() == '{"kind":"train","step":1}\n{"kind":"train","step":2}\n'
    assert metrics.truncate_after(path, 7) == 0
    assert metrics.truncate_after(path, 0) == 2
    assert metrics.read(path) == []
    assert metrics.truncate_after(tmp_path / "none.jsonl", 3) == 0


def test_truncation_refuses_lines_without_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"train"}\n')
    with pytest.raises(metrics.MetricsError, match="line 1: no integer step; got None"):
        metrics.truncate_after(path, 1)


@pytest.mark.parametrize("record", [{"step": 1}, {"kind": "train"}, {"kind": "x", "step": 1.5}])
def test_a_record_without_kind_or_step_is_refused(tmp_path, record):
    with metrics.MetricsWriter(tmp_path / "m.jsonl") as writer:
        with pytest.raises(ValueError, match="kind and an integer step; got keys"):
            writer.write(record)


def test_a_value_without_json_form_is_refused(tmp_path):
    with metrics.MetricsWriter(tmp_path / "m.jsonl") as writer:
        with pytest.raises(TypeError, match="holds a object"):
            writer.write(_record(1, thing=object()))


class _FakeBoard:
    def __init__(self, fail_at=None):
        self.scalars, self.fail_at = {}, fail_at

    def add_scalar(self, name, value, step):
        if step == self.fail_at:
            raise RuntimeError("disk full")
        self.scalars[name, step] = value

    def close(self):
        pass


def _with_board(tmp_path, monkeypatch, board):
    monkeypatch.setattr(metrics.TensorBoard, "_open", lambda s, _: setattr(s, "_writer", board))
    return metrics.MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board")


def test_tensorboard_gets_the_scalars(tmp_path, monkeypatch):
    board = _FakeBoard()
    with _with_board(tmp_path, monkeypatch, board) as writer:
        writer.write(_record(3, loss=1.5, router={"load": np.array([[0.25, 0.75]])}))
        writer.write({"kind": "event", "step": 3, "event": "resumed"})
    assert board.scalars == {
        ("train/loss", 3): 1.5,
        ("train/router.load/0/0", 3): 0.25,
        ("train/router.load/0/1", 3): 0.75,
    }


def test_a_failing_tensorboard_warns_once_and_never_stops_the_run(tmp_path, monkeypatch, caplog):
    board = _FakeBoard(fail_at=2)
    with caplog.at_level(logging.WARNING, "moelab"):
        with _with_board(tmp_path, monkeypatch, board) as writer:
            for step in (1, 2, 3):
                writer.write(_record(step, loss=1.0))
    assert [r.message for r in caplog.records] == [
        "TensorBoard is off from here: RuntimeError: disk full"
    ]
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 3


def test_tensorboard_writes_event_files(tmp_path):
    with metrics.MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board") as writer:
        writer.write(_record(1, loss=1.5))
    assert list((tmp_path / "board").glob("events.out.*"))


def test_load_numbers_by_hand():
    load_LE = np.array(
        [
            [0.25, 0.25, 0.25, 0.25],  # balanced: 0.25 * 4 - 1 = 0; entropy ln 4 / ln 4 = 1
            [0.5, 0.5, 0.0, 0.0],  # 0.5 * 4 - 1 = 1; entropy ln 2 / ln 4 = 0.5; two dead
            [0.0, 0.0, 0.0, 1.0],  # 1 * 4 - 1 = 3 = E - 1; entropy 0; three dead
        ]
    )
    np.testing.assert_allclose(metrics.max_violation(load_LE), [0, 1, 3], atol=1e-15)
    np.testing.assert_allclose(metrics.normalized_entropy(load_LE), [1, 0.5, 0], atol=1e-15)
    np.testing.assert_array_equal(metrics.dead_experts(load_LE), [0, 2, 3])


def test_counts_and_shares_give_the_same_numbers():
    count_E = np.array([3, 5, 0, 8])
    for measure in (metrics.max_violation, metrics.normalized_entropy, metrics.dead_experts):
        # 1e-12: the only difference is one division in float64.
        np.testing.assert_allclose(measure(count_E), measure(count_E / 16), rtol=1e-12)


def test_no_load_is_nan_not_balanced_and_one_expert_is_balanced():
    assert np.isnan(metrics.max_violation(np.zeros(3)))
    assert np.isnan(metrics.normalized_entropy(np.zeros(3)))
    assert metrics.dead_experts(np.zeros(3)) == 3
    assert metrics.max_violation(np.ones(1)) == 0
    assert metrics.normalized_entropy(np.ones(1)) == 1


@pytest.mark.parametrize("bad", [np.array([1.0, -0.1]), np.zeros((2, 0)), np.float64(1.0)])
def test_bad_loads_are_refused(bad):
    for measure in (metrics.max_violation, metrics.normalized_entropy, metrics.dead_experts):
        with pytest.raises(ValueError, match="load wants shares or counts >= 0"):
            measure(bad)
