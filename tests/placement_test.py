"""Placements hold every expert, match hand-worked and brute-force answers, and are measured on other text."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import placement
from moelab.placement import PlacementError
from moelab.trace import Trace

LOADS = st.lists(st.integers(0, 100).map(float), min_size=1, max_size=7).map(np.array)


def test_replicas_by_hand():
    # loads per replica: 12 6 1 -> 6 6 1 (the tie goes to expert 0) -> 4 6 1 -> 4 3 1
    np.testing.assert_array_equal(placement.replicate(np.array([12, 6, 1]), 6), [0, 1, 2, 0, 0, 1])
    with pytest.raises(PlacementError, match="2 slots do not hold 3 experts"):
        placement.replicate(np.ones(3), 2)


@settings(max_examples=60, deadline=None)
@given(load_E=LOADS.filter(lambda load: len(load) <= 4), extra=st.integers(0, 4))
def test_no_other_replication_has_a_smaller_largest_share(load_E, extra):
    count_E = np.bincount(placement.replicate(load_E, len(load_E) + extra))
    assert count_E.min() >= 1 and count_E.sum() == len(load_E) + extra
    every = itertools.product(range(1, extra + 2), repeat=len(load_E))
    best = min((load_E / np.array(n)).max() for n in every if sum(n) == len(load_E) + extra)
    assert (load_E / count_E).max() == best


def test_packing_by_hand():
    # 9 | 7 | 6, then 5 to the 6 (11), 4 to the 7 (11), 1 to the 9 (10)
    np.testing.assert_array_equal(
        placement.pack(np.array([1, 4, 5, 6, 7, 9]), 3), [[5, 0], [4, 1], [3, 2]]
    )
    np.testing.assert_array_equal(placement.pack(np.array([1, 3, 2]), 3), [[0], [1], [2]])
    # the lightest bin may be full: 9 | 1, 1 to the 1, then the last 1 has only the 9's bin left
    np.testing.assert_array_equal(placement.pack(np.array([9, 1, 1, 1]), 2), [[0, 3], [1, 2]])
    with pytest.raises(PlacementError, match="6 items do not divide into 4 bins; wants .*1, 2, 3"):
        placement.pack(np.ones(6), 4)


@given(bins=st.integers(1, 5), room=st.integers(1, 5), data=st.data())
def test_every_bin_has_the_same_count_and_nothing_is_lost(bins, room, data):
    count = bins * room
    load_N = np.array(data.draw(st.lists(st.floats(0, 9), min_size=count, max_size=count)))
    packed = placement.pack(load_N, bins)
    assert packed.shape == (bins, room)
    assert sorted(packed.ravel()) == list(range(count))


@settings(max_examples=60, deadline=None)
@given(load=st.lists(st.integers(1, 30), min_size=6, max_size=6).map(np.array))
def test_two_items_a_bin_are_packed_as_well_as_can_be(load):
    # heaviest first pairs the heaviest with the lightest, which is optimal for pairs
    best = min(
        load[list(order)].reshape(3, 2).sum(1).max() for order in itertools.permutations(range(6))
    )
    assert load[placement.pack(load, 3)].sum(1).max() == best


def test_greedy_by_hand():
    load_ME = np.array([[8, 6, 3, 1]])
    # no replicas: 8 | 6, then 3 to the 6 (9), 1 to the 8 (9): even. In order: 14 and 4, mean 9
    placed = placement.greedy(load_ME, 2)
    np.testing.assert_array_equal(placed.expert_MDS, [[[0, 3], [1, 2]]])
    np.testing.assert_array_equal(placement.imbalance(placed, load_ME), [0])
    ordered = placement.contiguous(1, 4, 2)
    np.testing.assert_allclose(placement.imbalance(ordered, load_ME), [14 / 9 - 1])
    # two replicas: 8 -> 4 4, 6 -> 3 3, beside 3 and 1; sorted 4 4 3 3 3 1: 4+3+3 and 4+3+1
    placed = placement.greedy(load_ME, 2, redundant=2)
    np.testing.assert_array_equal(placed.replicas_ME, [[2, 2, 1, 1]])
    np.testing.assert_array_equal(np.sort(placement.device_load(placed, load_ME)), [[8, 10]])


def test_hierarchical_by_hand():
    # groups {0,1} 10, {2,3} 7, {4,5} 2, {6,7} 1; nodes: 10 | 7, 2 to the 7 (9), 1 to the 10 (11)
    load_ME = np.array([[9, 1, 4, 3, 1, 1, 1, 0]])
    placed = placement.hierarchical(load_ME, 4, nodes=2, groups=4, redundant=4)
    first, second = placed.expert_MDS[0].reshape(2, -1)
    assert set(first) == {0, 1, 6, 7} and set(second) == {2, 3, 4, 5}
    # node 0, 2 extra: 9 -> 4.5 -> 3; replicas 3 3 3 1 1 0 on 2 devices: 3+3+0 and 3+1+1
    # node 1, 2 extra: 4 -> 2, 3 -> 1.5; replicas 2 2 1.5 1.5 1 1: 2+1.5+1 twice
    np.testing.assert_array_equal(placed.replicas_ME, [[3, 1, 2, 2, 1, 1, 1, 1]])
    loads = placement.device_load(placed, load_ME)[0]
    np.testing.assert_allclose(np.sort(loads[:2]), [5, 6])
    np.testing.assert_allclose(loads[2:], [4.5, 4.5])
    np.testing.assert_allclose(placement.imbalance(placed, load_ME), [6 / 5 - 1])


def test_one_node_of_one_group_is_the_global_policy():
    load_ME = np.random.default_rng(0).integers(0, 99, (5, 12))
    one = placement.hierarchical(load_ME, 4, nodes=1, groups=1, redundant=4)
    np.testing.assert_array_equal(one.expert_MDS, placement.greedy(load_ME, 4, 4).expert_MDS)


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 8), devices=st.integers(1, 4), extra=st.integers(0, 2), data=st.data()
)
def test_placements_hold_every_expert_and_all_the_load(experts, devices, extra, data):
    redundant = -experts % devices + extra * devices
    values = st.lists(st.integers(0, 50), min_size=experts, max_size=experts)
    load_ME = np.array(data.draw(st.lists(values, min_size=1, max_size=3)), float)
    for placed in (
        placement.greedy(load_ME, devices, redundant),
        placement.contiguous(len(load_ME), experts, devices, redundant),
    ):
        assert placed.expert_MDS.shape == (len(load_ME), devices, (experts + redundant) // devices)
        assert (placed.replicas_ME >= 1).all()
        sums = placement.device_load(placed, load_ME).sum(1)
        np.testing.assert_allclose(sums, load_ME.sum(1))
        found = placement.imbalance(placed, load_ME)
        np.testing.assert_allclose(found, placement.imbalance(placed, load_ME * 7), atol=1e-12)
        used = load_ME.sum(1) > 0
        assert np.isnan(found[~used]).all()
        assert (found[used] >= -1e-12).all() and (found[used] <= devices - 1 + 1e-12).all()


def test_the_baseline_repeats_the_first_experts():
    wanted = [[[0, 1], [2, 3], [4, 5], [0, 1]]]
    np.testing.assert_array_equal(placement.contiguous(1, 6, 4, 2).expert_MDS, wanted)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: placement.greedy(np.ones((1, 6)), 4, 1), "nearest redundant that does: 2$"),
        (lambda: placement.greedy(np.ones((1, 6)), 4, 3), "nearest redundant that does: 2 or 6"),
        (lambda: placement.contiguous(1, 6, 4), "nearest redundant that does: 2$"),
        (lambda: placement.greedy(np.ones((1, 6)), 0), "devices >= 1"),
        (lambda: placement.greedy(np.ones((1, 6)), 2, -2), "redundant >= 0"),
        (lambda: placement.greedy(np.ones(6), 2), "shape .layers, experts.; got .6,"),
        (lambda: placement.greedy([[1, np.nan]], 2), "finite"),
        (lambda: placement.greedy([[1, -1]], 2), "finite counts or shares >= 0"),
        (
            lambda: placement.hierarchical(np.ones((1, 8)), 4, nodes=2, groups=3),
            "8 experts do not divide into 3 groups",
        ),
        (
            lambda: placement.hierarchical(np.ones((1, 8)), 4, nodes=4, groups=2),
            "2 groups do not divide into 4 nodes",
        ),
        (
            lambda: placement.hierarchical(np.ones((1, 8)), 2, nodes=4, groups=4),
            "2 devices do not divide into 4 nodes",
        ),
        (
            lambda: placement.Placement(np.zeros((1, 2, 1), int), 2),
            "expert 1 has no slot in layer 0",
        ),
        (lambda: placement.Placement(np.full((1, 2, 1), 2), 2), "experts 0 to 1"),
        (lambda: placement.Placement(np.zeros((2, 1)), 2), "wants integers"),
        (
            lambda: placement.imbalance(placement.contiguous(2, 4, 2), np.ones((1, 4))),
            "load has the shape .1, 4.; the placement wants .2, 4.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(action, message):
    with pytest.raises(PlacementError, match=message):
        action()


def _trace(document_expert):
    """One layer, K = 1, one token an entry; column 4 is an expert without computation, 5 is none."""
    expert_T = np.concatenate(document_expert)
    return Trace(
        expert_MTK=expert_T[None, :, None],
        token_id_T=np.zeros(len(expert_T), int),
        domain_T=np.zeros(len(expert_T), int),
        document_T=np.repeat(
            np.arange(len(document_expert))[::-1], [len(d) for d in document_expert]
        ),
        layers=[0],
        domains=["a"],
        num_experts=4,
        num_columns=5,
    )


def test_a_trace_counts_for_its_computing_experts():
    np.testing.assert_array_equal(
        placement.expert_load(_trace([[0, 0, 3, 4], [5, 1]])), [[2, 1, 0, 1]]
    )


def test_a_placement_is_fitted_to_the_first_documents_and_measured_on_the_others():
    # first document 3 3 1 1 of experts 0 1 2 3: in order 6 and 2; placed {0, 2}, {1, 3}: 4 and 4
    # second document 3 1 3 1: in order 4 and 4; the placement makes 6 and 2
    first, second = [0] * 3 + [1] * 3 + [2, 3], [0] * 3 + [1] + [2] * 3 + [3]
    found = placement.evaluate_placement(_trace([first, second]), 2)
    assert found.documents == (1, 1)
    np.testing.assert_allclose(found.before_fit_M, [6 / 4 - 1])
    np.testing.assert_allclose(found.after_fit_M, [0])
    np.testing.assert_allclose(found.before_held_M, [0])
    np.testing.assert_allclose(found.after_held_M, [6 / 4 - 1])
    # the same with both documents alike: it generalises
    found = placement.evaluate_placement(_trace([first] * 4), 2, fit_share=0.75)
    assert found.documents == (3, 1)
    np.testing.assert_allclose([found.before_held_M, found.after_held_M], [[0.5], [0]])


def test_evaluation_in_nodes_and_its_errors():
    made = _trace([[0, 1, 2, 3]] * 2)
    found = placement.evaluate_placement(made, 2, nodes=2, groups=2, redundant=2)
    assert found.placement.expert_MDS.shape == (1, 2, 3)
    with pytest.raises(PlacementError, match="both or none"):
        placement.evaluate_placement(made, 2, nodes=2)
    with pytest.raises(PlacementError, match="between 0 and 1"):
        placement.evaluate_placement(made, 2, fit_share=1.0)
    with pytest.raises(PlacementError, match="two documents at least"):
        placement.evaluate_placement(_trace([[0, 1]]), 2)
