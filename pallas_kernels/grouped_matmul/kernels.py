"""The GPU kernels as backends: which operands and GPUs each takes, and how it is called. None has run on hardware yet.

They multiply codes; `quantized.py` quantizes the operands and owns the gradients. Kernels are imported when they are
called, so that a machine without Triton or a GPU can still say which one it would take.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import formats, private_shard_map
from pallas_kernels.device import Device
from pallas_kernels.grouped_matmul.precision import Weight

HARDWARE = "not yet run on hardware"
_E4M3_SCALES = tuple(name for name, spec in formats.FORMATS.items() if spec.scale == "e4m3")
_W4 = (*_E4M3_SCALES, "mxfp4")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the choice of a kernel depends on: static.

    Attributes:
      rows, experts, outputs, inputs: T, E, N and K.
      x: format of the activations, or their dtype's name where they are not quantized.
      w: format of the weights, or their dtype's name.
    """

    rows: int
    experts: int
    outputs: int
    inputs: int
    x: str
    w: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel family on one kind of GPU.

    Attributes:
      name: what `implementation` calls it; the module of that name holds it.
      about: one line for people.
      x: formats or dtypes of the activations that it takes.
      w: formats of the weights.
      majors: major compute capabilities that it runs on.
      inputs_multiple: K must be one of these many.
      outputs_multiple: N must be.
      layout: how it reads the scales of weights, see `formats.BlockScaled`.
      extra: the optional extra of pyproject.toml whose packages it needs, and the package to look for.
    """

    name: str
    about: str
    x: tuple[str, ...]
    w: tuple[str, ...]
    majors: tuple[int, ...]
    inputs_multiple: int
    outputs_multiple: int
    layout: str
    extra: tuple[str, str] | None = None

    def wrong_device(self, device: Device) -> str:
        """Returns why it cannot run there at all; empty if it can."""
        wanted = " or ".join(f"{major}.x" for major in self.majors)
        if device.capability is None or device.capability[0] not in self.majors:
            return f"{self.name} needs a GPU of compute capability {wanted}, this is {device}"
        if self.extra and importlib.util.find_spec(self.extra[1]) is None:
            return f"{self.name} needs {self.extra[1]}: pip install 'moelab[{self.extra[0]}]'"
        return ""

    def unsupported(self, problem: Problem, device: Device) -> str:
        """Returns why it cannot compute this there, with what came and what was wanted; empty if it can."""
        reason = self.wrong_device(device)
        if reason:
            return reason
        if problem.x not in self.x:
            return f"{self.name} takes activations in {', '.join(self.x)}, got {problem.x}"
        if problem.w not in self.w:
            return f"{self.name} takes weights in {', '.join(self.w)}, got {problem.w}"
        if problem.x in formats.FORMATS and _scale(problem.x) != _scale(problem.w):
            return (
                f"{self.name} takes x and w with one kind of scale, got {problem.x} and {problem.w}"
            )
        if problem.inputs % self.inputs_multiple or problem.outputs % self.outputs_multiple:
            return (
                f"{self.name} needs K a multiple of {self.inputs_multiple} and N of {self.outputs_multiple} (pad the "
                f"weights when they are loaded), got K={problem.inputs} and N={problem.outputs}"
            )
        return ""

    def product(
        self,
        x_TK: Weight,
        w_ENK: formats.BlockScaled,
        group_sizes_E: jax.Array,
        row_scale_T: jax.Array | None,
        bias_EN: jax.Array | None,
        out_dtype: jnp.dtype,
        device: Device,
    ) -> jax.Array:
        """y[t] = cast(acc * (g_x[t] g_w[e] row_scale[t]) + bias[e]), zero beyond the groups: (T, N)."""
        expert_E = formats.global_scale(w_ENK)
        if expert_E is None:
            expert_E = jnp.ones(w_ENK.shape[0], jnp.float32)
        if isinstance(x_TK, formats.BlockScaled):
            scale_T = formats.global_scale(x_TK)
            if scale_T is not None:
                row_scale_T = scale_T if row_scale_T is None else scale_T * row_scale_T
        scales = dict(expert_scale_E=expert_E, row_scale_T=row_scale_T, bias_EN=bias_EN)
        call = functools.partial(_call, self.name, out_dtype, device)
        return private_shard_map.hidden(call, (x_TK, w_ENK, group_sizes_E), scales)

    def weight_gradient(
        self,
        dy_BNU: formats.BlockScaled,
        x_BKU: formats.BlockScaled,
        padded_E: jax.Array,
        device: Device,
    ) -> jax.Array | None:
        """dw[e] = dy^T x over the tokens of e, from codes of `transposed_operands`: float32 (E, N, K).

        None where this kernel does not compute it: it has no such product, or not for these formats and widths.
        """
        wanted = formats.FORMATS[x_BKU.format]
        same = wanted.scale == formats.FORMATS[dy_BNU.format].scale
        wide = dy_BNU.shape[1] % 128 == 0 and x_BKU.shape[1] % 128 == 0
        if self.name != "mosaic_sm100" or x_BKU.format not in self.x or not same or not wide:
            return None
        call = functools.partial(_weight_gradient, device)
        return private_shard_map.hidden(call, dy_BNU, x_BKU, padded_E)

    def __str__(self) -> str:
        return self.name


_BF16, _TRITON = ("bfloat16",), ("aot", "jax_triton")
# In the order in which they are tried.
_ALL = (
    Kernel("mosaic_sm100", "W4A4, tcgen05 block-scaled MMA", _W4, _W4, (10,), 256, 128, "tcgen05"),
    Kernel(
        "triton_w4a4", "W4A4, mma.sync block-scaled", _W4, _W4, (12,), 128, 16, "linear", _TRITON
    ),
    Kernel("mosaic_sm90", "W4A16, wgmma", _BF16, _W4, (9,), 64, 64, "block_major"),
    Kernel(
        "triton_w4a16",
        "W4A16, sm_80 to sm_120",
        _BF16,
        _W4,
        (8, 9, 10, 12),
        32,
        16,
        "linear",
        _TRITON,
    ),
)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _ALL}


def choose(problem: Problem, device: Device) -> Kernel | None:
    """Returns the first kernel that computes this there, or None."""
    usable = (k for k in KERNELS.values() if not k.unsupported(problem, device))
    return next(usable, None)


_INTERPRET: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret", default=None)


@contextlib.contextmanager
def interpreted(params: Any) -> Iterator[None]:
    """Runs Mosaic kernels in Pallas' GPU interpreter inside the context, for tests on a CPU.

    Args:
      params: a `plgpu.InterpretGPUParams`.
    """
    token = _INTERPRET.set(params)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


def is_interpreted() -> bool:
    """Whether Mosaic kernels run in the interpreter here."""
    return _INTERPRET.get() is not None


def interpreter() -> Any:
    """Returns what `interpreted` was given, None outside of it."""
    return _INTERPRET.get()


def _scale(format: str) -> str:
    return formats.FORMATS[format].scale


def _call(
    kernel: str, out_dtype: jnp.dtype, device: Device, operands: tuple, scales: dict
) -> jax.Array:
    """Calls a kernel's function: what differs between the families is here."""
    options: dict[str, Any] = scales | dict(out_dtype=out_dtype)
    if kernel.startswith("triton"):
        options |= dict(tiling=None, capability=device.capability)
    else:
        options |= dict(num_sms=device.num_sms, interpret=_INTERPRET.get())
    x, w, sizes_E = operands
    # A copy, if they were arranged for the other kernel of this GPU.
    w = formats.arranged(w, KERNELS[kernel].layout)
    if kernel == "mosaic_sm100":
        return sm100_product(x, w, sizes_E, device=device, **options)
    module = importlib.import_module(f"pallas_kernels.grouped_matmul.{kernel}")
    return module.grouped_matmul_codes(x, w, sizes_E, **options)


