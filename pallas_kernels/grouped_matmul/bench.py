"""Times the grouped matmul of every backend that runs on this device: what `moelab bench kernels` writes.

On CPU float32 rows and float32 or packed weights, against `xla_windows` with float32 weights. On a GPU bfloat16 rows,
against `jax.lax.ragged_dot` of bfloat16 weights; W4A4 includes quantizing the rows. That part is, like the kernels, not
yet run on hardware.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device, formats, timing
from pallas_kernels.grouped_matmul import api, choice, kernels
from pallas_kernels.grouped_matmul.precision import MatmulPrecision, Weight


class Shape(NamedTuple):
    """T, E, N and K."""

    rows: int
    experts: int
    outputs: int
    inputs: int


# One row per expert and eight, wide and narrow; then a training step's share of rows.
CPU_SHAPES = (
    Shape(32, 32, 1024, 1024),
    Shape(256, 32, 1024, 1024),
    Shape(64, 64, 512, 256),
    Shape(512, 64, 512, 256),
    Shape(8192, 16, 512, 256),
)
# Gate and up of OLMoE, Qwen3-30B and DeepSeek-V3, from decode to prefill.
GPU_SHAPES = tuple(
    Shape(rows, *layer)
    for layer in ((64, 2048, 2048), (128, 1536, 2048), (256, 4096, 7168))
    for rows in (64, 1024, 16384)
)
_PACKED = ("nvfp4", "mxfp4")


class Case(NamedTuple):
    """One way to compute the product.

    Attributes:
      name: of the row.
      implementation: as in `grouped_matmul`; None: `jax.lax.ragged_dot` itself.
      w: format of packed weights, or None for plain ones.
      x: format that the rows are quantized to, or None.
    """

    name: str
    implementation: str | None
    w: str | None
    x: str | None = None


def measure(shapes: Sequence[Shape] | None = None, repeats: int = 15) -> list[dict[str, Any]]:
    """Times every backend at every shape.

    Args:
      shapes: None: those of this kind of device.
      repeats: rounds; every round runs each case of a shape once.

    Returns:
      One dict per shape and case: see `timing.row`, and `memory`, temporaries and weights over the bytes of weights in
      the dtype of the rows. A case that the shape has no use for is left out.
    """
    here = device.current()
    if shapes is None:
        shapes = GPU_SHAPES if here.is_cuda else CPU_SHAPES
    return [row for shape in shapes for row in _of_shape(Shape(*shape), here, repeats)]


def _of_shape(shape: Shape, here: device.Device, repeats: int) -> list[dict[str, Any]]:
    dtype = jnp.bfloat16 if here.is_cuda else jnp.float32
    keys = jax.random.split(jax.random.key(0), 3)
    x_TK = jax.random.normal(keys[0], (shape.rows, shape.inputs), dtype)
    w_shape = (shape.experts, shape.outputs, shape.inputs)
    w_ENK = jax.random.normal(keys[1], w_shape, dtype) * jnp.asarray(shape.inputs**-0.5, dtype)
    expert_T = jax.random.randint(keys[2], (shape.rows,), 0, shape.experts)
    sizes_E = jnp.bincount(expert_T, length=shape.experts).astype(jnp.int32)

    @functools.cache
    def packed(format: str, layout: str) -> formats.BlockScaled:
        q = jax.jit(formats.quantize, static_argnums=1)(w_ENK, format)
        return formats.arranged(q, layout)

    calls, memory = {}, {}
    for case in _cases(shape, here, dtype):
        kernel = kernels.KERNELS.get(case.implementation)
        w = w_ENK if case.w is None else packed(case.w, kernel.layout if kernel else "linear")
        calls[case.name], found = timing.compiled(_product(case), (x_TK, w, sizes_E))
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
        memory[case.name] = (stored + found.temp_size_in_bytes) / w_ENK.nbytes
    base = f"{jnp.dtype(dtype).name} {'jax.lax.ragged_dot' if here.is_cuda else 'xla_windows'}"
    seconds = timing.interleaved(calls, repeats, settled=True)
    against = {name: None if name == base else base for name in calls}
    return [
        timing.row(name, shape._asdict(), seconds, against[name], memory=memory[name])
        for name in calls
    ]


def _cases(shape: Shape, here: device.Device, dtype) -> Iterator[Case]:
    name = jnp.dtype(dtype).name
    usable = [format for format in _PACKED if shape.inputs % formats.FORMATS[format].block == 0]
    if not here.is_cuda:
        for implementation in choice.BACKENDS:
            yield Case(f"{name} {implementation}", implementation, None)
        for w in usable:
            yield Case(f"{w} xla_windows", "xla_windows", w)
        return
    yield Case(f"{name} jax.lax.ragged_dot", None, None)
    for kernel in kernels.KERNELS.values():
        for w in usable:
            x = None if name in kernel.x else w
            if not kernel.unsupported(kernels.Problem(*shape, x or name, w), here):
                yield Case(f"{w} {'W4A4' if x else 'W4A16'} {kernel}", kernel.name, w, x)


def _product(case: Case) -> Callable[[jax.Array, Weight, jax.Array], jax.Array]:
    precision = MatmulPrecision(x=case.x, w=case.w)
    if case.implementation is None:
        return _ragged_dot
    return functools.partial(_call, precision, case.implementation)


def _call(precision: MatmulPrecision, implementation: str, x_TK, w_ENK, sizes_E) -> jax.Array:
    return api.quantized_grouped_matmul(
        x_TK, w_ENK, sizes_E, precision, implementation=implementation
    )


def _ragged_dot(x_TK, w_ENK, sizes_E) -> jax.Array:
    """As a user would call it: our backend of this name multiplies in float32."""
    w_EKN = jnp.swapaxes(w_ENK, 1, 2)
    y_TN = jax.lax.ragged_dot(x_TK, w_EKN, sizes_E, preferred_element_type=jnp.float32)
    return y_TN.astype(x_TK.dtype)
