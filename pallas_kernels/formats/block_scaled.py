"""The BlockScaled value, and quantize and dequantize for every format.

NVFP4, in Transformer Engine's order of operations (all float32, global scale g = amax / 2688):

    encode = 2688 / amax;  decode = 1 / encode
    scale  = e4m3(block_amax * (encode * (1/6)))
    step   = scale * decode
    code   = e2m1(x * (1 / step))
    value  = (code * scale) * (amax * (1/2688))          one rounding: code * scale is exact

Four Over Six: 1536 for 2688, ideal = (block_amax / 6) * encode, and of e4m3(ideal) and e4m3(1.5 * ideal) the one with
the smaller sum of |((code * scale) * amax) / 1536 - x|, squared or not, the first if equal.
MX formats: scale = 2^e by `elements.e8m0_exponent`, code = element(x * 2^-e), value = code * 2^e.
FP8 per channel and tensor: scale = amax * (1/448), code = e4m3(x * (1 / scale)), value = code * scale.
FP8 tiles (DeepSeek-V3), INT8 and INT4: scale = amax / max_value, for INT4 in bfloat16, code = round(x / scale).

Conventions, the same for all formats:
- A block with a NaN or an infinity gets a NaN scale and zero codes, so it dequantizes to NaN; other blocks, and the
  global amax, do not see it. `count_nonfinite` counts them.
- A zero block has scale 0 and zero codes.
- A block whose step would come near float32's subnormals (NVFP4: step below 2^-124 or a global amax below 3.2e-35;
  float scales: below 2^-116) or whose E4M3 scale rounds to 0 counts as zero: scale 0, codes +-0.
- MX codes are exact for float32-subnormal inputs too; values below 2^-126 flush to zero where the backend flushes.
  `rceil`, `even` and `ceil` round an amax of 1.75 * 2^127 or more up to 2^128, which dequantizes to infinity; so may
  an amax within 2^-7 of float32's largest number in the formats with float scales.
- Stochastic rounding concerns codes only; scales are always to nearest.

K contraction axis (the last), N the axis before.

References: arXiv:2509.25149 (NVFP4), arXiv:2512.02010 (Four Over Six), OCP MX v1.0, arXiv:2412.19437 section 3.3.2
(FP8 tiles). The order of operations of NVFP4 and Four Over Six is that of Transformer Engine's `NVFP4QuantizerRef`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats import elements, float_scaled, nvfp4
from pallas_kernels.formats.elements import E2M1, E4M3
from pallas_kernels.formats.layout import pack, swizzle, unpack, unswizzle
from pallas_kernels.formats.table import FORMATS, Format

LAYOUTS = ("linear", "tcgen05", "block_major")  # of scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A quantized array, blocks along the last axis. A pytree; format and rule are static.

    `scan`, `vmap` and indexing of leading axes may slice all leaves alike, down to the axes that global_amax has.

    Attributes:
      codes: uint8 [..., K / 2], two 4-bit codes a byte, low nibble first; [..., K] for 8-bit formats. Integers are
        two's complement.
      scales: uint8 [..., K / block], E4M3 or E8M0 bits (linear layout; see `layout` for the others), equal in
        the 16 rows of a 2D tile; float32 [..., ceil(N / 128), ceil(K / 128)] for fp8_block, [..., ceil(K / 128)] for
        fp8_row128, [...] for the channels and the leading axes for fp8_tensor; bfloat16 [..., K / 32] for int4_group.
      global_amax: float32, of the leading axes: the amax over everything else, of finite blocks (NVFP4); else None.
      format: key of FORMATS.
      rule: scale rule, one of the format's.
      layout: how the scales lie (`arranged` changes it, once, when weights are loaded): "linear"; "tcgen05", the 128x4
        tiles of Blackwell's tensor cores, uint8 [..., ceil(N / 128), ceil(K / block / 4), 32, 16]; or "block_major",
        rows innermost, uint8 [..., K / block, N], as Hopper's kernel copies them.

    What `quantize` makes, and whoever else makes one must keep: a scale is NaN (E4M3 0x7f, E8M0 0xff) or finite and not
    negative; below a NaN scale all codes are 0; below a zero scale they are +-0, and so is the value; global_amax is
    finite and at least 0.
    """

    codes: jax.Array
    scales: jax.Array
    global_amax: jax.Array | None
    format: str = dataclasses.field(metadata={"static": True})
    rule: str = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(default="linear", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        per_byte = 8 // FORMATS[self.format].element.bits
        return (*self.codes.shape[:-1], self.codes.shape[-1] * per_byte)

    @property
    def ndim(self) -> int:
        """Number of axes of the array that was quantized."""
        return self.codes.ndim

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns that share a scale; all rows that do, for fp8_tensor."""
        spec = FORMATS[self.format]
        rows = math.prod(self.shape[self.scales.ndim : -1]) if spec.scale == "tensor" else 1
        return spec.tile or (rows, self.shape[-1])


def quantize(
    x: jax.Array,
    format: str,
    *,
    rule: str | None = None,
    num_batch_axes: int | None = None,
    key: jax.Array | None = None,
    global_amax: jax.Array | None = None,
) -> BlockScaled:
    """Quantizes to the nearest codes (ties to even), or stochastically, with scales from block maxima.

    >>> q = quantize(jnp.array([[6.0, 3.0, 0.5, -1.0] + [0.0] * 12]), "nvfp4")
    >>> [int(code) for code in unpack(q.codes)[0, :4]], int(q.scales[0, 0]), float(q.global_amax)
    ([7, 5, 1, 10], 126, 6.0)

    Args:
      x: floating point [..., K], K a multiple of the block (16 or 32); for the 2D formats [..., N, K] with N a multiple
        of 16. For fp8_block and fp8_row128 any N and K. Computed in float32.
      format: key of FORMATS.
      rule: scale rule; None is the format's first.
      num_batch_axes: how many leading axes have their own global scale (NVFP4, fp8_tensor). Default ndim - 2: one per
        matrix. ndim - 1 is one per row (token), independent of the batch.
      key: None to round to nearest; a PRNG key to round stochastically: each value becomes one of its two neighbours
        and its mean is the value, where the scale lets it lie between codes (to 2^-17 of the gap). Scales are the same
        as without a key.
      global_amax: float32 of x's first num_batch_axes axes, to scale by instead of x's own maxima: calibrated, or
        shared with other arrays. Blocks above it saturate. NVFP4 only. Finite and at least 0.

    Returns:
      BlockScaled.

    Raises:
      ValueError: unknown format or rule; dtype, shape, num_batch_axes, key or global_amax that do not fit.

    Reference: the module's docstring.
    """
    x = jnp.asarray(x)
    spec, rule = _lookup(format, rule)
    num_batch_axes = max(x.ndim - 2, 0) if num_batch_axes is None else num_batch_axes
    _check(x, format, spec, num_batch_axes)
    if key is not None:
        _check_key(key)
    if global_amax is not None:
        _check_global_amax(global_amax, x.shape[:num_batch_axes], format, spec)
    return _quantize(x.astype(jnp.float32), key, global_amax, format, rule, num_batch_axes)


def dequantize(q: BlockScaled, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Returns the array of q.shape that a quantized array stands for, NaN in blocks whose scale is NaN.

    Args:
      q: quantized array.
      dtype: of the result; products are float32, cast once at the end.
    """
    q = arranged(q, "linear")
    return _dequantize(q.codes, q.scales, q.global_amax, q.format, jnp.dtype(dtype))


def global_scale(q: BlockScaled) -> jax.Array | None:
    """Returns the float32 factor of code * scale in global_amax's shape, global_amax / 2688 (1536 for 4/6); or None."""
    if q.global_amax is None:
        return None
    return q.global_amax * elements.reciprocal(E2M1.max_value * FORMATS[q.format].scale_bound)


def arranged(q: BlockScaled, layout: str) -> BlockScaled:
    """Returns the same values with the scales in another layout; see `BlockScaled.layout`.

    Raises:
      ValueError: an unknown layout, or one that the format has no use for (float scales are always linear).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == q.layout:
        return q
    spec = FORMATS[q.format]
    if spec.float_scales or q.ndim < 2:
        raise ValueError(
            f"only byte scales of at least two axes can be arranged, got {q.format} of shape {q.shape}"
        )
    scales = q.scales
    if q.layout == "tcgen05":
        scales = unswizzle(scales, q.shape[-2], q.shape[-1] // spec.block)
    elif q.layout == "block_major":
        scales = jnp.swapaxes(scales, -1, -2)
    if layout == "tcgen05":
        scales = swizzle(scales)
    elif layout == "block_major":
        scales = jnp.swapaxes(scales, -1, -2)
    return dataclasses.replace(q, scales=scales, layout=layout)


def nbytes(q: BlockScaled) -> int:
    """Returns the stored bytes of a quantized array: codes, scales and global amax."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(q))


def count_nonfinite(q: BlockScaled) -> jax.Array:
    """Returns the number of blocks whose scale is NaN, because they held a NaN or an infinity: int32 scalar.

    A tile of a 2D format counts once.
    """
    spec = FORMATS[q.format]
    if spec.float_scales:
        return jnp.sum(jnp.isnan(q.scales), dtype=jnp.int32)
    nan = (q.scales & 0x7F) == elements.E4M3_NAN if spec.scale == "e4m3" else q.scales == 0xFF
    return jnp.sum(nan, dtype=jnp.int32) // spec.block_rows


# The barriers below and in the modules of scales make XLA compute each code and each scale once. Without them the CPU
# backend fuses everything into the consumer and computes a block's scale for every element and a code for every nibble:
# 7 to 10 times slower.


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _quantize(
    x: jax.Array,
    key: jax.Array | None,
    global_amax: jax.Array | None,
    format: str,
    rule: str,
    num_batch_axes: int,
) -> BlockScaled:
    spec = FORMATS[format]
    random = None if key is None else elements.random_bits(key, x.shape)
    if spec.float_scales:
        code, scale = float_scaled.codes_and_scales(
            x,
            spec.element,
            scale_axes=x.ndim - 1 if spec.scale == "channel" else num_batch_axes,
            tile=spec.tile,
            exact_division=spec.exact_division,
            scale_dtype=jnp.dtype(spec.scale_dtype),
            random=random,
        )
        return BlockScaled(_stored(code, spec), scale, None, format, rule)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // spec.block, spec.block)
    random = None if random is None else random.reshape(blocks.shape)
    amax, finite = _block_amax(blocks, spec.block_rows)
    if spec.scale == "e8m0":
        exponent = elements.e8m0_exponent(amax, spec.element, rule)
        code = elements.encode(blocks, spec.element, exponent[..., None], random)
        code = lax.optimization_barrier(code)
        scale, bad_scale = (exponent + 127).astype(jnp.uint8), elements.E8M0_NAN
    else:
        if global_amax is None:
            global_amax = _largest(amax, tuple(range(num_batch_axes, amax.ndim)))
        code, scale = nvfp4.codes_and_scales(
            blocks,
            amax,
            global_amax,
            bound=spec.scale_bound,
            rule=rule,
            block_rows=spec.block_rows,
            random=random,
        )
        bad_scale = elements.E4M3_NAN
    code = jnp.where(finite[..., None], code, jnp.uint8(0)).reshape(x.shape)
    scale = jnp.where(finite, scale, jnp.uint8(bad_scale))
    codes, scale = lax.optimization_barrier((_stored(code, spec), scale))
    return BlockScaled(codes, scale, global_amax, format, rule)


def _stored(code: jax.Array, spec: Format) -> jax.Array:
    return pack(code) if spec.element.bits == 4 else code


@functools.partial(jax.jit, static_argnums=(3, 4))
def _dequantize(
    codes: jax.Array,
    scales: jax.Array,
    global_amax: jax.Array | None,
    format: str,
    dtype: np.dtype,
) -> jax.Array:
    spec = FORMATS[format]
    if spec.float_scales:
        code = unpack(codes) if spec.element.bits == 4 else codes
        return float_scaled.values(code, scales, spec.element, spec.tile).astype(dtype)

    def scaled(code):  # codes of every element, or of every second one
        blocks = code.reshape(*scales.shape, code.shape[-1] // max(scales.shape[-1], 1))
        value = elements.decode(blocks, spec.element)
        if spec.scale == "e8m0":
            value = elements.multiply_by_e8m0(value, scales[..., None])
        else:
            step = global_amax * elements.reciprocal(E2M1.max_value * spec.scale_bound)
            step = step.reshape(step.shape + (1,) * (value.ndim - step.ndim))
            value = (value * elements.decode(scales[..., None], E4M3)) * step
        return value.reshape(code.shape).astype(dtype)

    if spec.element.bits == 8:
        return scaled(codes)
    # Interleaved last: XLA makes that one pass over the codes.
    value = jnp.stack([scaled(codes & 15), scaled(codes >> 4)], axis=-1)
    return value.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def _block_amax(blocks: jax.Array, block_rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns amax and finiteness of blocks [..., N, B, block] as [..., N, B]; amax is 0 where not finite.

    With block_rows > 1, both are shared by that many rows.
    """
    finite = jnp.all(jnp.isfinite(blocks), axis=-1)
    amax = _largest(blocks, (blocks.ndim - 1,))
    if block_rows > 1:
        tiles = (*amax.shape[:-2], amax.shape[-2] // block_rows, block_rows, amax.shape[-1])
        finite = jnp.all(finite.reshape(tiles), axis=-2).repeat(block_rows, axis=-2)
        amax = _largest(amax.reshape(tiles), (len(tiles) - 2,)).repeat(block_rows, axis=-2)
    return jnp.where(finite, amax, jnp.float32(0)), finite


def _largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns max |x| over axes (0 if empty), compared as integers: exact for subnormals on every backend."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(bits, axis=axes, initial=0), jnp.float32)


def _lookup(format: str, rule: str | None) -> tuple[Format, str]:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; allowed: {', '.join(FORMATS)}")
    rules = FORMATS[format].rules
    if rule is not None and rule not in rules:
        raise ValueError(f"unknown rule {rule!r} for format {format}; allowed: {', '.join(rules)}")
    return FORMATS[format], rules[0] if rule is None else rule


def _check(x: jax.Array, format: str, spec: Format, num_batch_axes: int) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"quantize needs float32, bfloat16 or float16, got {x.dtype}")
    needed = 2 if spec.block_rows > 1 else 1
    if x.ndim < needed:
        raise ValueError(f"{format} needs an array of at least {needed} axes, got shape {x.shape}")
    whole = not spec.partial
    if whole and spec.block and x.shape[-1] % spec.block:
        raise ValueError(
            f"{format} needs a last axis that is a multiple of {spec.block}, got {x.shape[-1]} (shape {x.shape})"
        )
    if whole and x.shape[-needed] % spec.block_rows:
        raise ValueError(
            f"{format} needs {spec.block_rows} x {spec.block} tiles, got {x.shape[-2]} rows (shape {x.shape})"
        )
    if not 0 <= num_batch_axes <= x.ndim - needed:
        raise ValueError(
            f"num_batch_axes must be from 0 to {x.ndim - needed} for {format} and shape {x.shape}, got {num_batch_axes}"
        )


def _check_key(key: jax.Array) -> None:
    typed = jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key)
    raw = getattr(key, "dtype", None) == jnp.uint32 and getattr(key, "ndim", None) == 1
    if not (raw or (typed and key.ndim == 0)):
        came = f"{key.dtype} of shape {key.shape}" if hasattr(key, "shape") else repr(key)
        raise ValueError(f"key must be None or one PRNG key, as from jax.random.key, got {came}")


def _check_global_amax(amax: jax.Array, shape: tuple[int, ...], format: str, spec: Format) -> None:
    if spec.scale != "e4m3":
        raise ValueError(f"global_amax belongs to the NVFP4 formats, {format} has none")
    if amax.dtype != jnp.float32 or amax.shape != shape:
        raise ValueError(
            f"global_amax must be float32 of shape {shape}, got {amax.dtype} of shape {amax.shape}"
        )
