"""Cases of the public functions: which kernels they take on each GPU, and that packed weights reach these unread."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.aot import Compiled, Target
from pallas_kernels.grouped_matmul import loading
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Expectation, Family, Program, capability
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, ROWS, WIDTH, array, packed

PER_TOKEN = 8
TOKENS = ROWS // PER_TOKEN
# What a GPU's kernel for 4-bit weights is called in its code: with 4-bit activations, and with bfloat16 ones.
_KERNELS = {
    (10, 0): {"nvfp4": "grouped_matmul_nvfp4", "bfloat16": "w4a16"},
    (9, 0): {"bfloat16": "grouped_w4a16_nvfp4"},
    (8, 0): {"bfloat16": "w4a16"},
    (12, 0): {"nvfp4": "w4a4", "bfloat16": "w4a16"},
}


def loaded(
    shape: tuple[int, ...], format: str, activations: str | None, target: Target, parts: int = 1
) -> formats.BlockScaled | loading.Padded:
    """Describes a packed weight as it is after loading on this GPU."""
    from pallas_kernels.grouped_matmul import choice

    options = dict(activations=activations, here=target.device, parts=parts)
    arrange = functools.partial(choice.for_device, **options)
    return jax.eval_shape(arrange, packed(shape, format, "linear"))


def _product(target: Target, *, activations: str) -> Program:
    from pallas_kernels import MatmulPrecision, quantized_grouped_matmul

    precision = MatmulPrecision(x="nvfp4") if activations == "nvfp4" else MatmulPrecision()

    def fn(x, w, sizes_E):
        return quantized_grouped_matmul(x, w, sizes_E, precision)

    return fn, (
        array(ROWS, WIDTH, dtype=jnp.bfloat16),
        loaded((EXPERTS, 2 * HIDDEN, WIDTH), "nvfp4", precision.x, target),
        array(EXPERTS, dtype=jnp.int32),
    )


def _experts(target: Target, *, format: str) -> Program:
    from pallas_kernels import MatmulPrecision, routed_expert_mlp

    def fn(x, gate_up, down, token_N, expert_N, weight_N):
        return routed_expert_mlp(
            x,
            token_N,
            expert_N,
            weight_N,
            gate_up,
            down,
            assignments_per_token=PER_TOKEN,
            precision=MatmulPrecision(x=format),
        )

    index = array(ROWS, dtype=jnp.int32)
    return fn, (
        array(TOKENS, WIDTH, dtype=jnp.bfloat16),
        loaded((EXPERTS, 2 * HIDDEN, WIDTH), format, format, target),
        loaded((EXPERTS, WIDTH, HIDDEN), format, format, target),
        index,
        index,
        array(ROWS),
    )


def _gpt_oss(target: Target) -> Program:
    """Experts of gpt-oss-20b, 2880 wide, of which no kernel takes multiples: padded when they were loaded."""
    from pallas_kernels import GPT_OSS, MatmulPrecision, routed_expert_mlp

    experts, width, per_token = 32, 2880, 4

    def fn(x, gate_up, down, bias, expert_N, weight_N):
        return routed_expert_mlp(
            x,
            jnp.arange(ROWS, dtype=jnp.int32) // per_token,
            expert_N,
            weight_N,
            gate_up,
            down,
            assignments_per_token=per_token,
            activation=GPT_OSS,
            bias=bias,
            precision=MatmulPrecision(x="mxfp4"),
        )

    return fn, (
        array(ROWS // per_token, width, dtype=jnp.bfloat16),
        loaded((experts, 2 * width, width), "mxfp4", "mxfp4", target, parts=2),
        loaded((experts, width, width), "mxfp4", "mxfp4", target),
        (array(experts, 2 * width, dtype=jnp.bfloat16), array(experts, width, dtype=jnp.bfloat16)),
        array(ROWS, dtype=jnp.int32),
        array(ROWS),
    )


def _has_kernels(*names: str) -> Expectation:
    """These kernels, in any order, and no others."""

    def expectation(compiled: Compiled) -> list[str]:
        found = sorted(kernel.name for kernel in compiled.kernels)
        if found == sorted(names):
            return []
        return [f"kernels {', '.join(found) or 'none'} instead of {', '.join(sorted(names))}"]

    return expectation


def _takes(activations: str) -> Expectation:
    """The GPU's kernel for a product, after one that quantizes rows where there is one."""

    def expectation(compiled: Compiled) -> list[str]:
        capability = compiled.target.capability
        quantizes = capability == (10, 0) and activations == "nvfp4"
        names = ("quantize_nvfp4",) if quantizes else ()
        return _has_kernels(*names, _KERNELS[capability][activations])(compiled)

    return expectation


def _product_case(activations: str) -> Case:
    return Case(
        name=f"product, {activations} activations",
        format="nvfp4",
        runs_on=lambda target: activations in _KERNELS.get(target.capability, ()),
        build=functools.partial(_product, activations=activations),
        expectations=(
            _takes(activations),
            expect.no_spills,
            expect.within_limits,
            expect.packed_as_they_are("args[1].codes"),
        ),
    )


def _experts_case(format: str, *kernels: str) -> Case:
    return Case(
        name="experts, 4-bit activations",
        format=format,
        runs_on=capability(10),
        build=functools.partial(_experts, format=format),
        expectations=(
            _has_kernels(*(f"{name}_{format}" for name in kernels)),
            expect.no_spills,
            expect.within_limits,
            expect.packed_as_they_are("args[1].codes", "args[1].scales", "args[2].codes"),
        ),
    )


FAMILY = Family(
    name="public",
    about="quantized_grouped_matmul, routed_expert_mlp: the kernels that they take",
    interpreted="numerics, through the public functions",
    cases=(
        _product_case("nvfp4"),
        _product_case("bfloat16"),
        # The scale of a token is known when its row is: the layer between is quantized by a kernel of its own.
        _experts_case("nvfp4", "quantize", "gate_up_swiglu", "quantize", "grouped_matmul"),
        _experts_case("mxfp4", "quantize", "gate_up_swiglu", "grouped_matmul"),
        Case(
            name="experts of gpt-oss, padded when loaded",
            format="mxfp4",
            runs_on=capability(10),
            build=_gpt_oss,
            expectations=(
                _has_kernels("quantize_mxfp4", "gate_up_swiglu_mxfp4", "grouped_matmul_mxfp4"),
                expect.no_spills,
                expect.within_limits,
                expect.packed_as_they_are(
                    *(f"args[{i}].value.{leaf}" for i in (1, 2) for leaf in ("codes", "scales"))
                ),
            ),
        ),
    ),
)
