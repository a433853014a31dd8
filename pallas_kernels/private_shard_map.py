"""Kernels inside `shard_map`: their insides are hidden from its check of which values differ between devices.

Pallas' Mosaic kernels refuse references whose values vary over a mesh axis, so in jax 0.12.0 they run only in a
`shard_map` with check_vma=False, which would take the sums of gradients away from the whole model. Here a kernel is one
primitive: from outside its results vary as its operands do, inside nothing varies. It has no derivative; kernels have
their own (`quantized.py`). Belongs to `private_jax`, whose check of versions it uses.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.extend.core
from jax._src import config, core
from jax._src.interpreters import mlir

from pallas_kernels import private_jax
from pallas_kernels.grouped_matmul import windows

_hidden_p = jax.extend.core.Primitive("kernel_inside_shard_map")
_hidden_p.multiple_results = True


def hidden(function: Callable, *operands):
    """Returns function(*operands); inside `shard_map`, as one operation whose results vary as the operands do.

    Args:
      function: of pytrees of arrays; returns a pytree of arrays.
      *operands: pytrees of arrays.
    """
    leaves, structure = jax.tree.flatten(operands)
    if not any(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves):
        return function(*operands)
    _register()
    leaves = windows.vary_alike(*leaves)
    results = []

    def flat(*leaves):
        found, out_structure = jax.tree.flatten(function(*jax.tree.unflatten(structure, leaves)))
        results[:] = [out_structure]
        return found

    inside = [_inside(jax.typeof(leaf)) for leaf in leaves]
    with config._check_vma(False):
        shapes = jax.eval_shape(flat, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inside))
    found = _hidden_p.bind(*leaves, function=flat, shapes=tuple((s.shape, s.dtype) for s in shapes))
    return jax.tree.unflatten(results[0], found)


def _inside(aval):
    return aval.update_manual_axis_type(core.empty_mat)


@private_jax.once
def _register() -> None:
    """Assumes: avals carry `manual_axis_type`; lowering a function again under other avals is `mlir.lower_fun`."""

    def out_avals(*avals, function, shapes):
        return [
            avals[0].update(shape=shape, dtype=dtype, weak_type=False) for shape, dtype in shapes
        ]

    def lower(context, *operands, function, shapes):
        context = context.replace(avals_in=[_inside(aval) for aval in context.avals_in])
        with config._check_vma(False):
            return mlir.lower_fun(function)(context, *operands)

    _hidden_p.def_abstract_eval(out_avals)
    mlir.register_lowering(_hidden_p, lower)