def sm100_product(
    x: formats.BlockScaled,
    w: formats.BlockScaled,
    group_sizes_E: jax.Array,
    *,
    out_dtype: jnp.dtype,
    device: Device,
    **options: Any,
) -> jax.Array:
    """Calls `mosaic_sm100`, or `mosaic_sm100_decode`, with the tiling that is best by the roofline.

    Args:
      x, w, group_sizes_E: as in `mosaic_sm100.grouped_matmul_codes`.
      out_dtype: float.
      device: which GPU.
      **options: what else that takes.
    """
    from pallas_kernels.grouped_matmul import mosaic_sm100, mosaic_sm100_decode

    # Float16 is stored by none of them: the sums leave in float32, and the only rounding is XLA's.
    stored = out_dtype if out_dtype in mosaic_sm100.OUT_DTYPES else jnp.dtype(jnp.float32)
    tiling = sm100_tiling(x.shape[0], x.format, w, stored, device)
    swapped = isinstance(tiling, mosaic_sm100_decode.Tiling)
    module = mosaic_sm100_decode if swapped else mosaic_sm100
    y_TN = module.grouped_matmul_codes(
        x, w, group_sizes_E, out_dtype=stored, tiling=tiling, **options
    )
    return y_TN.astype(out_dtype)


def sm100_tiling(
    rows: int, format: str, w: formats.BlockScaled, out_dtype: jnp.dtype, device: Device
) -> Any:
    """Returns the tiling that the roofline is best with, rows shared evenly."""
    from pallas_kernels import roofline, schedules

    sizes_E = roofline.even(rows, w.shape[0])
    product = roofline.Product(sizes_E, *w.shape[1:], format, w.format, out_dtype.itemsize)
    limits = dataclasses.replace(roofline.B200, num_sms=device.num_sms)
    collective = _INTERPRET.get() is None and device.num_sms > 1
    name = schedules.choose_sm100(product, limits, collective)
    return schedules.sm100_tiling(name, w.format, out_dtype)


def _weight_gradient(device: Device, dy_BNU, x_BKU, padded_E) -> jax.Array:
    from pallas_kernels.grouped_matmul import mosaic_sm100_wgrad as wgrad
    from pallas_kernels.grouped_matmul import transposed_operands

    dy_VNW, sizes_E = transposed_operands.widen(dy_BNU, padded_E, wgrad.UNIT)
    x_VKW, _ = transposed_operands.widen(x_BKU, padded_E, wgrad.UNIT)
    return wgrad.weight_gradient_codes(
        dy_VNW,
        x_VKW,
        sizes_E,
        expert_scale_E=transposed_operands.expert_scale(dy_VNW, x_VKW, sizes_E),
        out_dtype=jnp.dtype(jnp.float32),
        tiling=wgrad.default_tiling(jnp.float32),
        num_sms=device.num_sms,
        interpret=_INTERPRET.get(),
    )
