"""Block Hadamard transforms: the matrix, orthonormality, exact inverses, signs, invariance of products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from formats_spec import F32

from pallas_kernels import formats
from pallas_kernels.formats import hadamard

KEY = jax.random.key(5)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@pytest.mark.parametrize("block", hadamard.BLOCKS)
def test_the_matrix_is_sylvesters(block):
    matrix = formats.hadamard_matrix(block)
    np.testing.assert_array_equal(matrix, scipy.linalg.hadamard(block))
    np.testing.assert_array_equal(matrix @ matrix, block * np.eye(block))
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.parametrize("block", hadamard.BLOCKS)
@pytest.mark.parametrize("per_block", [None, True, False])
def test_transform_equals_the_definition_in_float64(block, per_block):
    x = draw(3, 5, 2 * block)
    signs = None
    if per_block is not None:
        signs = formats.random_signs(KEY, block if per_block else 2 * block)
    wide = np.ones(2 * block) if signs is None else np.resize(np.asarray(signs), 2 * block)
    blocks = (x.astype(np.float64) * wide).reshape(3, 5, 2, block)
    want = (blocks @ scipy.linalg.hadamard(block) / np.sqrt(block)).reshape(x.shape)
    y = formats.block_hadamard(x, block, signs=signs)
    # Sums of 128 numbers of about 1: float32 rounds within 1e-6.
    np.testing.assert_allclose(y, want, atol=2e-6)
    back = formats.inverse_block_hadamard(y, block, signs=signs)
    np.testing.assert_allclose(back, x, atol=4e-6)
    norm = np.linalg.norm(y.reshape(-1, block), axis=-1)
    np.testing.assert_allclose(norm, np.linalg.norm(x.reshape(-1, block), axis=-1), rtol=2e-6)


@pytest.mark.parametrize("block", [16, 64])
def test_inverse_is_exact_where_nothing_rounds(block):
    # 1 / sqrt(16) and 1 / sqrt(64) are powers of two, and sums of small integers are exact.
    x = np.random.default_rng(1).integers(-99, 100, (7, 4 * block)).astype(F32)
    for signs in (None, formats.random_signs(KEY, block), formats.random_signs(KEY, 4 * block)):
        y = formats.block_hadamard(x, block, signs=signs)
        np.testing.assert_array_equal(formats.inverse_block_hadamard(y, block, signs=signs), x)
        assert not np.array_equal(y, x)
    twice = formats.block_hadamard(formats.block_hadamard(x, block), block)
    np.testing.assert_array_equal(twice, x)


@pytest.mark.parametrize("block", [32, 128])
def test_twice_is_the_identity_up_to_the_rounding_of_the_root(block):
    x = np.random.default_rng(1).integers(-99, 100, (7, block)).astype(F32)
    # Two factors fl(1 / sqrt(B)), each within 2^-24, and two roundings of sums that are integers times it.
    twice = formats.block_hadamard(formats.block_hadamard(x, block), block)
    np.testing.assert_allclose(twice, x, atol=99 * block**0.5 * 2.0**-22)


def test_the_recipes_fixed_signs_by_hand():
    # The first row of H is ones: a one in place 0 becomes 1/4 everywhere; in place 3, whose sign is -1, minus row 3.
    signs = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.int8)
    y = formats.block_hadamard(np.eye(16, dtype=F32), 16, signs=signs)
    np.testing.assert_array_equal(y[0], np.full(16, 0.25))
    np.testing.assert_array_equal(y[3, :8], -0.25 * np.array([1, -1, -1, 1, 1, -1, -1, 1]))


def test_products_do_not_change_and_outliers_spread():
    x, w = draw(6, 128), draw(9, 128, seed=1)
    x[2, 17] = 300
    signs = formats.random_signs(KEY, 128)
    rotated = [formats.block_hadamard(a, 64, signs=signs) for a in (x, w)]
    product = np.asarray(rotated[0], np.float64) @ np.asarray(rotated[1], np.float64).T
    np.testing.assert_allclose(product, x.astype(np.float64) @ w.T.astype(np.float64), atol=3e-4)
    assert np.abs(rotated[0][2]).max() < 300 / 8 + 5


def test_compiled_mapped_and_bfloat16_give_the_same():
    x = draw(4, 3, 96)
    signs = formats.random_signs(KEY, 32)
    want = formats.block_hadamard(x, 32, signs=signs)
    transform = lambda x: formats.block_hadamard(x, 32, signs=signs)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(transform)(x), want)
    np.testing.assert_allclose(jax.vmap(transform)(x), want, atol=1e-6)
    low = jnp.asarray(x, jnp.bfloat16)
    found = formats.block_hadamard(low, 32, signs=signs)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, transform(low.astype(jnp.float32)))
    assert formats.block_hadamard(np.zeros((0, 32), F32), 32).shape == (0, 32)


def test_random_signs_are_signs():
    signs = np.asarray(formats.random_signs(KEY, 1000))
    assert signs.dtype == np.int8 and set(signs) == {-1, 1}
    assert abs(signs.mean()) < 4 / np.sqrt(1000)


@pytest.mark.parametrize(
    ("shape", "dtype", "block", "signs", "message"),
    [
        ((4, 48), F32, 48, None, "block must be one of 16, 32, 64, 128, got 48"),
        ((4, 48), F32, 32, None, r"multiple of 32, got shape \(4, 48\)"),
        ((4, 48), np.int32, 16, None, "x needs float32, bfloat16 or float16, got int32"),
        ((4, 48), F32, 16, np.ones(16, F32), r"int8 of shape \(16,\) or \(48,\), got float32"),
        ((4, 48), F32, 16, np.ones(32, np.int8), r"\(16,\) or \(48,\), got int8 of shape \(32,\)"),
    ],
)
def test_bad_input_is_one_clear_error(shape, dtype, block, signs, message):
    for transform in (formats.block_hadamard, formats.inverse_block_hadamard):
        with pytest.raises(ValueError, match=message):
            transform(np.zeros(shape, dtype), block, signs=signs)
