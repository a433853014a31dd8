"""Cases of the public function: which kernel it takes on each GPU, and that packed weights reach it as they are."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Compiled, Target
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Expectation, Family, Program
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, ROWS, WIDTH, array, packed

# What a GPU's kernel for 4-bit weights is called in its code: with 4-bit activations, and with bfloat16 ones.
_KERNELS = {
    (10, 0): ("grouped_matmul_nvfp4", "w4a16"),
    (10, 3): ("grouped_matmul_nvfp4", "w4a16"),
    (9, 0): (None, "grouped_w4a16_nvfp4"),
    (8, 0): (None, "w4a16"),
    (12, 0): ("w4a4", "w4a16"),
}


def _build(target: Target, *, activations: str) -> Program:
    from pallas_kernels import MatmulPrecision, quantized_grouped_matmul
    from pallas_kernels.grouped_matmul import choice

    precision = MatmulPrecision(x="nvfp4") if activations == "nvfp4" else MatmulPrecision()

    def fn(x, w, sizes_E):
        return quantized_grouped_matmul(x, w, sizes_E, precision)

    w = packed((EXPERTS, 2 * HIDDEN, WIDTH), "nvfp4", "linear")
    w = jax.eval_shape(functools.partial(choice.for_device, here=target.device), w)
    return fn, (
        array(ROWS, WIDTH, dtype=jnp.bfloat16),
        w,
        array(EXPERTS, dtype=jnp.int32),
    )


def _name(target: Target, activations: str) -> str | None:
    return _KERNELS.get(target.capability, (None, None))[activations == "bfloat16"]


def _takes(activations: str) -> Expectation:
    """The kernel that is meant for the GPU is in the program."""

    def expectation(compiled: Compiled) -> list[str]:
        name = _name(compiled.target, activations)
        found = [kernel.name for kernel in compiled.kernels]
        return [] if name in found else [f"no kernel {name} among: {', '.join(found) or 'none'}"]

    return expectation


def _case(activations: str) -> Case:
    return Case(
        name=f"{activations} activations",
        format="nvfp4",
        runs_on=lambda target: _name(target, activations) is not None,
        build=functools.partial(_build, activations=activations),
        expectations=(
            _takes(activations),
            expect.no_spills,
            expect.within_limits,
            expect.packed_as_they_are("args[1].codes"),
        ),
    )


FAMILY = Family(
    name="public",
    about="quantized_grouped_matmul: the kernel that it takes on each GPU",
    interpreted="its kernels are",
    cases=(_case("nvfp4"), _case("bfloat16")),
)
