"""The public function: arguments are checked here, once, and an implementation is picked.

T tokens, N rows of the output, K contraction axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import device, formats
from pallas_kernels.formats.hadamard import BLOCKS
from pallas_kernels.quantize import mosaic_sm100, xla

IMPLEMENTATIONS = ("mosaic_sm100", "xla")

FORMATS = ("nvfp4", "nvfp4_46", "mxfp4")
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def quantize_rows(
    x_TK: jax.Array,
    format: str,
    *,
    rule: str | None = None,
    token_N: jax.Array | None = None,
    amax_N: jax.Array | None = None,
    hadamard: int | None = None,
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> formats.BlockScaled:
    """Quantizes rows to FP4 with scales as tensor cores read them: the activations of a grouped matmul.

        row n of the result = formats.quantize(block_hadamard(x[token[n]]), format, num_batch_axes=1)

    The kernel returns the bits that `formats.quantize` has on a CPU. On a GPU, "xla" may differ from them in rare codes
    and scales: XLA has LLVM compile divisions to within 2 units in the last place. And there the sums of "xla" with a
    transform have the order of the library that multiplies.

    >>> q = quantize_rows(jnp.ones((2, 64)), "nvfp4", token_N=jnp.array([1, 0, 1]))
    >>> q.shape, q.scales.shape, q.layout
    ((3, 64), (1, 1, 32, 16), 'tcgen05')

    Args:
      x_TK: (T, K) bfloat16, float16 or float32, K a multiple of the block (16 or 32).
      format: "nvfp4", "nvfp4_46" or "mxfp4".
      rule: scale rule; None is the format's first.
      token_N: (N,) integers from 0 to T - 1 (not checked): which row of x each row of the result is, as dispatch to
        experts wants them. None: x's rows as they are.
      amax_N: (N,) float32, each row's global amax where it is not to be the row's own (NVFP4): of its expert's
        calibration, for example. Blocks above it saturate.
      hadamard: block of the transform along K before quantizing, which then is that of `formats.block_hadamard`; None:
        none.
      key: PRNG key to round stochastically, with the random bits of `formats.quantize` for (N, K); None: to nearest.
      implementation: one of IMPLEMENTATIONS; None or "auto" takes the kernel where it can run.

    Returns:
      BlockScaled of shape (N, K), layout "tcgen05": codes (N, K / 2), scales (ceil(N / 128), ceil(K / block / 4), 32,
      16), zeros where there are no rows, global_amax (N,) or None.

    Raises:
      ValueError: arguments that do not fit; an unknown implementation.
      NotImplementedError: the named implementation cannot do this here, and why.
    """
    x_TK = jnp.asarray(x_TK)
    rule = _checked_rule(format, rule)
    _check(x_TK, format, token_N, amax_N, hadamard)
    options = dict(rule=rule, token_N=token_N, amax_N=amax_N, hadamard=hadamard, key=key)
    if choose(implementation, x_TK, format, **options) == "xla":
        return xla.quantize_rows(x_TK, format, **options)
    num_sms = device.current().num_sms
    return mosaic_sm100.quantize_rows(x_TK, format, **options, num_sms=num_sms)


def choose(
    implementation: str | None, x_TK: jax.Array | jax.ShapeDtypeStruct, format: str, **options
) -> str:
    """Returns the name of what `quantize_rows` with these arguments runs on this device.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: the named one cannot do this here, and why.
    """
    if implementation not in (None, "auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"unknown implementation {implementation!r}; allowed: auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "xla":
        return "xla"
    here = device.current()
    reason = mosaic_sm100.unsupported(x_TK, format, **options)
    if not here.is_tcgen05:
        reason = f"mosaic_sm100 needs a GPU of compute capability 10.x, this is {here}"
    if reason is None:
        return "mosaic_sm100"
    if implementation == "mosaic_sm100":
        raise NotImplementedError(reason)
    return "xla"


def _checked_rule(format: str, rule: str | None) -> str:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; allowed: {', '.join(FORMATS)}")
    rules = formats.FORMATS[format].rules
    if rule is not None and rule not in rules:
        raise ValueError(f"unknown rule {rule!r} for format {format}; allowed: {', '.join(rules)}")
    return rules[0] if rule is None else rule


def _check(x_TK, format, token_N, amax_N, hadamard) -> None:
    spec = formats.FORMATS[format]
    if x_TK.ndim != 2 or x_TK.dtype not in _FLOATS:
        raise ValueError(
            f"x must be (T, K) of float32, bfloat16 or float16, got {x_TK.dtype} of shape {x_TK.shape}"
        )
    if x_TK.shape[1] % spec.block:
        raise ValueError(f"{format} needs K a multiple of {spec.block}, got {x_TK.shape[1]}")
    if hadamard is not None and (hadamard not in BLOCKS or x_TK.shape[1] % hadamard):
        raise ValueError(
            f"hadamard must be one of {', '.join(map(str, BLOCKS))} and divide K = {x_TK.shape[1]}, got {hadamard!r}"
        )
    if token_N is not None and (
        token_N.ndim != 1 or not jnp.issubdtype(token_N.dtype, jnp.integer)
    ):
        raise ValueError(
            f"token_N must be integers (N,), got {token_N.dtype} of shape {token_N.shape}"
        )
    if amax_N is None:
        return
    if spec.scale != "e4m3":
        raise ValueError(f"{format} has no global scale: amax_N must be None")
    num_rows = x_TK.shape[0] if token_N is None else token_N.shape[0]
    if amax_N.shape != (num_rows,) or amax_N.dtype != jnp.float32:
        raise ValueError(
            f"amax_N must be float32 ({num_rows},), got {amax_N.dtype} of shape {amax_N.shape}"
        )
