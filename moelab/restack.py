"""Parameters block by block: out of the scans' stacked segments, and into those of another grouping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moelab import model as model_lib


def blocks(model: model_lib.Transformer, tree: Mapping[str, Any]) -> list[Any]:
    """Returns what a tree has of each block, in order; None for a block of which it has nothing."""
    found = []
    for i, segment in enumerate(model.segments):
        here = tree[f"segment_{i}"] if f"segment_{i}" in tree else {}
        for repeat in range(segment.count):
            for j in range(len(segment.blocks)):
                stacked = here[f"block_{j}"] if f"block_{j}" in here else None
                found.append(jax.tree.map(lambda a, n=repeat: a[n], stacked))
    return found


def stacked(model: model_lib.Transformer, found: list[Any]) -> dict[str, Any]:
    """Puts blocks in order back into a model's segments: the inverse of `blocks`.

    Raises:
      ValueError: blocks that share a stack differ in their structure, or their number is another one.
    """
    if len(found) != sum(s.count * len(s.blocks) for s in model.segments):
        raise ValueError(f"the model has another number of blocks than {len(found)}")
    result, first = {}, 0
    for i, segment in enumerate(model.segments):
        size = len(segment.blocks)
        mine = found[first : first + size * segment.count]
        parts = {f"block_{j}": mine[j::size] for j in range(size)}
        parts = {name: part for name, part in parts.items() if part[0] is not None}
        if parts:
            result[f"segment_{i}"] = {
                name: jax.tree.map(lambda *a: jnp.stack(a), *part) for name, part in parts.items()
            }
        first += size * segment.count
    return result


def regrouped(
    old: model_lib.Transformer, new: model_lib.Transformer, tree: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a tree of one model in the segments of another one of the same blocks; other entries as they are.

    Raises:
      ValueError: the models do not have the same number of blocks, or blocks do not fit together.
    """
    rest = {name: value for name, value in tree.items() if not name.startswith("segment_")}
    return rest | stacked(new, blocks(old, tree))
