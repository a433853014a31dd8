"""What is around tokamax's kernel, with a stand-in for it: the kernel itself needs a GPU."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import reference, tokamax_ragged


def _ragged_dot(x_TK, w_EKN, group_sizes_E, *, preferred_element_type, implementation):
    """As tokamax has it: rows beyond the groups are anything."""
    assert implementation == "mosaic_gpu"
    y_TN = jax.lax.ragged_dot(x_TK.astype(jnp.float32), w_EKN.astype(jnp.float32), group_sizes_E)
    inside_T1 = (jnp.arange(len(y_TN)) < jnp.sum(group_sizes_E))[:, None]
    return jnp.where(inside_T1, y_TN, jnp.nan).astype(preferred_element_type)


@pytest.fixture
def operands(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=_ragged_dot))
    rng = np.random.default_rng(0)
    x_TK = jnp.asarray(rng.integers(-4, 5, (7, 8)), jnp.bfloat16)
    w_ENK = jnp.asarray(rng.integers(-4, 5, (3, 4, 8)), jnp.bfloat16)
    return x_TK, w_ENK, jnp.asarray([2, 0, 3], jnp.int32)


@pytest.mark.parametrize("extras", [False, True])
def test_as_the_reference(operands, extras):
    bias_EN = jnp.arange(12.0).reshape(3, 4) if extras else None
    row_scale_T = jnp.arange(1.0, 8.0) if extras else None
    got = tokamax_ragged.grouped_matmul(*operands, bias_EN, row_scale_T, jnp.float32)
    expected = reference.grouped_matmul(*operands, bias_EN, row_scale_T, jnp.float32)
    np.testing.assert_array_equal(got, expected)


def test_refuses(operands, monkeypatch):
    x_TK, *others = operands
    with pytest.raises(NotImplementedError, match="float32 and bfloat16"):
        tokamax_ragged.grouped_matmul(x_TK.astype(jnp.float32), *others, None, None, jnp.float32)
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(NotImplementedError, match=r"moelab\[cuda\]"):
        tokamax_ragged.grouped_matmul(*operands, None, None, jnp.float32)
