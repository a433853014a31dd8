"""The k best columns: against a stable sort, with ties, zeros of both signs, infinities and NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import scores, selection

BOTH = [selection._inserted, selection._sorted]


def by_stable_sort(rank_TC, k):
    """NaN first, then largest first, ties to the lowest column."""
    key = np.where(np.isnan(rank_TC), -np.inf, -rank_TC)
    by_value = np.argsort(key, axis=1, kind="stable")
    nan_first = np.argsort(~np.isnan(np.take_along_axis(rank_TC, by_value, 1)), 1, kind="stable")
    return np.take_along_axis(by_value, nan_first, 1)[:, :k]


@pytest.mark.parametrize("top_k", BOTH)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    columns=st.sampled_from([1, 3, 8]),
    distinct=st.sampled_from([1, 3, 100]),
)
def test_agrees_with_a_stable_sort(top_k, seed, columns, distinct):
    draw = np.random.default_rng(seed)
    values = draw.standard_normal(distinct).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.2e-38], np.float32)
    rank_TC = draw.choice(np.concatenate([values, special]), (9, columns))
    for k in {1, columns}:
        assert np.array_equal(top_k(jnp.asarray(rank_TC), k), by_stable_sort(rank_TC, k))


def test_by_hand():
    # Column 3 (5) is largest; 1 and 2 tie at 2, the lower one first; masked columns come last, in order.
    rank = jnp.tile(jnp.array([[-jnp.inf, 2.0, 2.0, 5.0, -jnp.inf]]), (selection._FEWEST_ROWS, 1))
    assert selection.top_k(rank, 5).tolist() == [[3, 1, 2, 0, 4]] * selection._FEWEST_ROWS


def test_many_rows_take_the_insertion_and_few_the_sort():
    rank = jnp.zeros((selection._FEWEST_ROWS, 4))
    assert "while" in jax.jit(selection.top_k, static_argnums=1).lower(rank, 2).as_text()
    assert "while" not in jax.jit(selection.top_k, static_argnums=1).lower(rank[1:], 2).as_text()


def test_select_reads_the_columns_and_its_gradient_is_dense():
    value = jnp.array([[1.0, 2.0, 3.0], [4.0, jnp.nan, 6.0]])
    column = jnp.array([[2, 0], [0, 3]])  # 3: not used
    assert scores.select(value, column).tolist() == [[3.0, 1.0], [4.0, 0.0]]
    gradient = jax.grad(lambda v: jnp.sum(scores.select(v, column) * jnp.array([[1.0, 10.0]])))
    assert gradient(value).tolist() == [[10.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert "scatter" not in str(jax.make_jaxpr(gradient)(value))


def test_select_twice_differentiable():
    value, column = jnp.array([[1.0, 2.0]]), jnp.array([[1]])
    hessian = jax.hessian(lambda v: jnp.sum(scores.select(v, column) ** 2))(value)
    assert np.asarray(hessian).reshape(2, 2).tolist() == [[0.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_columns_is_refused(k):
    with pytest.raises(ValueError, match=f"from 1 to the 4 columns, got {k}"):
        selection.top_k(jnp.zeros((512, 4)), k)
