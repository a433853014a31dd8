"""From a recipe's roles to the precisions of matmuls."""

from __future__ import annotations

import pallas_kernels
from moelab.quant.recipes import PLAIN, Formats, Recipe
from pallas_kernels import MatmulPrecision, MlpPrecision


def matmul(recipe: Recipe, formats: Formats, *, routed: bool = False) -> MatmulPrecision:
    """Returns the precision of one product.

    Args:
      recipe: for the rules, scales, transforms and rounding.
      formats: of the role.
      routed: whether the rows are sorted by expert: only there are scales per group or static, and rotations.
    """
    quantized = formats.gradient is not None
    scale = recipe.activation_scale if routed else "per_token"
    if recipe.activation_scale == "per_tensor":
        scale = "per_tensor"
    return pallas_kernels.MatmulPrecision(
        x=formats.activation,
        w=formats.weight,
        dy=formats.gradient,
        x_scale=scale,
        x_rule=recipe.activation_rule if formats.activation else None,
        w_rule=recipe.weight_rule if formats.weight else None,
        rotation=recipe.rotation if routed else None,
        hadamard=recipe.hadamard if quantized else None,
        rounding=recipe.rounding if quantized else "nearest",
    )


def experts(recipe: Recipe) -> MlpPrecision | None:
    """Returns the precision of the routed experts; None where they stay plain."""
    roles = (recipe.expert_gate_up, recipe.expert_down)
    if roles == (PLAIN, PLAIN) and recipe.rotation is None:
        return None
    gate_up, down = (matmul(recipe, role, routed=True) for role in roles)
    return MlpPrecision(gate_up=gate_up, down=down)


def of_role(recipe: Recipe, role: str) -> MatmulPrecision | None:
    """Returns the precision of a dense product, as of attention or the shared experts; None where it stays plain."""
    formats = getattr(recipe, role)
    return None if formats == PLAIN else matmul(recipe, formats)
