"""Where codes and scales lie: one thing at a time differs, so a wrong tile, lane or nibble shows as a wrong place."""

import jax.numpy as jnp
import numpy as np
import pytest
from products import BLOCK, ONE, doubled, packed, product, unit_scales

FORMATS = ["nvfp4", "mxfp4"]
R, K = 128, 512


@pytest.mark.parametrize("format", FORMATS)
def test_one_hot_codes_read_the_weights(kernel, format):
    """Row r of x is 1 at column r + offset: y[r, n] is w[n, r + offset], whose codes go through all values."""
    n, k = np.meshgrid(np.arange(R), np.arange(K), indexing="ij")
    w_code = ((5 * n + 3 * k + n * k // 7) % 16).astype(np.uint8)
    w = packed(w_code[None], unit_scales((1, R, K), format), format)
    value = np.asarray(w_values(w_code))
    for offset in range(0, K, R):
        x_code = np.zeros((R, K), np.uint8)
        x_code[np.arange(R), np.arange(R) + offset] = ONE
        x = packed(x_code, unit_scales((R, K), format), format)
        y = product(kernel, x, w, [R])
        np.testing.assert_array_equal(y, value[:, offset : offset + R].T)


@pytest.mark.parametrize("format", FORMATS)
def test_one_hot_scales_of_the_weights(kernel, format):
    """x is 1 in one block only, so that y[r, n] is that block's scale in row n, and all scales differ somewhere."""
    blocks = K // BLOCK[format]
    n, b = np.meshgrid(np.arange(R), np.arange(blocks), indexing="ij")
    power = (3 * n + 5 * b + n // 32) % 8
    step = 8 if format == "nvfp4" else 1
    scale = (unit_scales((R, K), format) + step * (power - 4)).astype(np.uint8)
    w = packed(np.full((1, R, K), ONE), scale[None], format)
    for block in range(0, blocks, 3):
        x_code = np.zeros((R, K), np.uint8)
        x_code[:, block * BLOCK[format]] = ONE
        y = product(kernel, packed(x_code, unit_scales((R, K), format), format), w, [R])
        np.testing.assert_array_equal(y, np.tile(2.0 ** (power[:, block] - 4), (R, 1)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row, block", [(0, 0), (1, 3), (31, 4), (32, 5), (77, 9), (127, 15)])
def test_one_scale_of_the_rows(kernel, format, row, block):
    """One scale of x is doubled: that row alone gains one block's length."""
    if "bfloat16" in kernel.x:
        pytest.skip(f"{kernel} takes no scales of rows")
    scale = unit_scales((R, K), format)
    scale[row, block] = doubled(scale[row, block], format)
    x = packed(np.full((R, K), ONE), scale, format)
    w = packed(np.full((1, R, K), ONE), unit_scales((1, R, K), format), format)
    want = np.full((R, R), float(K))
    want[row] += BLOCK[format]
    np.testing.assert_array_equal(product(kernel, x, w, [R]), want)


def w_values(code):
    """Values of E2M1 codes."""
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return jnp.asarray(np.where(code & 8, -1, 1) * magnitude[code & 7])
