"""Quantizes the experts of all layers of a parameter tree with a PTQ method.

S repetitions of a segment, E experts, G = 2F gate and up rows, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moelab.quant import method as methods
from moelab.quant.statistics import LayerStatistics

EXPERTS = "experts"


def quantize_params(
    params: Mapping[str, Any],
    method: methods.Method,
    statistics: Mapping[tuple[int, int, int], LayerStatistics] | None,
    format: str,
    rule: str | None = None,
) -> tuple[dict, dict, dict[str, Any]]:
    """Takes the experts' weights out of `params` and quantizes them layer by layer.

    Args:
      params: nested parameters of a model; segment_i/block_j/moe/experts has gate_up (S, E, G, D) and down
        (S, E, D, F). Not changed. Other feed-forwards stay as they are.
      method: of `ptq.make`.
      statistics: of `calibration.calibrate`, by (segment, block, repetition); None for methods that need none.
      format: of the packed weights.
      rule: the format's scale rule; None: its first.

    Returns:
      (rest, quantized, report). rest and quantized as `quant.pack` returns them; `quantized` may have input_scale
      (S, D) beside gate_up and down. report: format, rule, rotation (block of the Hadamard transform that the inputs
      need, or None) and layers, a dict by layer of each layer's LayerResult.report, with tokens and source where there
      are statistics.

    Raises:
      ValueError: no experts in the tree, missing statistics, or weights that do not fit; with the layer's name.
    """
    rest, quantized, layers = dict(params), {}, {}
    rotation = rules = None
    for segment, block in _places(params):
        names = f"segment_{segment}", f"block_{block}"
        experts = params[names[0]][names[1]]["moe"][EXPERTS]
        results = []
        for repetition in range(experts["gate_up"].shape[0]):
            layer = (segment, block, repetition)
            name = "/".join((*names, str(repetition)))
            weights = {key: experts[key][repetition] for key in methods.MATRICES}
            found = _found(statistics, layer, name)
            result = _quantize(method, weights, found, format, rule, name)
            results.append(result)
            layers[name] = result.report | _origin(found)
        rotation, rules = results[0].rotation, results[0].weights["gate_up"].rule
        packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(r.weights for r in results))
        _put(quantized, (*names, "moe", EXPERTS), packed)
        rest = _without(rest, (*names, "moe", EXPERTS))
    if not layers:
        raise ValueError("params have no experts at segment_i/block_j/moe/experts: nothing to do")
    return rest, quantized, _report(format, rules, rotation, layers)


def _report(format: str, rule: str, rotation: int | None, layers: dict) -> dict[str, Any]:
    return {"format": format, "rule": rule, "rotation": rotation, "layers": layers}


def _places(params: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Finds (segment, block) of all layers with experts, in order."""
    found = []
    for segment, blocks in params.items():
        if not segment.startswith("segment_"):
            continue
        for block, parts in blocks.items():
            if "moe" in parts and EXPERTS in parts["moe"]:
                found.append((int(segment.split("_")[1]), int(block.split("_")[1])))
    return sorted(found)


def _found(statistics, layer: tuple[int, int, int], name: str) -> LayerStatistics | None:
    if statistics is None:
        return None
    if layer not in statistics:
        raise ValueError(
            f"statistics have no layer {name}; they have {len(statistics)} layers: of another model?"
        )
    return statistics[layer]


def _quantize(method, weights, statistics, format, rule, name: str) -> methods.LayerResult:
    try:
        return method.quantize(weights, statistics, format, rule)
    except ValueError as error:
        raise ValueError(f"{name}/moe/experts cannot be quantized: {error}") from error


def _origin(found: LayerStatistics | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {"tokens": found.tokens_E.tolist(), "source": list(found.source_E)}


def _put(tree: dict, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _without(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict:
    """Copies a tree without what is at the path; a folder that becomes empty goes too, as in `packing.pack`."""
    kept = dict(tree)
    if len(path) == 1:
        del kept[path[0]]
        return kept
    inner = _without(tree[path[0]], path[1:])
    if inner:
        kept[path[0]] = inner
    else:
        del kept[path[0]]
    return kept
