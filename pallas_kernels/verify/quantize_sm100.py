"""Cases of the quantize kernel on data-centre Blackwell: rows of a layer's activations, and of those it makes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Compiled, Target
from pallas_kernels.formats import FORMATS
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.shapes import HIDDEN, ROWS, WIDTH, array

_TOKENS = ROWS // 8
_TEMP_BYTES = 1024
_RANDOM_BYTES = 6  # of each element: 4 that XLA keeps, 2 that the kernel reads
_APPROXIMATE = r"\b(?:div\.(?:full|approx)|rcp\.approx|fma\.|[a-z]+\.[a-z0-9.]*ftz)"


def _build(
    target: Target, *, format: str, depth: int, dtype: jnp.dtype, options: dict, arrays: dict
) -> Program:
    from pallas_kernels.quantize import mosaic_sm100

    def fn(x, arrays):
        arrays = dict(arrays)
        if "key" in arrays:
            arrays["key"] = jax.random.wrap_key_data(arrays["key"])
        return mosaic_sm100.quantize_rows(
            x, format, num_sms=target.num_sms, **_rule(format), **options, **arrays
        )

    rows = _TOKENS if "token_N" in arrays else ROWS
    return fn, (array(rows, depth, dtype=dtype), arrays)


def _rule(format: str) -> dict:
    return dict(rule=FORMATS[format].rules[0])


def _ieee(compiled: Compiled) -> list[str]:
    """Expects no division that is not rounded to nearest, nothing fused, no subnormal flushed."""
    found = sum(kernel.ptx_count(_APPROXIMATE) for kernel in compiled.kernels)
    return [f"{found} approximate, fused or flushing instructions in PTX"] if found else []


def _casts(count: int):
    """Expects this many casts of two elements to E2M1: each element of a line is rounded once."""

    def expectation(compiled: Compiled) -> list[str]:
        found = sum(
            kernel.ptx_count(r"cvt\.rn\.satfinite\.e2m1x2\.f32") for kernel in compiled.kernels
        )
        return [] if found == count else [f"{found} casts to E2M1 instead of {count}"]

    return expectation


def _case(
    name: str,
    format: str,
    depth: int,
    dtype: jnp.dtype = jnp.bfloat16,
    arrays: tuple[str, ...] = (),
    **options,
) -> Case:
    known = {
        "token_N": array(ROWS, dtype=jnp.int32),
        "amax_N": array(ROWS),
        "key": array(2, dtype=jnp.uint32),
    }
    given = {array: known[array] for array in arrays}
    build = functools.partial(
        _build, format=format, depth=depth, dtype=dtype, options=options, arrays=given
    )
    random = _RANDOM_BYTES * ROWS * depth if "key" in arrays else 0
    return Case(
        name=name,
        format=format,
        runs_on=capability(10),
        build=build,
        expectations=(
            expect.num_kernels(1),
            expect.no_spills,
            expect.within_limits,
            expect.no_mma(),
            expect.temp_at_most(random + _TEMP_BYTES),
            _ieee,
            _casts(4 * FORMATS[format].block // 2),
        ),
        each_gpu=name == "per token",
    )


FAMILY = Family(
    name="quantize_sm100",
    about="activations to packed FP4 and tensor-core scales",
    interpreted="bits, races and mutants",
    cases=(
        _case("per token", "nvfp4", WIDTH),
        _case("per token, float32", "nvfp4", HIDDEN, jnp.float32),
        _case("gathered, Hadamard", "nvfp4", WIDTH, arrays=("token_N",), hadamard=16),
        _case("given maxima, stochastic", "nvfp4", HIDDEN, arrays=("amax_N", "key")),
        _case("per token", "mxfp4", WIDTH),
        _case("gathered, stochastic", "mxfp4", HIDDEN, arrays=("token_N", "key")),
        _case("Hadamard, float32", "mxfp4", HIDDEN, jnp.float32, hadamard=16),
    ),
)
