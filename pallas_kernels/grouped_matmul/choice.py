"""What computes a product: a GPU kernel over codes, or a backend of XLA over values.

T rows sorted by expert, K contraction axis, N output axis, E experts, D model width, F expert width.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import NamedTuple

import jax

from pallas_kernels import device, formats
from pallas_kernels.grouped_matmul import (
    kernels,
    loading,
    quantized,
    ragged_dot,
    reference,
    xla_windows,
)
from pallas_kernels.grouped_matmul.kernels import Kernel
from pallas_kernels.grouped_matmul.precision import PLAIN, MatmulPrecision, MlpPrecision, Weight

# Multiply values, are written for XLA, and run on every platform.
BACKENDS: dict[str, types.ModuleType] = {
    "xla_windows": xla_windows,
    "reference": reference,
    "ragged_dot": ragged_dot,
}
# What `implementation` may name: it runs, or raises NotImplementedError saying why.
IMPLEMENTATIONS = (*BACKENDS, *kernels.KERNELS)


class Computes(NamedTuple):
    """What computes a product.

    Attributes:
      backend: multiplies values; with a kernel, only what the kernel leaves to it.
      kernel: multiplies codes, or None.
    """

    backend: types.ModuleType
    kernel: Kernel | None


def choose(
    implementation: str | None, x: Weight, w: Weight, precision: MatmulPrecision = PLAIN
) -> Computes:
    """Picks what computes the product of x and w under a precision on this device.

    Args:
      implementation: one of IMPLEMENTATIONS; None or "auto" takes the first kernel that can, else XLA.
      x: (T, K) activations, or their shape and dtype.
      w: (E, N, K) weights.
      precision: what they are quantized to.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: the named kernel cannot compute this here, and why.
    """
    if implementation not in (None, "auto", *IMPLEMENTATIONS):
        allowed = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; allowed: auto, {allowed}")
    if implementation in BACKENDS:
        return Computes(BACKENDS[implementation], None)
    here = device.current()
    # A loop over windows is a loop of small kernels on a GPU; for plain operands XLA has one kernel.
    values = ragged_dot if here.is_cuda else xla_windows
    problem = quantized.problem_of(x, w, precision)
    if implementation in (None, "auto"):
        kernel = kernels.choose(problem, here)
        packed = isinstance(w, formats.BlockScaled)
        return Computes(xla_windows if packed and kernel is None else values, kernel)
    kernel = kernels.KERNELS[implementation]
    reason = kernel.unsupported(problem, here)
    if reason:
        raise NotImplementedError(reason)
    return Computes(values, kernel)


def choose_both(
    implementation: str | None,
    x_ND: jax.Array,
    gate_up_EGD: Weight,
    down_EDF: Weight,
    precision: MlpPrecision,
) -> tuple[types.ModuleType, tuple[Kernel | None, Kernel | None]]:
    """Picks for both layers of a feed-forward as `choose` does: the backend, and each layer's kernel."""
    first = choose(implementation, x_ND, gate_up_EGD, precision.gate_up)
    act_NF = jax.ShapeDtypeStruct((x_ND.shape[0], down_EDF.shape[2]), x_ND.dtype)
    second = choose(implementation, act_NF, down_EDF, precision.down)
    values = first.backend if first.kernel is None else second.backend
    return values, (first.kernel, second.kernel)


# What `table` asks about: operands of a layer of OLMoE's size at 4096 tokens. (name, activations, weights)
_OPERATIONS = (
    ("bfloat16 experts", "bfloat16", "bfloat16"),
    ("W4A16 nvfp4", "bfloat16", "nvfp4"),
    ("W4A16 mxfp4", "bfloat16", "mxfp4"),
    ("W4A4 nvfp4", "nvfp4", "nvfp4"),
    ("W4A4 mxfp4", "mxfp4", "mxfp4"),
)


def table(here: device.Device) -> dict[str, str]:
    """Says for each operation what `implementation=None` would take on a device, for `moelab env`."""
    found = {}
    for name, x, w in _OPERATIONS:
        problem = kernels.Problem(32768, 64, 2048, 2048, x, w)
        kernel = kernels.choose(problem, here)
        fallback = "ragged_dot" if here.is_cuda and w == "bfloat16" else "xla_windows"
        found[name] = fallback if kernel is None else f"{kernel} ({kernels.HARDWARE})"
    return found


# Of an axis after padding to before: beyond it, the memory is not worth a kernel.
_MOST_PADDING = 1.5


def for_device(
    w: Weight,
    activations: str | None,
    here: device.Device | None = None,
    *,
    parts: int = 1,
    weights: str | None = None,
) -> Weight | loading.Padded:
    """Returns weights as the kernel that will multiply them reads them: once, when weights are loaded.

    Scales of packed ones are arranged for it. Widths that no kernel takes are padded with zeros where that makes
    neither half as large again (2880 of gpt-oss to 3072), both axes alike, so that gate, up and down still fit.

    Args:
      w: (..., E, N, K).
      activations: the format that activations are quantized to; None for bfloat16.
      here: None: the current device.
      parts: of N that are padded each: 2 for gate and up.
      weights: the format that plain weights are quantized to whenever they are multiplied; None: they are not.
    """
    packed = isinstance(w, formats.BlockScaled)
    format = w.format if packed else weights
    if w.ndim < 3 or format is None:
        return formats.arranged(w, "linear") if packed else w
    here = device.current() if here is None else here
    for kernel in kernels.KERNELS.values():
        multiple = math.lcm(kernel.inputs_multiple, kernel.outputs_multiple)
        sizes = w.shape[-2] // parts, w.shape[-1]
        wide = [-(-size // multiple) * multiple for size in sizes]
        exact = kernels.Problem(1, *w.shape[-3:], activations or "bfloat16", format)
        larger = dataclasses.replace(exact, outputs=parts * wide[0], inputs=wide[1])
        if kernel.unsupported(larger, here):
            continue
        arranged = formats.arranged(w, kernel.layout) if packed else w
        if all(new <= _MOST_PADDING * size for size, new in zip(sizes, wide, strict=True)):
            return loading.padded(arranged, larger.outputs, larger.inputs, parts)
        if not kernel.unsupported(exact, here):
            return arranged
    return formats.arranged(w, "linear") if packed else w
