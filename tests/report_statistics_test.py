"""Ratios over documents, their bootstrap intervals, and the paired t, against hand-worked numbers and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from moelab.report import documents, formatting, statistics

LN2 = math.log(2.0)


def _table(rows):
    """rows: (precision, domain, document, nats, bytes, tokens)."""
    return dict(zip(documents.SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))


def _read(tmp_path, rows):
    documents.write(tmp_path / "d.parquet", _table(rows))
    return documents.read(tmp_path / "d.parquet")


HAND = [
    ("float32", "en", "a", 2 * LN2, 4, 2),
    ("float32", "en", "b", 10 * LN2, 8, 4),
    ("float32", "fr", "a", 6 * LN2, 4, 4),
    ("nvfp4", "fr", "a", 8 * LN2, 4, 4),  # another order: rows are matched by domain and id
    ("nvfp4", "en", "b", 10 * LN2, 8, 4),
    ("nvfp4", "en", "a", 3 * LN2, 4, 2),
]


def test_ratios_by_hand(tmp_path):
    table = _read(tmp_path, HAND)
    # en: (2 + 10) / (4 + 8) = 1 bit per byte; fr: 6 / 4 = 1.5; all: 18 / 16, not the mean 1.25.
    assert table.bits_per_byte("float32") == pytest.approx({"en": 1.0, "fr": 1.5, "all": 1.125})
    # nvfp4: en (3 + 10) / 12, fr 8 / 4, all 21 / 16.
    assert table.bits_per_byte("nvfp4") == pytest.approx({"en": 13 / 12, "fr": 2, "all": 21 / 16})
    assert table.loss("float32") == pytest.approx(18 * LN2 / 10)
    difference = statistics.loss_difference(table, "float32", "nvfp4")
    assert difference.estimate == pytest.approx(3 * LN2 / 10)
    by_byte = statistics.bits_per_byte_difference(table, "float32", "nvfp4", "en")
    assert by_byte.estimate == pytest.approx(1 / 12)


def test_bootstrap_by_hand():
    # One stratum of two documents: resamples are aa (1/4), ab (1/2), bb (1/4) with ratios
    # 1/1 = 1, (1 + 0)/(1 + 3) = 0.25 and 0/3 = 0, so the 2.5 % and 97.5 % points are 0 and 1.
    interval = statistics.ratio_difference(
        np.array([0.0, 5.0]), np.array([1.0, 5.0]), np.array([1.0, 3.0]), np.array(["x", "x"])
    )
    assert interval == (0.25, 0.0, 1.0)


def test_bootstrap_agrees_with_scipy_on_one_stratum():
    rng = np.random.default_rng(3)
    weight_D = rng.integers(10, 500, 60).astype(float)
    a_D = weight_D * rng.normal(3, 0.2, 60)
    b_D = a_D + weight_D * rng.normal(0.02, 0.03, 60)
    ours = statistics.ratio_difference(a_D, b_D, weight_D, np.full(60, "x"))
    theirs = stats.bootstrap(
        (b_D - a_D, weight_D),
        lambda d, w, axis: d.sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4999,
        rng=np.random.default_rng(99),
    ).confidence_interval
    # Other random resamples: 4999 of them place a bound within about 5 % of the interval's width.
    width = theirs.high - theirs.low
    np.testing.assert_allclose(ours[1:], theirs, atol=0.06 * width)
    assert ours.low < ours.estimate < ours.high


def test_bootstrap_keeps_strata_and_repeats_digit_for_digit():
    # No spread within strata, a difference between them: resampling within strata changes nothing.
    a_D, weight_D = np.zeros(6), np.ones(6)
    b_D, stratum_D = np.array([1.0] * 3 + [5.0] * 3), np.array(["x"] * 3 + ["y"] * 3)
    assert statistics.ratio_difference(a_D, b_D, weight_D, stratum_D) == pytest.approx((3, 3, 3))
    b_D = np.arange(6.0)
    once, twice = (statistics.ratio_difference(a_D, b_D, weight_D, stratum_D) for _ in range(2))
    assert once == twice
    assert once.low < once.high


def test_a_stratum_of_one_document_stays_in_every_resample():
    b_D = np.array([1.0, 1.0, 7.0])
    interval = statistics.ratio_difference(np.zeros(3), b_D, np.ones(3), np.array(["x", "x", "y"]))
    assert interval == pytest.approx((3, 3, 3))


def test_equal_and_nonfinite_and_single_documents():
    one = np.ones(4)
    stratum_D = np.full(4, "x")
    assert statistics.ratio_difference(one, one, one, stratum_D) == (0, 0, 0)
    broken = np.array([1.0, math.nan, 1.0, 1.0])
    assert all(map(math.isnan, statistics.ratio_difference(one, broken, one, stratum_D)))
    single = statistics.ratio_difference(one[:1], 2 * one[:1], one[:1], stratum_D[:1])
    assert single.estimate == 1 and math.isnan(single.low)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"want one shape \(D,\)"):
        statistics.ratio_difference(np.ones(2), np.ones(3), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="weights > 0"):
        statistics.ratio_difference(np.ones(2), np.ones(2), np.zeros(2), np.ones(2))
    table = _read(tmp_path, HAND)
    with pytest.raises(ValueError, match="no precision 'fp8'; choose from"):
        statistics.loss_difference(table, "float32", "fp8")
    with pytest.raises(ValueError, match="no domain 'de'; choose from"):
        statistics.bits_per_byte_difference(table, "float32", "nvfp4", "de")


@pytest.mark.parametrize(
    "rows, message",
    [
        (HAND[:5], "under 'nvfp4', unlike 'float32', document 'a' of 'en' is missing"),
        (HAND + [("nvfp4", "de", "z", 1.0, 1, 1)], "document 'z' of 'de' appears"),
        (HAND + HAND[:1], "'a' of 'en' twice under 'float32'"),
        (HAND[:5] + [("nvfp4", "en", "a", 1.0, 5, 2)], "has 5 bytes and 2 tokens"),
        ([("float32", "en", "a", 1.0, 0, 1)], "without bytes or tokens"),
    ],
)
def test_documents_that_do_not_line_up_are_refused(tmp_path, rows, message):
    with pytest.raises(documents.DocumentsError, match=message):
        _read(tmp_path, rows)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    path = tmp_path / "d.parquet"
    with pytest.raises(FileNotFoundError):
        documents.read(path)
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(documents.DocumentsError, match="d.parquet is not the document table"):
        documents.read(path)


def test_paired_t_by_hand():
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3); t(0.975, 2) = 4.302653.
    result = statistics.paired_t([0, 0, 0], [1, 2, 3])
    half = 4.302653 / math.sqrt(3)
    assert result[:3] == pytest.approx((2, 2 - half, 2 + half), rel=1e-6)
    assert result.p == pytest.approx(stats.ttest_1samp([1, 2, 3], 0).pvalue)
    assert result.n == 3
    assert statistics.paired_t([1, 2], [2, 3])[:4] == (1, 1, 1, 0)
    for bad in (([1], [2]), ([1, 2], [1, 2, 3])):
        with pytest.raises(ValueError, match="n >= 2"):
            statistics.paired_t(*bad)


def test_numbers_are_written_honestly():
    assert formatting.fixed(None, 2) == "not measured"
    assert formatting.fixed("NaN", 2) == "NaN"
    assert formatting.fixed(float("-inf"), 2) == "−∞"
    assert formatting.fixed(-0.00001, 3, sign=True) == "+0.000"
    assert formatting.percent(0.99999) == "> 99.9 %"
    assert formatting.percent(1.0) == "100.0 %"
    assert formatting.size(999) == "999 B" and formatting.size(1_671_168) == "1.67 MB"
    assert formatting.duration(3600) == "1 h 0 min"
