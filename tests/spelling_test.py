"""Edits between words, and what a mistyped path was meant to be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab import spelling

PATHS = [
    "model.width",
    "model.num_layers",
    "moe.num_experts",
    "moe.expert_width",
    "optimizer.learning_rate",
    "optimizer.b1",
    "optimizer.b2",
    "balance.switch_loss.coefficient",
    "balance.z_loss.coefficient",
    "train.num_steps",
    "train.batch_size",
    "evaluation.batch_size",
    "router.k",
]


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("abc", "ab", 1),  # drop c
        ("abc", "abbc", 1),  # double b
        ("abc", "acb", 1),  # swap b and c: one edit, not two
        ("abc", "axc", 1),  # replace
        ("kitten", "sitting", 3),  # k->s, e->i, +g
        ("num_experts", "", 11),  # drop every letter
        (
            "ca",
            "abc",
            3,
        ),  # each letter may be edited once: swap, then insert between, is not allowed
    ],
)
def test_distance_counts_edits(a, b, edits):
    assert spelling.distance(a, b) == edits
    assert spelling.distance(b, a) == edits


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_distance_is_between_the_difference_and_the_longer_length(a, b):
    assert abs(len(a) - len(b)) <= spelling.distance(a, b) <= max(len(a), len(b))
    assert (spelling.distance(a, b) == 0) == (a == b)


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.integers(0, 6))
def test_distance_stops_at_a_limit(a, b, limit):
    assert spelling.distance(a, b, limit) == min(spelling.distance(a, b), limit + 1)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.wdith", ["model.width"]),
        ("mdoel.width", ["model.width"]),
        ("model.num_experts", ["moe.num_experts"]),  # the right leaf in the wrong section
        ("num_experts", ["moe.num_experts"]),  # no section
        ("optimizer.lr", ["optimizer.learning_rate"]),  # initials
        ("train.steps", ["train.num_steps"]),  # one of its words
        ("train.batchsize", ["train.batch_size"]),
        ("optimizer.b", ["optimizer.b1", "optimizer.b2"]),  # a tie shows both
        ("balance.switch_los.coefficient", ["balance.switch_loss.coefficient"]),
        ("model.width.x", ["model.width"]),  # a field taken for a section
        ("router.", ["router.k"]),
        ("model.colour", []),  # near nothing
    ],
)
def test_closest_finds_what_was_meant(typed, meant):
    assert spelling.closest(typed, PATHS) == meant


def test_hint_reads_as_the_end_of_a_sentence():
    assert spelling.hint("kk", ["k"], "router.") == "; did you mean router.k?"
    assert spelling.hint("colour", PATHS) == ""
    assert spelling.hint("x", []) == ""
