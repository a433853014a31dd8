"""What of the W4A4 Triton kernel is run in the interpreter; imported there (see triton_interpreted.py)."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import triton_launch
from pallas_kernels.grouped_matmul import triton_w4a4_kernel as module
from tests import triton_cases
from tests.mutants import mutated
from tests.mutants.triton_w4a4 import CAUGHT_BY, MUTANTS


def results(interpret, interpret_or_fail, tensor) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) of everything that the tests look at."""
    for format in triton_cases.FORMATS:
        for name in triton_cases.QUANTIZED_CASES:
            work = call(triton_cases.CASES[name], format)
            yield f"{format}/{name}", interpret(module.w4a4, work)
    works = {
        f"{format}/{name}": call(triton_cases.CASES[name], format) for format, name in CAUGHT_BY
    }
    for mutant in MUTANTS:
        kernel = mutated(module.__name__, mutant).w4a4
        for name, work in works.items():
            yield f"mutant/{mutant.name}/{name}", interpret_or_fail(kernel, work)
    for name, work in works.items():
        yield f"after mutants/{name}", interpret(module.w4a4, work)


def call(case: triton_cases.Case, format: str) -> triton_launch.Call:
    """Returns the launch that `grouped_matmul_codes` would make."""
    inputs, x = triton_cases.quantized(case, format)
    scale_T = formats.global_scale(x)
    if scale_T is not None and inputs.row_scale_T is not None:
        scale_T = scale_T * inputs.row_scale_T
    return triton_launch.prepare(
        {"x_codes": x.codes, "x_scales": x.scales},
        inputs.w,
        inputs.sizes_E,
        num_rows=case.rows,
        expert_scale_E=None,
        row_scale_T=inputs.row_scale_T if scale_T is None else scale_T,
        bias_EN=inputs.bias_EN,
        out_dtype=jnp.dtype(case.out_dtype),
        tiling=case.tiling,
    )
