"""Inputs of the Triton kernels' tests, the same in the tests and in the process that runs Triton's interpreter.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import formats
from pallas_kernels.grouped_matmul.triton_launch import Tiling

SMALL = Tiling(16, 16, 64, 4, 1)
FORMATS = ("nvfp4", "mxfp4")
BYTES = np.arange(256, dtype=np.uint8)
# float32 sums of some hundred products, in another order and with the global scale outside.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
      sizes: rows per expert.
      rows, outputs, inputs: T, N and K.
      x_dtype, out_dtype: names of dtypes.
      row_scale, bias: whether there are any.
      values: "normal", or "integers": small ones that formats hold, so that everything is exact.
      broken: "" or what is put where it must do no harm: "nan scale" in one block of weights, "nan row" in one row
        of x, "nan tail" in the rows beyond the groups.
      tiling: of the kernel.
    """

    sizes: tuple[int, ...]
    rows: int
    outputs: int = 32
    inputs: int = 128
    x_dtype: str = "bfloat16"
    out_dtype: str = "float32"
    row_scale: bool = False
    bias: bool = False
    values: str = "normal"
    broken: str = ""
    tiling: Tiling = SMALL


CASES = {
    # Tails of N and K, an empty expert, rows of nobody, a block of rows that experts share.
    "ragged": Case((9, 0, 12), 27, outputs=20, inputs=96, row_scale=True, bias=True),
    "nan scale": Case(
        (5, 0, 14), 22, outputs=20, inputs=96, row_scale=True, bias=True, broken="nan scale"
    ),
    "one token": Case((0, 0, 1, 0), 1, outputs=24),
    "no token": Case((0, 0), 20, outputs=16),
    "aligned": Case((16, 32), 48, inputs=64, row_scale=True),
    "one row each": Case((1,) * 8, 19, outputs=16, inputs=64, bias=True),
    "more than there are": Case((9, 40), 30, outputs=16, inputs=64),
    "long": Case((3, 2), 6, outputs=16, inputs=544),
    "large tiles": Case((40, 23), 70, outputs=96, inputs=160, tiling=Tiling(64, 64, 128, 4, 1)),
    "integers": Case((5, 11, 16), 40, inputs=96, values="integers", out_dtype="bfloat16"),
    "nan row": Case((20, 7), 32, inputs=64, broken="nan row"),
    "nan tail": Case((20, 7), 32, inputs=64, broken="nan tail"),
}
FLOAT16_CASES = {
    "ragged": dataclasses.replace(CASES["ragged"], x_dtype="float16"),
    "integers": dataclasses.replace(CASES["integers"], x_dtype="float16", out_dtype="float16"),
}
QUANTIZED_CASES = (
    "ragged",
    "nan scale",
    "one token",
    "no token",
    "aligned",
    "one row each",
    "long",
    "large tiles",
    "integers",
)
NAN_ROW, NAN_EXPERT, NAN_OUTPUT = 3, -1, 5


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a case, on the CPU."""

    x_TK: jax.Array
    w: formats.BlockScaled
    sizes_E: jax.Array
    row_scale_T: jax.Array | None
    bias_EN: jax.Array | None


def make(case: Case, format: str) -> Inputs:
    """Draws the arrays of a case, always the same."""
    rng = np.random.default_rng(7)
    num_experts = len(case.sizes)
    x_TK = rng.standard_normal((case.rows, case.inputs))
    w_ENK = rng.standard_normal((num_experts, case.outputs, case.inputs)) * 3.0
    row_scale_T = rng.uniform(0.5, 2.0, case.rows) if case.row_scale else None
    bias_EN = rng.standard_normal((num_experts, case.outputs)) if case.bias else None
    if case.values == "integers":
        x_TK = rng.integers(-2, 3, x_TK.shape)
        w_ENK = rng.integers(-1, 2, w_ENK.shape)
    w = formats.quantize(jnp.asarray(w_ENK, jnp.float32), format)
    if case.values == "integers" and w.global_amax is not None:
        # Scales of 6 and a global scale of 1 / 6 are no integers; those of 1 and 1 are.
        w = integral(w_ENK, format)
    if case.broken == "nan scale":
        w = with_nan(w)
        x_TK = np.abs(x_TK)  # with codes of one sign, so that an infinite scale would not give NaN
    x_TK = x_TK.astype(jnp.dtype(case.x_dtype))
    if case.broken == "nan row":
        x_TK[NAN_ROW, 7] = np.nan
    if case.broken == "nan tail":
        x_TK[sum(case.sizes) :] = np.nan
    return Inputs(
        jnp.asarray(x_TK),
        w,
        jnp.asarray(case.sizes, jnp.int32),
        None if row_scale_T is None else jnp.asarray(row_scale_T, jnp.float32),
        None if bias_EN is None else jnp.asarray(bias_EN, jnp.float32),
    )


def quantized(case: Case, format: str) -> tuple[Inputs, formats.BlockScaled]:
    """Returns a case's arrays, and its rows in 4 bits: per-token global scales, integers under scales of 1."""
    inputs = make(dataclasses.replace(case, x_dtype="float32"), format)
    if case.values == "integers":
        return inputs, integral(np.asarray(inputs.x_TK), format)
    return inputs, formats.quantize(inputs.x_TK, format, num_batch_axes=1)


def integral(w_ENK: np.ndarray, format: str) -> formats.BlockScaled:
    """Packs integers that E2M1 holds under scales of 1."""
    code = ml_dtypes.float4_e2m1fn
    codes = np.asarray(w_ENK, np.float32).astype(code).view(np.uint8) & 15
    spec = formats.FORMATS[format]
    one = 0x38 if spec.scale == "e4m3" else 127
    scales = np.full((*w_ENK.shape[:-1], w_ENK.shape[-1] // spec.block), one, np.uint8)
    amax = None
    if spec.scale == "e4m3":  # a global scale of exactly 1
        amax = jnp.full(w_ENK.shape[:1], 6.0 * spec.scale_bound, jnp.float32)
    return formats.BlockScaled(
        formats.pack(jnp.asarray(codes)), jnp.asarray(scales), amax, format, spec.rules[0]
    )


def with_nan(w: formats.BlockScaled) -> formats.BlockScaled:
    """Gives one block a NaN scale, and codes that are not zero."""
    spec = formats.FORMATS[w.format]
    nan, half = (0x7F if spec.scale == "e4m3" else 0xFF), spec.block // 2
    codes = w.codes.at[NAN_EXPERT, NAN_OUTPUT, :half].set(jnp.uint8(0x22))
    scales = w.scales.at[NAN_EXPERT, NAN_OUTPUT, 0].set(jnp.uint8(nan))
    return dataclasses.replace(w, codes=codes, scales=scales)


def every_code() -> np.ndarray:
    """Returns 32 codes, every one in both halves of a byte: uint8."""
    codes = np.arange(16, dtype=np.uint8)
    return np.concatenate([codes, codes.reshape(8, 2)[:, ::-1].reshape(16)])


def interpreted(family: str, folder: Path) -> dict[str, np.ndarray]:
    """Runs a family's cases in Triton's interpreter, all in one process, since a variable has to be set before."""
    path = folder / "results.npz"
    command = [sys.executable, "-m", "tests.triton_interpreted", family, str(path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(path))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error, relative to the largest magnitude; infinite if NaN is not where it belongs."""
    if not np.array_equal(np.isnan(found), np.isnan(wanted)):
        return np.inf
    wanted = np.nan_to_num(wanted)
    return np.abs(np.nan_to_num(found) - wanted).max() / max(np.abs(wanted).max(), 1e-30)
