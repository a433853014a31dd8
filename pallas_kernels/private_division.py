"""Divisions that are rounded to nearest even in Mosaic kernels. Belongs to `private_jax`, whose check it uses."""

from __future__ import annotations

import jax
import jax.extend.core

from pallas_kernels.private_jax import once

_DIVIDE = jax.extend.core.Primitive("ieee_divide")
_DIVIDE.def_abstract_eval(lambda *operands: operands[-1])


def ieee_divide(a: jax.Array | None, b: jax.Array) -> jax.Array:
    """Returns a / b, or 1 / b where a is None, rounded to nearest even, in Mosaic kernels of Lane semantics too.

    There `/` becomes `div.full.f32` or `rcp.approx.f32`: XLA's plugin sets `-nvptx-prec-divf32=1` for all that LLVM
    compiles in the process. This is `div.rn.f32` or `rcp.rn.f32`.

    Args:
      a: float32 of b's shape, or None.
      b: float32.

    Assumes: `_pointwise` hands over a register at a time, a vector of float32.
    """
    _lower_ieee_divide()
    return _DIVIDE.bind(b) if a is None else _DIVIDE.bind(a, b)


@once
def _lower_ieee_divide() -> None:
    """Registers `ieee_divide` with XLA, where no simplification may cross it, and with Mosaic."""
    from jax._src.pallas.mosaic_gpu import lowering
    from jax.experimental.mosaic.gpu import LoweringSemantics
    from jax.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, vector

    def xla(*operands):
        a = jax.numpy.ones_like(operands[-1]) if len(operands) == 1 else operands[0]
        return jax.lax.optimization_barrier(a / operands[-1])

    def ptx(*registers):
        f32 = ir.F32Type.get()
        code = ("rcp.rn.f32 $0, $1;", "div.rn.f32 $0, $1, $2;")[len(registers) - 1]
        found = [
            llvm.inline_asm(
                f32,
                [vector.extract(r, dynamic_position=[], static_position=[i]) for r in registers],
                code,
                "=f" + ",f" * len(registers),
            )
            for i in range(ir.VectorType(registers[0].type).shape[0])
        ]
        return vector.from_elements(registers[0].type, found)

    def mosaic(ctx, *operands):
        arrays = [
            lowering._ensure_fa(x, aval.dtype)
            for x, aval in zip(operands, ctx.avals_in, strict=True)
        ]
        return arrays[0]._pointwise(ptx, *arrays[1:])

    mlir.register_lowering(_DIVIDE, mlir.lower_fun(xla, multiple_results=False))
    lowering.register_lowering_rule(_DIVIDE, LoweringSemantics.Lane)(mosaic)
