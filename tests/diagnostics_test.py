"""What the diagnostics say of small traces that can be counted by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moelab import diagnostics
from moelab.trace import Trace, TraceError

NONE = 3  # column C of the traces below: no expert


def _trace(expert_MTK, *, columns=3, domain_T=None, document_T=None, token_id_T=None, layers=None):
    expert_MTK = np.asarray(expert_MTK)
    tokens = expert_MTK.shape[1]
    zeros = np.zeros(tokens, int)
    return Trace(
        expert_MTK=expert_MTK,
        token_id_T=zeros if token_id_T is None else token_id_T,
        domain_T=zeros if domain_T is None else domain_T,
        document_T=zeros if document_T is None else document_T,
        layers=range(len(expert_MTK)) if layers is None else layers,
        domains=["a", "b"],
        num_experts=columns,
        num_columns=columns,
    )


FINAL = [[[0, 1], [2, 0], [0, 1], [1, NONE]]]
EARLY = [[[1, 0], [0, 1], [2, 1], [1, 2]]]


def test_load_by_domain_counts_filled_slots():
    got = diagnostics.load_by_domain(_trace(FINAL, domain_T=[0, 0, 1, -1]))
    # a: {0, 1} and {2, 0}; b: {0, 1}; the last token's domain is unknown
    np.testing.assert_array_equal(got, [[[2, 1, 1], [1, 1, 0]]])


def test_co_activation_and_its_ratio_to_independence():
    share_MCC = diagnostics.co_activation(_trace(FINAL))
    # of 4 tokens: 0 in 3, 1 in 3, 2 in 1; {0, 1} in 2, {0, 2} in 1, {1, 2} in none
    wanted = np.array([[3, 2, 1], [2, 3, 0], [1, 0, 1]]) / 4
    np.testing.assert_array_equal(share_MCC, [wanted])
    ratio_CC = diagnostics.independence_ratio(share_MCC)[0]
    assert ratio_CC[0, 1] == pytest.approx((2 / 4) / (3 / 4 * 3 / 4))  # 8/9
    assert ratio_CC[0, 2] == pytest.approx((1 / 4) / (3 / 4 * 1 / 4))  # 4/3
    assert ratio_CC[1, 2] == 0 and np.isnan(np.diagonal(ratio_CC)).all()


def test_the_ratio_of_a_column_never_chosen_is_nan_and_of_random_choices_as_documented():
    every = [[0, 1], [0, 2], [1, 2]] * 2  # K = 2 of C = 3: (K - 1) C / (K (C - 1)) = 3/4
    ratio_CC = diagnostics.independence_ratio(diagnostics.co_activation(_trace([every])))[0]
    np.testing.assert_allclose(ratio_CC[~np.eye(3, dtype=bool)], 3 / 4)
    one = diagnostics.independence_ratio(diagnostics.co_activation(_trace([[[0], [0]]])))
    assert np.isnan(one).all()
    with pytest.raises(ValueError, match="co-activation shares"):
        diagnostics.independence_ratio(np.eye(3))


def test_saturation_flips_and_overlap_by_hand():
    early, final = _trace(EARLY), _trace(FINAL)
    # |both| / |final|: {0,1} {0,1} 2/2; {0,1} {0,2} 1/2; {1,2} {0,1} 1/2; {1,2} {1} 1/1
    np.testing.assert_allclose(diagnostics.saturation(early, final), [(1 + 1 / 2 + 1 / 2 + 1) / 4])
    # |both| / |either|: 2/2, 1/3, 1/3, 1/2
    np.testing.assert_allclose(diagnostics.overlap(early, final), [(1 + 1 / 3 + 1 / 3 + 1 / 2) / 4])
    flips = diagnostics.flip_rate(early, final)
    np.testing.assert_array_equal(flips.layer_M, [3 / 4])
    assert flips.token == 3 / 4


def test_a_token_flips_once_for_all_its_layers():
    a = _trace([[[0], [0], [0], [0]], [[1], [1], [1], [1]]])
    b = _trace([[[2], [2], [0], [0]], [[1], [2], [2], [1]]])
    flips = diagnostics.flip_rate(a, b)
    np.testing.assert_array_equal(flips.layer_M, [2 / 4, 2 / 4])
    assert flips.token == 3 / 4  # tokens 0 and 2 in one layer, token 1 in both


def test_tokens_without_experts():
    empty, some = _trace([[[NONE], [NONE]]]), _trace([[[NONE], [1]]])
    assert np.isnan(diagnostics.saturation(some, empty)).all()
    np.testing.assert_array_equal(diagnostics.saturation(empty, some), [0])
    np.testing.assert_array_equal(diagnostics.overlap(empty, some), [1 / 2])
    assert diagnostics.flip_rate(empty, some).token == 1 / 2


@pytest.mark.parametrize("function", ["saturation", "flip_rate", "overlap"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_id_T": [0, 0, 0, 9]}, "different tokens: 1 of 4 differ, first at 3 .0 and 9"),
        ({"document_T": [0, 0, 1, 1]}, "different documents: 2 of 4 differ, first at 2"),
        ({"layers": [4]}, "different layers"),
        ({"columns": 4}, "3 and 4 columns"),
        ({"expert_MTK": [[[0], [1]]]}, "4 and 2 tokens"),
    ],
)
def test_traces_that_do_not_match_are_refused(function, changes, message):
    other = _trace(**({"expert_MTK": FINAL} | changes))
    with pytest.raises(TraceError, match=message):
        getattr(diagnostics, function)(_trace(FINAL), other)


def test_mutual_information_by_hand():
    # p = 3/8, 1/8 / 1/8, 3/8 with even margins: 2 * 3/8 ln(3/8 * 4) + 2 * 1/8 ln(1/8 * 4)
    wanted = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert diagnostics.mutual_information([[3, 1], [1, 3]]) == pytest.approx(wanted)
    assert diagnostics.mutual_information([[2, 4], [1, 2]]) == pytest.approx(0, abs=1e-15)
    assert np.isnan(diagnostics.mutual_information(np.zeros((2, 2))))
    with pytest.raises(ValueError, match="counts >= 0"):
        diagnostics.mutual_information([1, 2])


@given(count=arrays.arrays(np.int64, (3, 4), elements=st.integers(0, 50)))
def test_mutual_information_is_symmetric_and_below_both_entropies(count):
    count[0, 0] += 1
    found = diagnostics.mutual_information(count)
    assert found == pytest.approx(diagnostics.mutual_information(count.T), abs=1e-12)
    for axis in (0, 1):
        share = count.sum(axis) / count.sum()
        share = share[share > 0]
        assert 0 <= found <= -(share * np.log(share)).sum() + 1e-12


def _documents(expert_U, domain_U, tokens=10, **rest):
    """Documents of equal length, each with one expert and one domain."""
    return _trace(
        np.repeat(expert_U, tokens)[None, :, None],
        domain_T=np.repeat(domain_U, tokens),
        document_T=np.repeat(np.arange(len(domain_U)), tokens),
        **rest,
    )


def test_experts_that_are_domains_are_fully_specialised():
    domain_U = np.arange(20) % 2
    found = diagnostics.specialisation(_documents(domain_U, domain_U))
    np.testing.assert_allclose(found.mi_M, [math.log(2)])
    np.testing.assert_allclose(found.normalised_M, [1])
    # of the 184756 ways to deal 10 + 10 domains only 2 reach ln 2: no permutation does
    np.testing.assert_allclose(found.p_value_M, [1 / 201])
    assert found.null_mean_M[0] < found.null_q95_M[0] < 0.3


def test_documents_with_experts_of_their_own_are_not_specialised_in_domains():
    # Each document has its own expert, so any dealing of domains has mi = ln 2: p is 1, where a
    # permutation of tokens would have found 1/201.
    found = diagnostics.specialisation(_documents(np.arange(8), np.arange(8) % 2, columns=8))
    np.testing.assert_allclose(found.mi_M, [math.log(2)])
    np.testing.assert_allclose(found.null_mean_M, [math.log(2)])
    np.testing.assert_array_equal(found.p_value_M, [1])


def test_p_values_of_routing_without_domains_spread_evenly():
    generator = np.random.default_rng(3)
    expert_MTK = generator.integers(0, 3, (60, 200, 1))
    document_T = np.repeat(np.arange(20), 10)
    made = _trace(expert_MTK, domain_T=document_T % 2, document_T=document_T)
    found = diagnostics.specialisation(made, permutations=99, seed=1)
    assert 0.4 < found.p_value_M.mean() < 0.6  # uniform: 0.5, standard error 0.29 / sqrt(60) = 0.04
    assert (found.p_value_M < 0.05).mean() < 0.15
    again = diagnostics.specialisation(made, permutations=99, seed=1)
    np.testing.assert_array_equal(found.p_value_M, again.p_value_M)


def test_unknown_domains_and_empty_layers_are_left_out():
    domain_U = np.arange(20) % 2
    known = _documents(domain_U, domain_U)
    both = np.concatenate([known.expert_MTK, np.full((1, 200, 1), NONE)])
    unknown_T = np.where(np.arange(200) < 20, -1, known.domain_T)
    made = _trace(both, domain_T=unknown_T, document_T=known.document_T)
    found = diagnostics.specialisation(made, permutations=9)
    assert found.mi_M[0] == pytest.approx(math.log(2))  # 9 documents of each remain
    assert all(np.isnan(values[1]) for values in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain_T": [0, 0, 0, -1]}, "two domains at least; got 1"),
        ({"domain_T": [0, 0, 0, 1], "document_T": [4, 4, 6, 6]}, "document 6 has .* two domains"),
    ],
)
def test_specialisation_refuses(changes, message):
    with pytest.raises(TraceError, match=message):
        diagnostics.specialisation(_trace(FINAL, **changes))
    with pytest.raises(ValueError, match="permutations"):
        diagnostics.specialisation(_trace(FINAL), permutations=0)


def test_vocabulary_specialisation_by_hand():
    expert_MTK = [[[0, 1], [0, 0], [0, NONE], [1, 2], [2, 1], [2, NONE]]]
    made = _trace(expert_MTK, token_id_T=[7, 7, 7, 7, 9, 9])
    # id 7: expert 0 in 3 of 4 occurrences ({0} once from two slots); id 9: expert 2 in 2 of 2
    np.testing.assert_allclose(diagnostics.vocabulary_specialisation(made, 2), [(3 / 4 + 1) / 2])
    np.testing.assert_allclose(diagnostics.vocabulary_specialisation(made, 3), [3 / 4])
    with pytest.raises(TraceError, match="no token id occurs 5 times; the most is 4"):
        diagnostics.vocabulary_specialisation(made, 5)


@settings(max_examples=50, deadline=None)
@given(expert=arrays.arrays(np.int64, (2, 2, 7, 3), elements=st.integers(0, 3)))
def test_slots_are_sets_and_chunks_are_invisible(expert):
    a, b = (_trace(expert_MTK) for expert_MTK in expert)
    turned = _trace(expert[0][..., ::-1])
    assert diagnostics.flip_rate(a, turned).token == 0
    np.testing.assert_array_equal(diagnostics.overlap(a, turned), [1, 1])
    whole = [diagnostics.co_activation(a), diagnostics.overlap(a, b), diagnostics.saturation(a, b)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "_CHUNK", 3)
        parts = [
            diagnostics.co_activation(a),
            diagnostics.overlap(a, b),
            diagnostics.saturation(a, b),
        ]
        assert diagnostics.flip_rate(a, turned).token == 0
    for left, right in zip(whole, parts, strict=True):
        np.testing.assert_allclose(left, right)
