"""A trace survives its file, and whatever is wrong with one is said in a sentence that names the file."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import trace
from moelab.trace import Trace, TraceError


def _fields(**changes):
    return {
        "expert_MTK": [[[0, 3], [1, 4], [2, 0]], [[1, 2], [1, 2], [4, 4]]],
        "weight_MTK": np.full((2, 3, 2), 0.5, np.float32),
        "token_id_T": [7, 70000, 9],
        "domain_T": [0, 0, 1],
        "document_T": [5, 5, 8],
        "layers": [1, 3],
        "domains": ["wiki", "maths"],
        "num_experts": 3,
        "num_columns": 4,
        "header": {"config": "ab12", "step": 40, "loss": np.float32(0.5)},
    } | changes


def _assert_equal(left, right):
    for name in ("expert_MTK", "weight_MTK", "token_id_T", "domain_T", "document_T"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    for name in ("layers", "domains", "num_experts", "num_columns", "header"):
        assert getattr(left, name) == getattr(right, name)


@pytest.mark.parametrize("changes", [{}, {"weight_MTK": None}, {"domain_T": [-1, -1, -1]}])
def test_a_saved_trace_comes_back(tmp_path, changes):
    path = tmp_path / "deep" / "a.npz"
    original = Trace(**_fields(**changes))
    trace.save(path, original)
    _assert_equal(trace.load(path), original)
    assert trace.load(path).header == {"config": "ab12", "step": 40, "loss": 0.5}
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(254, "uint8"), (255, "uint16"), (65534, "uint16"), (65535, "uint32")],
)
def test_ids_take_the_narrowest_type_that_also_holds_no_expert(tmp_path, columns, dtype):
    expert_MTK = np.full((2, 3, 2), columns)  # the value C: no expert
    trace.save(tmp_path / "a", Trace(**_fields(expert_MTK=expert_MTK, num_columns=columns)))
    loaded = trace.load(tmp_path / "a")
    assert loaded.expert_MTK.dtype == dtype
    assert (loaded.expert_MTK == columns).all()


def test_the_arrays_of_a_trace_are_read_only_and_those_of_the_caller_are_not():
    expert_MTK = np.zeros((2, 3, 2), np.uint8)
    made = Trace(**_fields(expert_MTK=expert_MTK))
    with pytest.raises(ValueError, match="read-only"):
        made.expert_MTK[0] = 1
    expert_MTK[0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_MTK": np.zeros((2, 3))}, "expert_MTK wants integers with the axes MTK"),
        ({"expert_MTK": np.zeros((2, 3, 2))}, "got float64"),
        ({"expert_MTK": np.zeros((2, 3, 0), int)}, "none empty"),
        ({"expert_MTK": np.full((2, 3, 2), 5)}, "values from 0 to 4; got 5"),
        ({"expert_MTK": np.full((2, 3, 2), -1)}, "values from 0 to 4; got -1"),
        ({"expert_MTK": np.zeros((1, 3, 2), int)}, "1 layers, layers names 2"),
        ({"weight_MTK": np.ones((2, 3, 1))}, "weight_MTK has shape"),
        ({"weight_MTK": np.ones((2, 3, 2), int)}, "weight_MTK wants floats"),
        ({"weight_MTK": np.full((2, 3, 2), np.nan)}, "finite"),
        ({"weight_MTK": np.full((2, 3, 2), 1e5)}, "finite"),
        ({"token_id_T": [1, 2]}, "token_id_T has 2 tokens, expert_MTK has 3"),
        ({"token_id_T": [1, 2, 2**32]}, "token_id_T wants values from 0 to"),
        ({"domain_T": [0, 1, 2]}, "domain_T wants values from -1 to 1; got 2"),
        ({"document_T": [0, -1, 2]}, "document_T wants values from 0"),
        ({"layers": [3, 1]}, "ascending"),
        ({"layers": [1.0, 3.0]}, "layers wants whole numbers"),
        ({"layers": 2}, "layers wants a list"),
        ({"domains": "ab"}, "domains wants a list"),
        ({"domains": ["a", "a"]}, "different names"),
        ({"domains": ["a", ["b"]]}, "different names"),
        ({"num_experts": 5}, "num_experts <= num_columns; got 5, 4"),
        ({"num_experts": True}, "num_experts wants whole numbers"),
        ({"header": [1]}, "JSON object"),
        ({"header": {"a": object()}}, "no JSON form"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(TraceError, match=message):
        Trace(**_fields(**changes))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    trace.save(path, Trace(**_fields()))

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        trace.save(path, Trace(**_fields(num_experts=1)))
    assert trace.load(path).num_experts == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def _parts():
    made = Trace(**_fields())
    names = ("expert_MTK", "weight_MTK", "token_id_T", "domain_T", "document_T")
    meta = {"format": "moelab.trace", "version": 1, "num_experts": 3, "num_columns": 4}
    meta |= {"layers": [1, 3], "domains": ["wiki", "maths"], "header": made.header}
    return {name: getattr(made, name) for name in names}, meta


def _write(path, arrays, meta):
    """Writes a trace as another program would, from the description alone."""
    if isinstance(meta, dict) and "sha256" not in meta:
        digest = hashlib.sha256()
        for name in sorted(arrays):
            shape = ",".join(str(n) for n in arrays[name].shape)
            digest.update(f"{name} {arrays[name].dtype.str} {shape}\n".encode("ascii"))
            digest.update(arrays[name].tobytes())
        meta = meta | {"sha256": digest.hexdigest()}
    text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    np.savez(path, meta=np.frombuffer(text, np.uint8), **arrays)


def test_the_description_of_the_format_is_enough_to_write_it(tmp_path):
    arrays, meta = _parts()
    _write(tmp_path / "a.npz", arrays, meta)
    _assert_equal(trace.load(tmp_path / "a.npz"), Trace(**_fields()))


@pytest.mark.parametrize(
    ("arrays", "meta", "message"),
    [
        ({}, {"version": 2}, "format version 2; this moelab reads version 1"),
        ({}, {"format": "other"}, "not a route trace"),
        ({}, b"{", "not a route trace"),
        ({}, b"[1]", "not a route trace"),
        ({}, b"\xff", "not a route trace"),
        ({}, {"sha256": "00"}, "the arrays' sha256 is [0-9a-f]{64}, the file says '00'"),
        ({"token_id_T": None}, {}, "wants the arrays expert_MTK, token_id_T"),
        ({"more": np.zeros(1)}, {}, "has .*more"),
        ({"domain_T": np.array([0, 0, 2], np.int16)}, {}, "domain_T wants values from -1 to 1"),
        ({}, {"layers": None}, "layers wants a list"),
        ({}, {"num_columns": "4"}, "num_columns wants whole numbers"),
        ({"token_id_T": np.array([{}] * 3)}, {"sha256": "00"}, "damaged .*allow_pickle"),
    ],
)
def test_a_file_that_lies_is_refused_by_name(tmp_path, arrays, meta, message):
    good_arrays, good_meta = _parts()
    arrays = {name: array for name, array in (good_arrays | arrays).items() if array is not None}
    _write(tmp_path / "a.npz", arrays, good_meta | meta if isinstance(meta, dict) else meta)
    with pytest.raises(TraceError, match=f"a.npz: .*{message}"):
        trace.load(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["num_experts", "num_columns", "layers", "domains", "header"])
def test_a_missing_entry_is_named(tmp_path, name):
    arrays, meta = _parts()
    del meta[name]
    _write(tmp_path / "a.npz", arrays, meta)
    with pytest.raises(TraceError, match=f"meta lacks {name}"):
        trace.load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not an .npz"), (b"text", "not an .npz"), (b"PK\x03\x04cut", "cut off")],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(TraceError, match=f"a.npz: {message}"):
        trace.load(tmp_path / "a.npz")


def test_a_missing_file_and_a_foreign_npz_are_refused(tmp_path):
    with pytest.raises(TraceError, match="a.npz: there is no such file"):
        trace.load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(TraceError, match="not a route trace"):
        trace.load(tmp_path / "a.npz")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "a.npz"
    trace.save(path, Trace(**_fields()))
    return path.read_bytes(), path.with_name("b.npz")


def test_every_cut_is_noticed(whole):
    content, path = whole
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(TraceError, match="b.npz: "):
            trace.load(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), value=st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_changes_nothing(whole, data, value):
    content, path = whole
    at = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:at] + bytes([content[at] ^ value]) + content[at + 1 :])
    try:
        loaded = trace.load(path)  # a byte that says nothing: a date, a flag of the archive
    except TraceError as error:
        assert "b.npz: " in str(error)
    else:
        _assert_equal(loaded, Trace(**_fields()))


def test_select_keeps_documents_and_domains():
    made = Trace(**_fields())
    kept = trace.select(made, documents=[8])
    np.testing.assert_array_equal(kept.expert_MTK, [[[2, 0]], [[4, 4]]])
    assert kept.token_id_T.tolist() == [9] and kept.weight_MTK.shape == (2, 1, 2)
    assert trace.select(made, domains=["wiki"]).token_id_T.tolist() == [7, 70000]
    with pytest.raises(TraceError, match="no document 6 in this trace; it has 5, 8"):
        trace.select(made, documents=[5, 6])
    with pytest.raises(TraceError, match="no domain code in this trace; it has wiki, maths"):
        trace.select(made, domains=["code"])
    with pytest.raises(TraceError, match="no token is left"):
        trace.select(made, documents=[5], domains=["maths"])
