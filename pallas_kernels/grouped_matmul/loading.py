"""What is done to experts' weights once, when they are loaded: gate and up taken apart, widths padded for a kernel.

gpt-oss: from_blocks -> deinterleaved -> `choice.for_device`, which pads.

E experts, N output axis, K contraction axis, T rows, F expert width, G = 2F.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.grouped_matmul.precision import Bias, Weight


def from_blocks(blocks: jax.Array, scales: jax.Array) -> formats.BlockScaled:
    """Returns MXFP4 weights as gpt-oss's checkpoints have them (`.._blocks`, `.._scales`); no byte changes.

    Args:
      blocks: uint8 (..., N, K / 32, 16), two codes a byte, low nibble first.
      scales: uint8 (..., N, K / 32), E8M0 bits.

    Returns:
      BlockScaled (..., N, K).

    Raises:
      ValueError: other dtypes or shapes.
    """
    if (
        blocks.dtype != jnp.uint8
        or scales.dtype != jnp.uint8
        or blocks.shape != (*scales.shape, 16)
    ):
        raise ValueError(
            "needs uint8 blocks (..., N, K / 32, 16) and uint8 scales (..., N, K / 32), got "
            f"{blocks.dtype} {blocks.shape} and {scales.dtype} {scales.shape}"
        )
    codes = blocks.reshape(*scales.shape[:-1], -1)
    return formats.BlockScaled(codes, scales, None, "mxfp4", "rceil")


def deinterleaved(w: Weight, axis: int = -2) -> Weight:
    """Returns rows gate, up, gate, up .. (gpt-oss) as all gates, then all ups: what the feed-forwards here take.

    Args:
      w: (..., 2F, D), plain or packed; or a bias (..., 2F), with axis -1.
      axis: of the rows; packed weights have them at -2.

    Raises:
      ValueError: an odd number of rows, packed rows that share scales, or another axis of a packed weight.
    """
    if w.shape[axis] % 2:
        raise ValueError(f"gate and up need an even number of rows, got {w.shape[axis]}")

    def apart(a: jax.Array) -> jax.Array:
        parts = (jax.lax.slice_in_dim(a, i, None, stride=2, axis=axis % a.ndim) for i in range(2))
        return jnp.concatenate(list(parts), axis=axis)

    if not isinstance(w, formats.BlockScaled):
        return apart(w)
    spec = formats.FORMATS[w.format]
    if axis != -2 or spec.block_rows > 1 or spec.float_scales:
        raise ValueError(
            f"packed gate and up need rows on axis -2 with scales of their own, got {w.format} and axis {axis}"
        )
    layout, w = w.layout, formats.arranged(w, "linear")
    w = dataclasses.replace(w, codes=apart(w.codes), scales=apart(w.scales))
    return formats.arranged(w, layout)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padded:
    """A weight with zeros where a kernel wants it larger. It stands for the one without: `shape` is that one's.

    The functions of this package take it for a weight. They extend rows and biases by zeros, and cut the result.

    Attributes:
      value: (..., N', K'), plain or packed.
      outputs, inputs: N and K.
      parts: of N that are padded each: 2 for gate and up.
    """

    value: Weight
    outputs: int = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(metadata={"static": True})
    parts: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it stands for."""
        return (*self.value.shape[:-2], self.outputs, self.inputs)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.value.ndim

    def extended(self, x_TK: jax.Array) -> jax.Array:
        """Returns rows with zeros up to K'.

        Raises:
          ValueError: they are not of the width K.
        """
        if x_TK.ndim != 2 or x_TK.shape[1] != self.inputs:
            raise ValueError(
                f"x must be (T, {self.inputs}) for a weight of shape {self.shape}, got {x_TK.shape}"
            )
        return jnp.pad(x_TK, ((0, 0), (0, self.value.shape[-1] - self.inputs)))

    def extended_bias(self, bias_EN: jax.Array | None) -> jax.Array | None:
        """Returns a bias with zeros up to N', in each part.

        Raises:
          ValueError: it is not of the width N.
        """
        if bias_EN is None:
            return None
        wanted = (self.value.shape[0], self.outputs)
        if bias_EN.shape != wanted:
            raise ValueError(f"bias must be (E, N) = {wanted}, got shape {bias_EN.shape}")
        return _resized(bias_EN, -1, self.parts, self.value.shape[-2])

    def cut(self, y_TN: jax.Array) -> jax.Array:
        """Returns results without the columns that only padding has."""
        return _resized(y_TN, -1, self.parts, self.outputs)

    def logical(self) -> Weight:
        """Returns the weight that it stands for: a copy."""
        return _reshaped(self.value, self.outputs, self.inputs, self.parts)


