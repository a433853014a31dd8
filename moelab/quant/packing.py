"""Packs the routed experts' weights, and counts their bytes.

E experts, G = 2F gate and up rows, D model width, F expert width; a leading layer axis comes from nn.scan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moelab.quant.recipes import Recipe
from pallas_kernels import formats

# Ends of the paths of routed experts' matrices, [..., E, out, in].
EXPERT_PATHS = (("experts", "gate_up"), ("experts", "down"))


def pack(params: Mapping[str, Any], recipe: Recipe) -> tuple[dict, dict]:
    """Takes the experts' weights out of `params` and quantizes them.

    Each matrix of each expert and layer has its own global scale, so that an expert means the same wherever it is.

    Args:
      params: nested parameters; leaves at .../experts/gate_up [..., E, G, D] and .../experts/down [..., E, D, F] are
        packed. Not changed.
      recipe: its expert_weight and rule are used.

    Returns:
      (rest, quantized): the other parameters, and BlockScaled values at the experts' paths: the collection `quantized`.
      A recipe with plain weights leaves everything in `rest`, and `quantized` is empty.

    Raises:
      ValueError: a matrix does not fit the format; the message has its path.
    """
    if not recipe.packed:
        return dict(params), {}
    return _split(params, recipe, ())


def unpack(rest: Mapping[str, Any], quantized: Mapping[str, Any]) -> dict:
    """Puts packed experts back among the parameters as the float32 values that they stand for.

    Args:
      rest, quantized: from `pack`. Not changed.

    Returns:
      Parameters of the shape that `pack` was given.
    """
    merged = dict(rest)
    for name, value in quantized.items():
        if _is_packed(value):
            merged[name] = _dequantize(value)
        else:
            merged[name] = unpack(rest[name] if name in rest else {}, value)
    return merged


_dequantize = jax.jit(formats.dequantize)


def expert_bytes(tree: Mapping[str, Any], recipe: Recipe) -> int:
    """Returns the stored bytes of the routed experts' weights under a recipe.

    Args:
      tree: parameters (float32 4 bytes a weight, bf16 2; packed recipes: what `pack` would make of them), or the
        `quantized` that `pack` returned. Shapes (`jax.eval_shape`) will do.
      recipe: the recipe.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_packed)
    experts = [x for path, x in found if tuple(_name(k) for k in path[-2:]) in EXPERT_PATHS]
    return sum(_bytes(x, recipe) for x in experts)


def _split(tree: Mapping[str, Any], recipe: Recipe, path: tuple[str, ...]) -> tuple[dict, dict]:
    rest, quantized = {}, {}
    for name, value in tree.items():
        here = (*path, name)
        if here[-2:] in EXPERT_PATHS:
            quantized[name] = _quantize(value, recipe, "/".join(here))
        elif isinstance(value, Mapping):
            kept, packed = _split(value, recipe, here)
            # A folder whose leaves were all packed goes; one that was empty stays.
            if kept or not packed:
                rest[name] = kept
            if packed:
                quantized[name] = packed
        else:
            rest[name] = value
    return rest, quantized


def _quantize(weight: jax.Array, recipe: Recipe, path: str) -> formats.BlockScaled:
    if weight.ndim < 3:
        raise ValueError(f"{path} has shape {weight.shape}; experts are [..., experts, out, in]")
    try:
        return formats.quantize(
            weight, recipe.expert_weight, rule=recipe.rule, num_batch_axes=weight.ndim - 2
        )
    except ValueError as error:
        raise ValueError(f"{path} cannot be packed as {recipe.name}: {error}") from error


def _bytes(weight: Any, recipe: Recipe) -> int:
    if _is_packed(weight):
        return formats.nbytes(weight)
    if recipe.packed:
        return formats.nbytes(jax.eval_shape(lambda w: _quantize(w, recipe, "experts"), weight))
    return math.prod(weight.shape) * jnp.dtype(recipe.expert_weight).itemsize


def _is_packed(value: Any) -> bool:
    return isinstance(value, formats.BlockScaled)


def _name(key: Any) -> str:
    return str(getattr(key, "key", key))
