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
from pallas_kernels.grouped_matmul import choice, loading

# Ends of the paths of routed experts' matrices, [..., E, out, in].
EXPERT_PATHS = (("experts", "gate_up"), ("experts", "down"))


def pack(
    params: Mapping[str, Any], recipe: Recipe, keep: frozenset[tuple[str, str]] = frozenset()
) -> tuple[dict, dict]:
    """Takes the experts' weights out of `params` and quantizes them.

    Each matrix of each expert and layer has its own global scale, so that an expert means the same wherever it is.

    Args:
      params: nested parameters; leaves at .../experts/gate_up [..., E, G, D] and .../experts/down [..., E, D, F] are
        packed. Not changed.
      recipe: the weight formats of its two expert roles and its weight_rule are used.
      keep: folders, as (segment, block), whose experts stay plain.

    Returns:
      (rest, quantized): the other parameters, and BlockScaled values at the experts' paths: the collection `quantized`.
      A recipe with plain weights leaves everything in `rest`, and `quantized` is empty.

    Raises:
      ValueError: a matrix does not fit the format; the message has its path.
    """
    if not recipe.packed:
        return dict(params), {}
    return _split(params, recipe, keep, ())


def unpack(
    rest: Mapping[str, Any], quantized: Mapping[str, Any], rotation: int | None = None
) -> dict:
    """Puts packed experts back among the parameters as the float32 values that they stand for.

    Args:
      rest, quantized: from `pack`. Not changed.
      rotation: of the recipe; it is undone, so that plain activations serve.

    Returns:
      Parameters of the shape that `pack` was given.
    """
    merged = dict(rest)
    for name, value in quantized.items():
        if _is_packed(value):
            value = _dequantize(value)
            merged[name] = formats.inverse_block_hadamard(value, rotation) if rotation else value
        elif isinstance(value, Mapping):
            merged[name] = unpack(rest[name] if name in rest else {}, value, rotation)
        else:
            merged[name] = value
    return merged


def for_device(quantized: Mapping[str, Any], activations: str | None) -> dict:
    """Returns packed experts as this device's kernels read them, once, when loaded: scales arranged, widths padded.

    Args:
      quantized: from `pack`.
      activations: the format of the experts' activations; None for bfloat16.
    """

    def loaded(path, leaf):
        if not _is_packed(leaf):
            return leaf
        parts = 2 if _name(path[-1]) == "gate_up" else 1
        return choice.for_device(leaf, activations, parts=parts)

    return jax.tree_util.tree_map_with_path(loaded, quantized, is_leaf=_is_packed)


def as_packed(quantized: Mapping[str, Any]) -> dict:
    """Returns packed experts as `pack` made them, whatever `for_device` did to them: linear scales, no padding."""

    def stored(leaf):
        leaf = leaf.logical() if isinstance(leaf, loading.Padded) else leaf
        return formats.arranged(leaf, "linear") if _is_packed(leaf) else leaf

    def is_weight(leaf):
        return _is_packed(leaf) or isinstance(leaf, loading.Padded)

    return jax.tree.map(stored, quantized, is_leaf=is_weight)


_dequantize = jax.jit(formats.dequantize)


def expert_weights(params: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, jax.Array]:
    """Returns the routed experts' matrices by path, segment_0/block_0/moe/experts/gate_up [..., E, 2F, D]."""
    found = {}
    for name, value in params.items():
        here = (*path, name)
        if here[-2:] in EXPERT_PATHS:
            found["/".join(here)] = value
        elif isinstance(value, Mapping):
            found |= expert_weights(value, here)
    return found


def with_expert_weights(
    params: Mapping[str, Any], weights: Mapping[str, jax.Array], path: tuple[str, ...] = ()
) -> dict:
    """Returns the parameters with other expert matrices: the inverse of `expert_weights`."""
    new = {}
    for name, value in params.items():
        here = (*path, name)
        if isinstance(value, Mapping):
            new[name] = with_expert_weights(value, weights, here)
        else:
            new[name] = weights["/".join(here)] if "/".join(here) in weights else value
    return new


def expert_bytes(tree: Mapping[str, Any], recipe: Recipe) -> int:
    """Returns the stored bytes of the routed experts' weights in a tree.

    Args:
      tree: `rest` or `quantized` of `pack`, or parameters; shapes (`jax.eval_shape`) will do.
      recipe: its compute_dtype says what a plain weight takes, 4 bytes or 2.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_packed)
    experts = [x for path, x in found if tuple(_name(k) for k in path[-2:]) in EXPERT_PATHS]
    return sum(_bytes(x, recipe) for x in experts)


def _split(
    tree: Mapping[str, Any], recipe: Recipe, keep: frozenset, path: tuple[str, ...]
) -> tuple[dict, dict]:
    rest, quantized = {}, {}
    for name, value in tree.items():
        here = (*path, name)
        if here[-2:] in EXPERT_PATHS and weight_format(recipe, name) and here[:2] not in keep:
            quantized[name] = _quantize(value, recipe, "/".join(here))
        elif isinstance(value, Mapping):
            kept, packed = _split(value, recipe, keep, here)
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
    format = weight_format(recipe, path.rpartition("/")[2])
    if recipe.rotation:
        weight = formats.block_hadamard(weight, recipe.rotation)
    try:
        return formats.quantize(
            weight, format, rule=recipe.weight_rule, num_batch_axes=weight.ndim - 2
        )
    except ValueError as error:
        raise ValueError(f"{path} cannot be packed as {recipe.name}: {error}") from error


def weight_format(recipe: Recipe, name: str) -> str | None:
    """Returns the format of the experts' matrix of that name, gate_up or down; None: it stays plain."""
    return {"gate_up": recipe.expert_gate_up, "down": recipe.expert_down}[name].weight


def _bytes(weight: Any, recipe: Recipe) -> int:
    if _is_packed(weight):
        return formats.nbytes(weight)
    return math.prod(weight.shape) * jnp.dtype(recipe.compute_dtype).itemsize


def _is_packed(value: Any) -> bool:
    return isinstance(value, formats.BlockScaled)


def _name(key: Any) -> str:
    return str(getattr(key, "key", key))