def padded(w: Weight, outputs: int, inputs: int, parts: int = 1) -> Weight | Padded:
    """Pads a weight with zeros.

    Args:
      w: (..., N, K); packed ones of 4 bits with byte scales.
      outputs, inputs: N' and K', at least N and K; N' a multiple of parts, K' of the block.
      parts: of N that are padded each: 2 for gate and up.

    Returns:
      Padded; w itself where nothing is missing.

    Raises:
      ValueError: sizes that do not fit, or a format whose scales are not bytes.
    """
    if (outputs, inputs) == w.shape[-2:]:
        return w
    sizes = w.shape[-2:]
    if outputs < sizes[0] or inputs < sizes[1] or outputs % parts or sizes[0] % parts:
        raise ValueError(f"cannot pad {sizes} to {(outputs, inputs)} in {parts} parts")
    return Padded(_reshaped(w, outputs, inputs, parts), *sizes, parts)


def as_multiplied(
    gate_up: Weight | Padded, down: Weight | Padded, bias: Bias
) -> tuple[Weight, Weight, Bias]:
    """Returns a feed-forward's weights and biases as they are multiplied: with their zeros, if these lie alike.

    Zeros lie alike where both have the same widths, and gate and up are padded each. Else both come without.
    """
    layers = [w if isinstance(w, Padded) else Padded(w, *w.shape[-2:]) for w in (gate_up, down)]
    wide, narrow = (layer.value.shape for layer in layers)
    split = [
        layer.parts == parts or layer.outputs == layer.value.shape[1]
        for layer, parts in zip(layers, (2, 1), strict=True)
    ]
    if (wide[1], wide[2]) != (2 * narrow[2], narrow[1]) or not all(split):
        return *(layer.logical() for layer in layers), bias
    values = (layer.value for layer in layers)
    return *values, tuple(layer.extended_bias(b) for layer, b in zip(layers, bias, strict=True))


def widened(x_TD: jax.Array, width: int) -> jax.Array:
    """Returns rows with zeros up to a width."""
    return _resized(x_TD, -1, 1, width)


def _reshaped(w: Weight, outputs: int, inputs: int, parts: int) -> Weight:
    """The weight with other sizes: zeros added or cut off at the end of each part, and of the inputs."""

    def both(a: jax.Array, columns: int) -> jax.Array:
        return _resized(_resized(a, -2, parts, outputs), -1, 1, columns)

    if not isinstance(w, formats.BlockScaled):
        return both(w, inputs)
    spec = formats.FORMATS[w.format]
    if spec.float_scales or spec.element.bits != 4 or inputs % spec.block:
        raise ValueError(
            f"only 4-bit weights with byte scales can be padded, to multiples of their block; got {w.format} to "
            f"{inputs}"
        )
    layout, w = w.layout, formats.arranged(w, "linear")
    # A scale of zeros is 0 (E4M3) or 2^-127 (E8M0): neither makes a zero code anything else.
    w = dataclasses.replace(
        w, codes=both(w.codes, inputs // 2), scales=both(w.scales, inputs // spec.block)
    )
    return formats.arranged(w, layout)


def _resized(a: jax.Array, axis: int, parts: int, size: int) -> jax.Array:
    """An axis of `parts` parts with another size, zeros added or cut off at the end of each part."""
    axis %= a.ndim
    old, new = a.shape[axis] // parts, size // parts
    if old == new:
        return a
    a = a.reshape(*a.shape[:axis], parts, old, *a.shape[axis + 1 :])
    if new < old:
        a = jax.lax.slice_in_dim(a, 0, new, axis=axis + 1)
    else:
        a = jnp.pad(a, [(0, new - old) if i == axis + 1 else (0, 0) for i in range(a.ndim)])
    return a.reshape(*a.shape[:axis], parts * new, *a.shape[axis + 2 :])
