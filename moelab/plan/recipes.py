"""Which precision each kind of weight is stored and computed in, for serving and training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from moelab import spelling
from moelab.errors import UserError

# Bits a weight: 4-bit codes and an 8-bit scale per 16 (NVFP4) or 32 (MXFP4), INT4 with 16 bits per 32,
# FP8 with 32 bits per 128 x 128. One more scale per tensor is not counted.
BITS = {"bf16": 16.0, "fp8": 8 + 32 / 128**2, "nvfp4": 4.5, "mxfp4": 4.25, "int4": 4.5}
COMPUTE = {"bf16": "bf16", "fp8": "fp8", "nvfp4": "fp4", "mxfp4": "fp4", "int4": "bf16"}
ROLES = ("experts", "dense", "attention", "embedding", "head", "router", "rest")


class RecipeError(UserError):
    """A precision that there is not; the message names the nearest."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is stored in which format and computed with which tensor cores.

    Attributes:
      name: "nvfp4".
      formats: role of the weights -> key of BITS.
      compute: role -> "bf16", "fp8" or "fp4".
      kv_bits: of a stored key or value.
      core: precision of the attention's scores and values.
    """

    name: str
    formats: Mapping[str, str]
    compute: Mapping[str, str]
    kv_bits: float = 16
    core: str = "bf16"

    @property
    def bits(self) -> dict[str, float]:
        """Bits of one weight, by role."""
        return {role: BITS[self.formats[role]] for role in ROLES}

    def precisions(self) -> tuple[str, ...]:
        """Names the tensor cores that it needs."""
        return tuple(dict.fromkeys([*self.compute.values(), self.core]))


def _recipe(name: str, experts: str, other: str, compute_experts: str = "") -> Recipe:
    formats = {role: "bf16" for role in ROLES}
    formats |= {"experts": experts, "dense": other, "attention": other}
    compute = {role: COMPUTE[form] for role, form in formats.items()}
    compute["experts"] = compute_experts or compute["experts"]
    return Recipe(name, formats, compute)


RECIPES = {
    "bf16": _recipe("bf16", "bf16", "bf16"),
    "fp8": _recipe("fp8", "fp8", "fp8"),
    "nvfp4": _recipe("nvfp4", "nvfp4", "bf16"),
    "nvfp4_fp8": _recipe("nvfp4_fp8", "nvfp4", "fp8"),
    "mxfp4": _recipe("mxfp4", "mxfp4", "bf16"),
    "mxfp4_w4a8": _recipe("mxfp4_w4a8", "mxfp4", "bf16", "fp8"),
    "mxfp4_w4a16": _recipe("mxfp4_w4a16", "mxfp4", "bf16", "bf16"),
    "nvfp4_w4a16": _recipe("nvfp4_w4a16", "nvfp4", "bf16", "bf16"),
    "int4": _recipe("int4", "int4", "bf16"),
}
ABOUT = {
    "bf16": "all in bfloat16",
    "fp8": "matrices in FP8 with block scales, embedding, head and router in bfloat16",
    "nvfp4": "experts in NVFP4, weights and activations; the rest in bfloat16",
    "nvfp4_fp8": "experts in NVFP4, attention and dense layers in FP8",
    "mxfp4": "experts in MXFP4, weights and activations; the rest in bfloat16",
    "mxfp4_w4a8": "experts stored in MXFP4 and computed with FP8 activations, as gpt-oss on Blackwell",
    "mxfp4_w4a16": "experts stored in MXFP4 and computed in bfloat16",
    "nvfp4_w4a16": "experts stored in NVFP4 and computed in bfloat16",
    "int4": "experts stored in INT4 and computed in bfloat16",
}


def named(name: str) -> Recipe:
    """Returns a recipe; "+kv8" after a name stores keys and values in FP8.

    >>> named("nvfp4+kv8").kv_bits, named("fp8").bits["experts"]
    (8, 8.001953125)

    Raises:
      RecipeError: there is none; the message names the nearest.
    """
    base, plus, rest = name.lower().partition("+")
    if base not in RECIPES or (plus and rest != "kv8"):
        hint = spelling.hint(base, RECIPES) if base not in RECIPES else "; after + comes kv8"
        raise RecipeError(f"no precision {name!r}{hint or f'; there are {", ".join(RECIPES)}'}")
    found = RECIPES[base]
    return dataclasses.replace(found, name=name.lower(), kv_bits=8) if plus else found
