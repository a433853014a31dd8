"""What quantizes rows: the definition, the choice of a kernel, and what is refused.

T tokens, N rows of the output, K contraction axis.
"""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, formats, quantize
from pallas_kernels.quantize import api

_B200 = device.Device("gpu", "NVIDIA B200", (10, 0), 148)
_H100 = device.Device("gpu", "NVIDIA H100", (9, 0), 132)


def _x(num_rows=5, depth=256, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(0), (num_rows, depth)).astype(dtype)


def test_doctest():
    found = doctest.testmod(api)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_46", "mxfp4"])
def test_is_what_formats_makes(format):
    x, key = _x(), jax.random.key(1)
    token_N = jnp.array([4, 0, 4, 2, 1, 1, 3])
    got = quantize.quantize_rows(x, format, token_N=token_N, hadamard=16, key=key)
    rotated = formats.block_hadamard(x[token_N], 16)
    expected = formats.quantize(rotated, format, num_batch_axes=1, key=key)
    jax.tree.map(np.testing.assert_array_equal, formats.arranged(got, "linear"), expected)
    assert got.layout == "tcgen05" and got.shape == (7, 256)


def test_rows_do_not_see_each_other():
    x = _x()
    alone = quantize.quantize_rows(x[2:3], "nvfp4")
    among = formats.arranged(quantize.quantize_rows(x.at[0].mul(100), "nvfp4"), "linear")
    alone = formats.arranged(alone, "linear")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[2]), alone, among)


def test_given_maxima():
    amax_N = jnp.array([1.0, 2.0, 4.0, 8.0, 0.0])
    got = quantize.quantize_rows(_x(), "nvfp4", amax_N=amax_N)
    np.testing.assert_array_equal(got.global_amax, amax_N)
    assert not formats.dequantize(got)[4].any()


def _options(**options):
    return dict(rule="amax", token_N=None, amax_N=None, hadamard=None, key=None) | options


def test_choice():
    assert quantize.choose(None, _x(), "nvfp4", **_options()) == "xla"
    with device.assume(_H100):
        assert quantize.choose("auto", _x(), "nvfp4", **_options()) == "xla"
        with pytest.raises(NotImplementedError, match="10.x, this is NVIDIA H100"):
            quantize.quantize_rows(_x(), "nvfp4", implementation="mosaic_sm100")
    with device.assume(_B200):
        assert quantize.choose(None, _x(), "nvfp4", **_options()) == "mosaic_sm100"
        assert quantize.choose("xla", _x(), "nvfp4", **_options()) == "xla"
        long = jax.ShapeDtypeStruct((8, 32768), jnp.bfloat16)
        given = _options(amax_N=jnp.ones(8))
        assert quantize.choose(None, long, "nvfp4", **_options()) == "xla"
        assert quantize.choose(None, long, "nvfp4", **given) == "mosaic_sm100"


@pytest.mark.parametrize(
    "x, format, options, message",
    [
        (_x(depth=80), "nvfp4", {}, "multiple of 64"),
        (_x(depth=64), "mxfp4", {}, "multiple of 128"),
        (_x(), "nvfp4_46", {}, "not to nvfp4_46"),
        (_x(), "nvfp4", dict(hadamard=32), "blocks of 16"),
        (_x(num_rows=0), "nvfp4", {}, "at least one row"),
        (jnp.zeros((1, 65536), jnp.bfloat16), "nvfp4", {}, "amax_N"),
    ],
)
def test_the_kernel_refuses(x, format, options, message):
    """A named implementation runs or says why not; without a name, XLA takes over."""
    with device.assume(_B200):
        with pytest.raises(NotImplementedError, match=message):
            quantize.quantize_rows(x, format, implementation="mosaic_sm100", **options)
        quantize.quantize_rows(x, format, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(format="mxfp8_e4m3"), "unknown format"),
        (dict(rule="floor"), "unknown rule"),
        (dict(x=_x()[0]), r"x must be \(T, K\)"),
        (dict(x=jnp.ones((2, 64), jnp.int32)), "float32, bfloat16 or float16"),
        (dict(x=jnp.ones((2, 24))), "multiple of 16"),
        (dict(hadamard=8), "hadamard must be"),
        (dict(x=jnp.ones((2, 48)), hadamard=32), "divide K"),
        (dict(token_N=jnp.ones(3)), "token_N must be integers"),
        (dict(token_N=jnp.ones((3, 1), jnp.int32)), "token_N must be integers"),
        (dict(amax_N=jnp.ones(4)), r"float32 \(5,\)"),
        (dict(amax_N=jnp.ones(5, jnp.bfloat16)), "float32"),
        (dict(format="mxfp4", amax_N=jnp.ones(5)), "no global scale"),
        (dict(implementation="triton"), "unknown implementation"),
    ],
)
def test_refuses(options, message):
    arguments = dict(x=_x(), format="nvfp4") | options
    x, format = arguments.pop("x"), arguments.pop("format")
    with pytest.raises(ValueError, match=message):
        quantize.quantize_rows(x, format, **arguments)
