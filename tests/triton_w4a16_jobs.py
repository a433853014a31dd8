"""What of the weight-only Triton kernel is run in the interpreter; imported there (see triton_interpreted.py)."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.grouped_matmul import triton_launch
from pallas_kernels.grouped_matmul import triton_w4a16_kernel as module
from tests import triton_cases
from tests.mutants import mutated
from tests.mutants.triton_w4a16 import CAUGHT_BY, MUTANTS

scaled_weights = module.scaled_weights


@triton.jit
def decoded(
    codes,
    scales,
    value,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    E4M3: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """value[n] = every code times scale n, for the 256 scales."""
    row = tl.arange(0, 256)[:, None]
    codes_N = tl.load(codes + row * 0 + tl.arange(0, 16)[None, :])
    scales_NS = tl.load(scales + row + tl.arange(0, S)[None, :] * 0)
    value_NK = scaled_weights(codes_N, scales_NS, BLOCK, E4M3, DTYPE, True)
    tl.store(value + row * 32 + tl.arange(0, 32)[None, :], value_NK.to(tl.float32))


def results(interpret, interpret_or_fail, tensor) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) of everything that the tests look at."""
    for block, e4m3, name, dtype in (
        (16, True, "bfloat16", tl.bfloat16),
        (16, True, "float16", tl.float16),
        (32, False, "bfloat16", tl.bfloat16),
    ):
        value = tensor(np.full((256, 32), np.nan, np.float32))
        codes = np.asarray(triton_cases.every_code()).reshape(16, 2)
        packed = (codes[:, 0] | codes[:, 1] << 4).astype(np.uint8)
        decoded[(1,)](
            tensor(packed), tensor(triton_cases.BYTES), value, 32 // block, block, e4m3, dtype
        )
        yield f"decoded/{block}/{name}", value.numpy(np.float32, (256, 32))
    for format in triton_cases.FORMATS:
        for name, case in triton_cases.CASES.items():
            yield f"{format}/{name}", interpret(module.w4a16, call(case, format))
    for name, case in triton_cases.FLOAT16_CASES.items():
        yield f"float16/{name}", interpret(module.w4a16, call(case, "nvfp4"))
    works = {
        f"{format}/{name}": call(triton_cases.CASES[name], format) for format, name in CAUGHT_BY
    }
    for mutant in MUTANTS:
        kernel = mutated(module.__name__, mutant).w4a16
        for name, work in works.items():
            yield f"mutant/{mutant.name}/{name}", interpret_or_fail(kernel, work)
    for name, work in works.items():
        yield f"after mutants/{name}", interpret(module.w4a16, work)


def call(case: triton_cases.Case, format: str) -> triton_launch.Call:
    """Returns the launch that `grouped_matmul_codes` would make."""
    inputs = triton_cases.make(case, format)
    return triton_launch.prepare(
        {"x": inputs.x_TK},
        inputs.w,
        inputs.sizes_E,
        num_rows=case.rows,
        expert_scale_E=None,
        row_scale_T=inputs.row_scale_T,
        bias_EN=inputs.bias_EN,
        out_dtype=jnp.dtype(case.out_dtype),
        tiling=case.tiling,
    )
